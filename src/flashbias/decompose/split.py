"""A near field and the rest: a short table for what is sharp around the diagonal, factors for what is smooth."""

from __future__ import annotations

import torch
from torch import Tensor

from flashbias.decompose.relative import Codes
from flashbias.decompose.svd import Factors, centre_rows

__all__ = ["split"]


def split(
    b: Tensor,
    codes: Codes,
    half_width: int,
    rank: int,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    max_rounds: int = 200,
    patience: float = 1e-3,
) -> tuple[Tensor, Factors]:
    """Fit a bias by a relative table with constant tails plus factors.

    Minimises `sum_ij (b[i, j] - c[i] - table[clip(code_k[j] - code_q[i])] - left[i] . right[j])^2` over the open
    entries, by turns: the table is the mean of what the factors leave on each diagonal, the factors are one step of
    subspace iteration on what the table leaves. Neither step raises the error. A learned relative bias whose spike at
    the diagonal defeats an SVD of any rank is fitted by a table of a few entries and a small rank.

    Args:
        b: `[N, M]`, finite.
        codes: of the places; a line.
        half_width: the table has `2 half_width + 1` entries, the outer two of which are the tails.
        rank: of the factors, at least 1.
        generator: source of the first subspace.
        mask: booleans `[N, M]`, True where an entry is read; None: everywhere.
        max_rounds: most turns.
        patience: stop when ten turns lower the error by less than this share.

    Returns:
        The table `[2 half_width + 1]` and the factors.
    """
    index = codes.index(half_width).flatten()
    count = b.new_zeros(2 * half_width + 1).scatter_add_(0, index, _open(b, mask).flatten()).clamp_(min=1)
    table = _spike(b, index, count, mask)
    basis = torch.randn(b.shape[1], min(rank, *b.shape), generator=generator, dtype=b.dtype).to(b.device)
    basis = torch.linalg.qr(basis).Q
    low_rank = torch.zeros_like(b)
    before = torch.inf
    for turn in range(max_rounds):
        rest = b - table[index].view(b.shape)
        if mask is not None:  # hidden entries agree with the fit, whatever it is
            rest = torch.where(mask, rest - _row_means(rest - low_rank, mask), low_rank)
        rest = centre_rows(rest)
        left = torch.linalg.qr(rest @ basis).Q
        basis, upper = torch.linalg.qr(rest.mT @ left)
        low_rank = left @ upper.mT @ basis.mT
        error = rest - low_rank
        table = table + b.new_zeros(len(table)).scatter_add_(0, index, (error * _open(b, mask)).flatten()) / count
        if turn % 10 == 9:
            after = float(error.square().sum())
            if after >= (1.0 - patience) * before:
                break
            before = after
    return table, Factors.balanced(left @ upper.mT, basis)


def _spike(b: Tensor, index: Tensor, count: Tensor, mask: Tensor | None) -> Tensor:
    """A table to begin with: what stands out between the two ends of the near field, and no tails."""
    mean = b.new_zeros(len(count)).scatter_add_(0, index, (b * _open(b, mask)).flatten()) / count
    inner = mean[1:-1]
    if len(inner) < 2:
        return torch.zeros_like(mean)
    line = torch.lerp(inner[0], inner[-1], torch.linspace(0, 1, len(inner), dtype=b.dtype, device=b.device))
    return torch.nn.functional.pad(inner - line, (1, 1))


def _open(b: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(b) if mask is None else mask.expand(b.shape).to(b.dtype)


def _row_means(rest: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(rest.dtype)
    return (rest * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1)
