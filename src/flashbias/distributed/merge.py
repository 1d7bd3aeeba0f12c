"""Putting the softmax over all keys together from blocks of them.

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The log-sum-exp is float64: factors may shift whole rows by numbers whose float32 rounding is larger than the
differences between blocks. Outputs are summed in float32 (float64 beside float64); a first block of all rows is the
sum so far, and is taken as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashbias.attention.call import lse_dtype

__all__ = ["Merged"]


class Merged:
    """The output and log-sum-exp of the blocks that have been added so far.

    Args:
        query: `[*batch, H, N, head_dim]`, for shape, dtype and device.
        head_dim_v: width of the values.

    Attributes:
        out: `[*batch, H, N, head_dim_v]`, float32 (float64 beside float64), or as one block of all rows has it.
        lse: `[*batch, H, N]`, float64; -inf where nothing has been seen.

    Examples:
        >>> import torch
        >>> merged = Merged(torch.zeros(1, 2, 4), head_dim_v=1)
        >>> for value in (1.0, 3.0):
        ...     merged.add(slice(0, 2), torch.full((1, 2, 1), value), torch.zeros(1, 2, dtype=torch.float64))
        >>> merged.out.flatten(), merged.lse.exp().flatten()
        (tensor([2., 2.]), tensor([2., 2.], dtype=torch.float64))
    """

    def __init__(self, query: Tensor, head_dim_v: int) -> None:
        self.dtype = lse_dtype(query.dtype)
        # Zeros take no memory until something is added to them: mostly, the first block takes their place.
        self.out = query.new_zeros((), dtype=self.dtype).expand(*query.shape[:-1], head_dim_v)
        self.lse = query.new_full((), -math.inf, dtype=torch.float64).expand(query.shape[:-1])
        self._is_empty, self._is_own = True, False

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Add a block of keys for some rows.

        Args:
            rows: which queries.
            out: `[*batch, H, n, head_dim_v]`, the block's own output; not to be written to afterwards.
            lse: `[*batch, H, n]`, float64, the block's own log-sum-exp; likewise.
        """
        if self._is_empty and out.shape == self.out.shape:
            self.out, self.lse, self._is_empty = out, lse, False
            return
        if not self._is_own:
            self.out, self.lse = _owned(self.out, self.dtype), _owned(self.lse, torch.float64)
            self._is_empty, self._is_own = False, True
        total = torch.logaddexp(self.lse[..., rows], lse)
        # Where nothing has been seen yet, exp(-inf - -inf) would be NaN.
        anchor = torch.where(total == -math.inf, 0.0, total)
        before, now = ((part - anchor).exp()[..., None].to(self.dtype) for part in (self.lse[..., rows], lse))
        self.out[..., rows, :].mul_(before).addcmul_(out.to(self.dtype), now)
        self.lse[..., rows] = total


def _owned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy to be written to."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
