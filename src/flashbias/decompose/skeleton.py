"""`Skeleton`: factors of a matrix from some of its rows and columns, and `Pivots`, which says from which.

With rows I and columns J, and the singular values and vectors `U S V^T` of the entries where they cross,

    phi_q(x) = f(x, y_J) V S^(-1/2)          phi_k(y) = f(x_I, y)^T U S^(-1/2)

reproduce what crosses, truncated, and extend it to all other rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashbias.decompose.blocks import BlockFunction

__all__ = ["Pivots", "Skeleton", "Truncation"]

OVERSAMPLING = 4
"""Rows and columns for each singular value that is used: the large ones are then those of the whole matrix."""

FULL_SVD = 1024
"""Up to this size, all singular values of a crossing are computed."""

POWER_ITERATIONS = 1

LEVELLING_STEPS = 3

FEW_DIMENSIONS = 8


# -------------------------------------------------------------------- which rows and columns


class Pivots:
    """Which points to sample: far from each other, some at random, and those named as badly approximated.

    The search for far points is thousands of short steps, one after the other. numpy takes them on one core; a pool of
    threads would spend its time in waiting for each other.

    Args:
        points: `[N, D]`.
        generator: of what is random.
    """

    def __init__(self, points: Tensor, generator: torch.Generator) -> None:
        places = _few_dimensions(points.float(), generator)
        self.shuffled = torch.randperm(len(points), generator=generator).to(points.device)
        self.axes = np.ascontiguousarray(places.mT.cpu().numpy())
        self.distance = _square_distance(self.axes, self.axes.mean(1))
        self.far: list[int] = []
        self.named = self.shuffled[:0]

    def name(self, indices: Tensor) -> None:
        """Have these among the pivots from now on."""
        self.named = torch.cat([self.named, indices]).unique()

    def take(self, count: int) -> Tensor:
        """About `count` indices, ascending: seven eighths far from each other, one eighth random, and the named."""
        if count >= len(self.shuffled):
            return torch.arange(len(self.shuffled), device=self.shuffled.device)
        few = count // 8
        return torch.cat([self._farthest(count - few), self.shuffled[:few], self.named]).unique()

    def _farthest(self, count: int) -> Tensor:
        """The first `count` of a sequence in which each point is the farthest from the centre and all before it."""
        while len(self.far) < count:
            index = int(self.distance.argmax())
            if self.far and self.distance[index] <= 0:
                break  # all others repeat points of the sequence
            self.far.append(index)
            np.minimum(self.distance, _square_distance(self.axes, self.axes[:, index]), out=self.distance)
        return torch.tensor(self.far[:count], dtype=torch.int64, device=self.shuffled.device)


def _few_dimensions(points: Tensor, generator: torch.Generator) -> Tensor:
    """Project at random where there are many dimensions: distances stay about what they are."""
    if points.shape[1] <= FEW_DIMENSIONS:
        return points
    return points @ torch.randn(points.shape[1], FEW_DIMENSIONS, generator=generator).to(points.device)


def _square_distance(axes: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.square(axes - point[:, None]).sum(0)


# -------------------------------------------------------------------- the skeleton


@dataclass(frozen=True)
class Truncation:
    """How one head's singular values are used.

    Args:
        rank: how many are kept.
        lift: how much of `Head.lifting` is added to them.
        shift: a constant that is added to all entries, in one column more; 0 for no such column.
    """

    rank: int
    lift: float = 0.0
    shift: float = 0.0

    @property
    def columns(self) -> int:
        """Columns that the factors take."""
        return self.rank + (self.shift != 0.0)


@dataclass(frozen=True, eq=False)
class Head:
    """One head's crossing, `crossing - mean = left diag(sigma) right^T`, truncated; `left` is `[rows, R]`."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    mean: Tensor
    symmetric: bool

    def lifting(self, rank: int) -> Tensor:
        """`[rank, rank]`: what added to `diag(sigma)` raises the peak at each sampled point alike."""
        of_left = _levelled(self.left[:, :rank])
        if self.symmetric:
            signs = self.signs()[:rank]
            return (of_left + signs[:, None] * of_left * signs) / 2
        return (of_left + _levelled(self.right[:, :rank])) / 2

    def signs(self) -> Tensor:
        """Of a symmetric crossing: +1 or -1 as its eigenvalues are."""
        return (self.left * self.right).sum(0).sign()

    def weights(self, truncation: Truncation, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`(W_q, W_k, c)`, with which `phi_q = f(x, y_J) W_q` and `phi_k = f(x_I, y)^T W_k - c`."""
        left, sigma, right = (part[..., : truncation.rank] for part in (self.left, self.sigma, self.right))
        core_q = core_k = torch.diag(sigma.sqrt())
        if truncation.lift:
            core = torch.diag(sigma) + truncation.lift * self.lifting(truncation.rank)
            if self.symmetric:
                signs = self.signs()[: truncation.rank]
                values, vectors = torch.linalg.eigh((core * signs + (core * signs).mT) / 2)
                core_q = vectors * values.abs().sqrt()
                core_k = signs[:, None] * core_q * values.sign()
            else:
                u, s, v = torch.linalg.svd(core)
                core_q, core_k = u * s.sqrt(), v.mT * s.sqrt()
        w_q, w_k = (right / sigma) @ core_q, (left / sigma) @ core_k
        return w_q.to(dtype), w_k.to(dtype), (self.mean @ w_k).to(dtype)


def _levelled(vectors: Tensor) -> Tensor:
    """`M` with which `v M v^T` is nearly the same for all rows `v` of `vectors`, one on average."""
    rows = vectors.float()  # a shape, which nothing needs exactly
    weight = rows.new_ones(len(rows))
    inverse = torch.eye(rows.shape[1], device=rows.device)
    leverage = rows.square().sum(1)
    for _ in range(LEVELLING_STEPS):
        weight = weight * leverage / leverage.mean()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(rows.mT @ (weight[:, None] * rows)))
        leverage = ((rows @ inverse) * rows).sum(1)
    return inverse.to(vectors.dtype) / leverage.mean()


class Skeleton:
    """The crossing of some rows and columns, decomposed per head.

    Args:
        function: the matrix.
        rows: indices of queries.
        columns: indices of keys; the same as `rows` if queries and keys are the same points.
        rank_cap: most singular values that are of use.
        gauge: drop constants of rows: the singular values are those of the crossing with its rows centred.
        asymmetry: how far a matrix may be from symmetric and be taken as such, per head.
        generator: of what is random.

    Attributes:
        heads: left and right singular vectors, and singular values, of each head.
        rank_cap: most singular values that the crossing can supply: a part of its size, all if it is complete.
        is_whole: it is the whole matrix.
        symmetric: it was taken as symmetric, so one strip serves queries and keys.
        low: the lowest value of each row of the crossing, `[H, rows]`.
        high: the highest, likewise.
    """

    def __init__(
        self,
        function: BlockFunction,
        rows: Tensor,
        columns: Tensor,
        rank_cap: int,
        gauge: bool,
        asymmetry: Sequence[float],
        generator: torch.Generator,
    ) -> None:
        self.function, self.rows, self.columns = function, rows, columns
        crossing = function.block(rows, columns, f"{len(rows)} rows and columns")
        self.low, self.high = (end.double() for end in crossing.aminmax(dim=-1))
        sides = list(zip(crossing.shape[1:], function.shape[1:], strict=True))
        self.is_whole = all(part == whole for part, whole in sides)
        self.rank_cap = min(rank_cap, *(part if part == whole else part // OVERSAMPLING for part, whole in sides))
        self.symmetric = function.same and not gauge and _is_symmetric(crossing, asymmetry)
        self.heads: list[Head] = []
        for entries in crossing:
            mean = (
                entries.double().mean(1) if gauge else torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
            )
            left, sigma, right = _largest_singular(
                entries.double() - mean[:, None], self.rank_cap, self.symmetric, generator
            )
            if gauge:
                # Rounding leaves something of a row's constant in small vectors, which is divided by their values.
                right = right - right.mean(0)
            largest = float(sigma[0] + mean.norm() * len(columns) ** 0.5)
            kept = int((sigma > torch.finfo(entries.dtype).eps * largest).sum())  # what is less is rounding
            self.heads.append(Head(left[:, :kept], sigma[:kept], right[:, :kept], mean, self.symmetric))

    def queries(
        self, rows: Tensor, truncations: Sequence[Truncation], out: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Write `phi_q` of some rows into `out`, `[H, rows, rank or more]`; products in `dtype`, or that of `out`."""
        dtype = dtype or out.dtype
        weights = [head.weights(truncation, dtype)[0] for head, truncation in zip(self.heads, truncations, strict=True)]
        y = self.function.y[self.columns]
        for piece in self.function.pieces(len(rows), len(y), "factors of queries"):
            for phi, strip, w in zip(out, self.function(self.function.x[rows[piece]], y), weights, strict=True):
                phi[piece, : w.shape[1]] = strip.to(dtype) @ w
        return out

    def keys(
        self, columns: Tensor, truncations: Sequence[Truncation], out: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Write `phi_k` of some columns into `out`, `[H, columns, the rank or more]`; products as in `queries`."""
        dtype = dtype or out.dtype
        weights = [
            head.weights(truncation, dtype)[1:] for head, truncation in zip(self.heads, truncations, strict=True)
        ]
        x = self.function.x[self.rows]
        for piece in self.function.pieces(len(columns), len(x), "factors of keys"):
            strips = self.function(x, self.function.y[columns[piece]])
            for phi, strip, (w, constant) in zip(out, strips, weights, strict=True):
                phi[piece, : w.shape[1]] = strip.to(dtype).mT @ w - constant
        return out

    def factors(self, truncations: Sequence[Truncation], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`phi_q` and `phi_k` of all queries and keys: float32, padded with zeros, a column at least."""
        heads, seqlen_q, seqlen_k = self.function.shape
        width = max(1, *(truncation.columns for truncation in truncations))
        rows, columns = (torch.arange(length, device=self.function.device) for length in (seqlen_q, seqlen_k))
        phi_q = torch.zeros(heads, seqlen_q, width, device=self.function.device)
        self.queries(rows, truncations, phi_q, dtype)
        if self.symmetric:
            phi_k = phi_q.clone()
            for phi, head, truncation in zip(phi_k, self.heads, truncations, strict=True):
                w_q, w_k, _ = head.weights(truncation, torch.float64)
                phi[:, : truncation.rank] *= (w_q * w_k).sum(0).sign().float()
        else:
            phi_k = self.keys(columns, truncations, phi_q.new_zeros(heads, seqlen_k, width), dtype)
        for h, truncation in enumerate(truncations):
            if truncation.shift:
                phi_q[h, :, truncation.rank], phi_k[h, :, truncation.rank] = truncation.shift, 1.0
        return phi_q, phi_k


# -------------------------------------------------------------------- linear algebra


def _is_symmetric(crossing: Tensor, asymmetry: Sequence[float]) -> bool:
    return all(float((a - a.mT).abs().max()) <= allowed for a, allowed in zip(crossing, asymmetry, strict=True))


def _largest_singular(
    a: Tensor, rank: int, symmetric: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values with their vectors, in float64; of a symmetric matrix, left is right up to signs.

    A large matrix is first projected on the leading part of its range, in its own dtype.
    """
    basis = None
    if min(a.shape) > max(FULL_SVD, 2 * rank):
        basis = _leading_range(a, rank + rank // 8, generator)
        a = basis.mT @ a
        a, basis = (a @ basis if symmetric else a), basis.double()
    a = a.double()
    if symmetric:
        values, left = torch.linalg.eigh((a + a.mT) / 2)
        order = values.abs().argsort(descending=True)[:rank]
        sigma, left = values[order].abs(), left[:, order]
        left = left if basis is None else basis @ left
        return left, sigma, left * values[order].sign()
    left, sigma, right = torch.linalg.svd(a, full_matrices=False)
    left = left if basis is None else basis @ left
    return left[:, :rank], sigma[:rank], right.mT[:, :rank]


def _leading_range(a: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis near the leading left singular vectors: random products and power iterations."""
    start = torch.randn(a.shape[1], rank, dtype=a.dtype, generator=generator).to(a.device)
    basis = torch.linalg.qr(a @ start)[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(a @ torch.linalg.qr(a.mT @ basis)[0])[0]
    return basis
