"""Low-rank factors of one matrix: the truncated SVD, randomised where that is cheaper, and a weighted fit.

Everything works on what softmax sees: a row's constant is free, so rows are centred first ("the gauge"). For the
least-squares error this is also the best choice of constants: it takes the direction of the constant vector out of
the problem before ranks are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factors", "NestedSvd", "centre_rows", "smallest_rank", "truncated_svd", "weighted_low_rank"]

OVERSAMPLE = 8
"""Columns that a randomised range carries beyond the rank that is wanted of it."""

POWER_STEPS = 2
"""Multiplications with the matrix and its transpose that sharpen a randomised range."""

FIRST_WIDTH = 16
"""Rank up to which the first range of a search reaches."""


@dataclass(frozen=True, eq=False)
class Factors:
    """`left @ right.T`, columns in falling order of importance and equal in norm on both sides.

    Args:
        left: `[N, R]`.
        right: `[M, R]`.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.left.shape[1]

    def truncate(self, rank: int) -> Factors:
        """Keep the first columns."""
        return Factors(self.left[:, :rank], self.right[:, :rank])

    def to(self, dtype: torch.dtype) -> Factors:
        """Round, or widen."""
        return Factors(self.left.to(dtype), self.right.to(dtype))

    def beside(self, other: Factors) -> Factors:
        """Columns of both, so that the products add."""
        return Factors(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=1))

    def energies(self) -> Tensor:
        """Squared singular values, of factors that come from an SVD."""
        return self.left.double().square().sum(0) * self.right.double().square().sum(0)

    def dense(self) -> Tensor:
        """The product, `[N, M]`."""
        return self.left @ self.right.mT

    @classmethod
    def balanced(cls, left: Tensor, right: Tensor) -> Factors:
        """Bring any two factors to the form of an SVD without forming their product."""
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right)
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
        root = s.sqrt()
        return cls(q_left @ u * root, q_right @ vh.mT * root)


