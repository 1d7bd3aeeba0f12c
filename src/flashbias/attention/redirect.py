"""Who answers calls of the attention while a context is open; nobody else otherwise.

`flashbias.attention` asks `target` first. It is one for the process and not for a thread: what a backward pass
recomputes runs in threads of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Target", "attention", "to", "varlen_attention"]


class Target(Protocol):
    """What may stand in for the attention: the same arguments, the same results."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Any, **options: Any) -> Any:
        """As `flashbias.attention`."""
        ...

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        bias: Any,
        **options: Any,
    ) -> Any:
        """As `flashbias.varlen_attention`."""
        ...


target: Target | None = None
"""Who answers, for as long as a context is open."""


@contextmanager
def to(chosen: Target) -> Iterator[None]:
    """Let a target answer all calls of the attention in this process.

    Args:
        chosen: the target.

    Raises:
        RuntimeError: another target answers already.
    """
    global target
    if target is not None:
        raise RuntimeError(f"calls of the attention go to {type(target).__name__} already; leave its context first")
    _keep_out_of_graphs()
    target = chosen
    try:
        yield
    finally:
        target = None


# These two are what a compiled model calls: the same functions for every target, so that it is compiled once with a
# target and once without.


def attention(*arguments: Any, **options: Any) -> Any:
    """Let the target attend."""
    assert target is not None
    return target.attention(*arguments, **options)


def varlen_attention(*arguments: Any, **options: Any) -> Any:
    """Let the target attend to packed sequences."""
    assert target is not None
    return target.varlen_attention(*arguments, **options)


@functools.cache
def _keep_out_of_graphs() -> None:
    """Have torch.compile call both functions as they are; as decorators these would load Triton with this package."""
    global attention, varlen_attention
    attention = torch.compiler.disable(attention)
    varlen_attention = torch.compiler.disable(varlen_attention)
