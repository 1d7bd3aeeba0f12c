"""`BlockGradients`: what one block of keys adds to each gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["BlockGradients"]


@dataclass
class BlockGradients:
    """What one block adds to each gradient; None where none is needed.

    Shapes are those of the inputs, broadcast dimensions summed. `phi_q` is `dS (phi_k - reference)`.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    phi_q: Tensor | None = None
    phi_k: Tensor | None = None
    table: Tensor | None = None
