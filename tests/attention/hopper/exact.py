"""Attention in float64, which the kernels on the host are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attended"]


def attended(scores: Tensor, shift: int, left: int, right: int, shown: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of scores `[..., N, M]` within a band, rows that see nothing 0 and -inf.

    Args:
        scores: of all pairs.
        shift: of the diagonal.
        left: keys before it that a query sees; negative: all.
        right: keys behind it, likewise.
        shown: keys that a mask leaves, None: all.
    """
    n, m = scores.shape[-2:]
    gap = torch.arange(m) - torch.arange(n)[:, None] - shift
    keep = torch.ones(n, m, dtype=torch.bool)
    keep = keep & (gap <= right) if right >= 0 else keep
    keep = keep & (gap >= -left) if left >= 0 else keep
    keep = keep if shown is None else keep & shown
    scores = scores.masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(lse == -math.inf, 0.0, (scores - torch.where(lse == -math.inf, 0.0, lse)).exp())
    return weights, lse[..., 0]