def centre_rows(b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Subtract each row's mean, over all entries or weighted.

    Args:
        b: `[N, M]`.
        weights: not negative, `[N, M]`; a row that weighs nothing is left as it is.

    Returns:
        `[N, M]`: the same to softmax as `b`.
    """
    if weights is None:
        return b - b.mean(-1, keepdim=True)
    total = weights.sum(-1, keepdim=True)
    return b - (weights * b).sum(-1, keepdim=True) / total.clamp(min=torch.finfo(b.dtype).tiny)


def truncated_svd(b: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Best factors of a matrix, in the least-squares sense, up to a rank.

    Takes the full SVD where the rank is a large part of the matrix, else subspace iteration from a random start (Halko,
    Martinsson and Tropp), whose error is within a small factor of the best.

    Args:
        b: `[N, M]`, floating point.
        rank: largest number of columns; fewer come back if the matrix has no more.
        generator: source of the random start.

    Returns:
        Factors of at most `rank` columns.

    Reference:
        "Finding structure with randomness", https://arxiv.org/abs/0909.4061, algorithm 4.4.
    """
    full = min(b.shape)
    width = rank + OVERSAMPLE
    if 3 * width >= full:
        u, s, vh = torch.linalg.svd(b, full_matrices=False)
    else:
        start = torch.randn(b.shape[1], width, generator=generator, dtype=b.dtype)
        basis = torch.linalg.qr(b @ start.to(b.device)).Q
        for _ in range(POWER_STEPS):
            basis = torch.linalg.qr(b @ torch.linalg.qr(b.mT @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.mT @ b, full_matrices=False)
        u = basis @ u
    rank = min(rank, full)
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, vh[:rank].mT * root)


class NestedSvd:
    """Truncated SVDs of one matrix: the widest so far serves all smaller ranks.

    Args:
        b: `[N, M]`.
        generator: source of the random starts.
    """

    def __init__(self, b: Tensor, generator: torch.Generator) -> None:
        self.b, self.generator = b, generator
        self._widest: Factors | None = None

    def __call__(self, rank: int) -> Factors:
        """Factors of a rank, or of the matrix's own if that is smaller."""
        if self._widest is None or self._widest.rank < min(rank, *self.b.shape):
            self._widest = truncated_svd(self.b, rank, self.generator)
        return self._widest.truncate(rank)


def smallest_rank(
    factors_of: Callable[[int], Factors],
    accepts: Callable[[Factors], bool],
    max_rank: int,
    *,
    nested: bool = True,
    at_least: Callable[[Factors], int] | None = None,
) -> Factors | None:
    """Find the smallest rank whose factors are accepted.

    Ranks are tried in ranges that grow fourfold; within a range by bisection, as if acceptance were monotone. What
    comes back has itself been accepted, whether it is or not.

    Args:
        factors_of: gives factors of a rank.
        accepts: the test.
        max_rank: largest rank to try, at least 1.
        nested: whether the first columns of factors are as good as the factors of that rank.
        at_least: a rank below which nothing is accepted, judged from factors that were not; default: none is known.

    Returns:
        The factors, or None if no range's widest are accepted.
    """
    failed, width = 0, min(FIRST_WIDTH, max_rank)
    while not accepts(widest := factors_of(width)):
        failed = width if at_least is None else max(width, at_least(widest) - 1)
        if failed >= max_rank:
            return None
        width = min(4 * failed, max_rank)
    best = widest  # its rank may be below the width, where the matrix has no more
    while best.rank - failed > 1:
        middle = (best.rank + failed) // 2
        factors = widest.truncate(middle) if nested else factors_of(middle)
        if accepts(factors):
            best = factors
        else:
            failed = middle
    return best


def weighted_low_rank(
    b: Tensor,
    weights: Tensor,
    start: Factors,
    *,
    max_sweeps: int = 30,
    patience: float = 0.02,
) -> Factors:
    """Fit `sum_ij weights[i, j] (b[i, j] - c[i] - left[i] . right[j])^2` by alternating least squares.

    Each half of a sweep solves for one side exactly, the row's constant c with the left one. Where much is hidden
    sweeps advance in small, steady steps; so each begins a little ahead in the direction of the last one (Nesterov's
    momentum, dropped whenever the error rises). A sweep costs `N M (R + 1)^2` multiplications.

    Args:
        b: `[N, M]`; what has no weight is not read, and must be finite.
        weights: `[N, M]`, not negative.
        start: factors to begin with; their rank is kept.
        max_sweeps: most sweeps.
        patience: stop when ten sweeps lower the error by less than this share.

    Returns:
        Factors of the rank of `start`, balanced: the best of all sweeps.
    """
    best, least = start, torch.inf  # least error so far
    right = ahead = start.right
    errors: list[float] = []
    momentum = 0
    for sweep in range(max_sweeps):
        solved = _solve_rows(b, weights, torch.cat([ahead, ahead.new_ones(len(ahead), 1)], dim=1))
        left, constant = solved[:, :-1], solved[:, -1:]
        last, right = right, _solve_rows((b - constant).mT, weights.mT, left)
        errors.append(float((weights * (b - constant - left @ right.mT).square()).sum()))
        if errors[-1] < least:
            best, least = Factors(left, right), errors[-1]
        if sweep >= 10 and least >= (1.0 - patience) * min(errors[:-10]):
            break
        momentum = momentum + 1 if errors[-1] == least else 0
        ahead = right + momentum / (momentum + 3) * (right - last)
    return Factors.balanced(best.left, best.right)


CHUNK_ENTRIES = 1 << 22
"""Entries of products of columns that are formed at once."""


def _solve_rows(b: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """For each row i, the x that minimises `sum_j weights[i, j] (b[i, j] - basis[j] . x)^2`; `[N, columns]`."""
    columns = basis.shape[1]
    right_hand = (weights * b) @ basis
    # A row that sees fewer keys than there are columns has many solutions; a little damping takes a small one.
    damping = 1e-10 * float(basis.square().sum() / columns) * float(weights.mean()) + torch.finfo(b.dtype).tiny
    eye = torch.eye(columns, dtype=b.dtype, device=b.device) * damping
    rows = max(1, CHUNK_ENTRIES // columns**2)
    chunks = zip(weights.split(rows), right_hand.split(rows), strict=True)
    return torch.cat([torch.linalg.solve(_normal(w, basis) + eye, x[..., None])[..., 0] for w, x in chunks])


def _normal(weights: Tensor, basis: Tensor) -> Tensor:
    """`[n, columns, columns]`: the sum over j of `weights[n, j] basis[j] basis[j]^T`."""
    columns = basis.shape[1]
    parts = basis.split(max(1, CHUNK_ENTRIES // basis.numel()), dim=1)
    products = [weights @ (part[:, :, None] * basis[:, None, :]).flatten(1) for part in parts]
    return torch.cat([p.unflatten(1, (-1, columns)) for p in products], dim=1)
