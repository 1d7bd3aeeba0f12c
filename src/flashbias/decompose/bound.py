"""The promise about the output: how far attention can move when its bias is replaced by another.

Let `e = b_hat - b` on the entries of a row that are read, and `delta = max e - min e`, its spread. A constant in `e`
changes no probability. The total variation between the two rows of probabilities is at most `tanh(delta / 4)`, so

    |out_hat - out| <= tanh(delta / 4) * diameter of the values that the row can see.

Proof. With `p` the true probabilities and `A` the keys on which `p_hat > p`, the distance is `p_hat(A) - p(A)`. The
odds of `A` change by the factor `E[exp e | A] / E[exp e | not A] <= exp(delta)`. For odds `o` that grow to `o
exp(delta)` the probability grows by `o exp(delta) / (1 + o exp(delta)) - o / (1 + o)`, which is largest at `o =
exp(-delta / 2)`, where it is `tanh(delta / 4)`. Equality holds for two keys whose errors differ by `delta` and whose
scores differ by `-delta / 2`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["certificate", "check_tol", "row_spread", "spread_allowed"]


def check_tol(tol: float) -> float:
    """Return `tol` if it is a number strictly between 0 and 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0.0 < tol < 1.0:
        raise ValueError(f"tol must be a number in (0, 1), got {tol!r}")
    return float(tol)


def spread_allowed(tol: float) -> float:
    """Return the largest spread of a row's error that keeps the promise `tol`: `4 artanh(tol)`.

    Examples:
        >>> round(spread_allowed(0.02), 6)
        0.080011
    """
    return 4.0 * math.atanh(check_tol(tol))


def row_spread(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Spread of each row's error over the entries that are read.

    Formula: `spread[i] = max_j error[i, j] - min_j error[i, j]`, j over the open entries; 0 for a row without any.

    Args:
        error: `[..., N, M]`, the approximate bias minus the true one.
        mask: booleans that broadcast to `[..., N, M]`; True marks an entry that is read. None: all are.

    Returns:
        `[..., N]` in the dtype of `error`.
    """
    if error.shape[-1] == 0:
        return error.new_zeros(error.shape[:-1])
    if mask is None:
        return error.amax(-1) - error.amin(-1)
    high = error.masked_fill(~mask, -math.inf).amax(-1)
    low = error.masked_fill(~mask, math.inf).amin(-1)
    return (high - low).clamp(min=0.0)


def certificate(spread: Tensor) -> Tensor:
    """Turn spreads into bounds on the output's change, relative to the diameter of the values.

    Formula: `tanh(spread / 4)`, element by element.

    Args:
        spread: of any shape, not negative; `row_spread(...).amax(-1)` gives one bound per head.

    Returns:
        The bounds, same shape, in 0 … 1.

    Examples:
        >>> import torch
        >>> error = torch.tensor([[0.0, 0.04, -0.04]])
        >>> certificate(row_spread(error)).item() <= 0.02
        True

    Reference:
        Derived in the docs, "What a tolerance promises".
    """
    return torch.tanh(spread / 4.0)
