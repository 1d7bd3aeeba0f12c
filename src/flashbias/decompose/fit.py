"""`Head`: the bias of one head, what of it is read, and its fits by factors, by a table, and by both."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashbias.decompose.bound import certificate, row_spread
from flashbias.decompose.relative import Codes
from flashbias.decompose.split import split
from flashbias.decompose.svd import Factors, NestedSvd, centre_rows, smallest_rank, weighted_low_rank

__all__ = ["Fit", "Head"]

SINGLE_FROM = 1 << 16, 1e-4
"""Entries of a head and tolerance from which factors are found in float32. What is kept is certified in float64."""

SAMPLE_ROWS = 48
"""Rows that are looked at before all are: most ranks of a search are ruled out by these."""


@dataclass(frozen=True, eq=False)
class Fit:
    """One representation of a head that was found.

    Args:
        factors: `[N, R]` and `[M, R]` in the dtype in which they are kept.
        certificate: bound on the output's change, relative to the diameter of the values.
        table: `[T]` or None.
    """

    factors: Factors
    certificate: float
    table: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of the factors."""
        return self.factors.rank


@dataclass(eq=False)
class Head:
    """The bias of one head.

    Args:
        b: `[N, M]`, finite wherever it is read.
        tol: bound on the output's change that its fits must keep.
        mask: booleans `[N, M]`, True where an entry is read; None: everywhere.
        weights: `[N, M]`, not negative: where a fit should be good; None: alike wherever an entry is read.
        calibrated: certify for rows of probabilities proportional to `weights` instead of for all.
        seed: of the random starts.

    Attributes:
        tried: certificate of the best factors of each rank that was looked at.
    """

    b: Tensor
    tol: float
    mask: Tensor | None = None
    weights: Tensor | None = None
    calibrated: bool = False
    seed: int = 0
    tried: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put zeros in place of what nobody reads."""
        self.b = self.b.to(torch.float64)
        if self.mask is not None:
            self.b = self.b.masked_fill(~self.mask, 0.0)
        self.generator = torch.Generator().manual_seed(self.seed)
        single = self.b.numel() >= SINGLE_FROM[0] and self.tol >= SINGLE_FROM[1]
        self._centred = self._centre(self.b).to(torch.float32 if single else torch.float64)
        self._svd = NestedSvd(self._centred, self.generator)
        self._sample = slice(0, None, max(1, len(self.b) // SAMPLE_ROWS))

    # ---------------------------------------------------------------- how good is it

    def certify(self, approximation: Tensor, rows: slice = slice(None)) -> float:
        """Bound on the output's change when these rows of the bias are replaced by `approximation`, `[n, M]`."""
        error = approximation - self.b[rows]
        mask = None if self.mask is None else self.mask[rows]
        if self.calibrated and self.weights is not None:
            return float(_largest_change(error, self._read_weights()[rows]))
        return float(certificate(row_spread(error, mask).amax()))

    def energy(self, fit: Fit) -> float:
        """Share of the squared entries, rows centred, that factors keep. A diagnostic alone."""
        whole = float(self._centred.square().sum())
        if self._is_unweighted():
            kept = float((fit.factors.left.double().square().sum(0) * fit.factors.right.double().square().sum(0)).sum())
            return kept / whole if whole > 0 else 1.0
        lost = float(self._centre(self._realise(fit.factors) - self.b).square().sum())
        return 1.0 - lost / whole if whole > 0 else 1.0

    def extent(self) -> float:
        """Largest spread of a row: how far the bias can move a score against another."""
        return float(row_spread(self.b, self.mask).amax())

    # ---------------------------------------------------------------- fits

    def low_rank(self, max_rank: int, dtype: torch.dtype) -> Fit | None:
        """Find the smallest rank that keeps the tolerance, its factors rounded to `dtype`; None up to `max_rank`."""
        nothing = self._kept(Factors(self.b.new_zeros(len(self.b), 0), self.b.new_zeros(self.b.shape[1], 0)), dtype)
        if nothing is not None or max_rank < 1:
            return nothing

        def accepts(factors: Factors) -> bool:
            return self._kept(factors, dtype) is not None

        found = smallest_rank(self._svd, accepts, max_rank)
        if not self._is_unweighted() and (found is None or found.rank > 1):
            found = smallest_rank(self._weighted, accepts, found.rank - 1 if found else max_rank) or found
        return None if found is None else self._kept(found, dtype)

    def rounded(self, fit: Fit, dtype: torch.dtype, max_rank: int) -> Fit | None:
        """Find factors of a coarser dtype that keep the tolerance: those of `fit`, and columns to make up for rounding.

        What rounding changes is a matrix like any other, large where the first columns are; a few columns of its own
        SVD undo most of it, and what rounding takes from these is smaller by as much again. That takes far fewer
        columns than splitting each factor into parts.
        """
        first = fit.factors.to(dtype)
        if (found := self._kept(first, dtype)) is not None or fit.rank >= max_rank:
            return found
        residual = self._centre(self.b - first.to(self.b.dtype).dense())
        svd = NestedSvd(residual.to(self._centred.dtype), self.generator)

        def more(rank: int) -> Factors:
            columns = svd(rank).to(torch.float64)
            if not self._is_unweighted():
                columns = weighted_low_rank(residual, self._read_weights(), columns)
            return columns

        def accepts(columns: Factors) -> bool:
            return self._kept(first.beside(columns.to(dtype)), dtype) is not None

        columns = smallest_rank(more, accepts, max_rank - fit.rank)
        return None if columns is None else self._kept(first.beside(columns.to(dtype)), dtype)

    def with_table(self, table: Tensor, codes: Codes) -> Fit:
        """Certify a table that is given."""
        none = Factors(self.b.new_zeros(len(self.b), 0), self.b.new_zeros(self.b.shape[1], 0))
        return Fit(none, self.certify(_read(table, codes)), table)

    def near_field(self, codes: Codes, half_width: int, max_rank: int, dtype: torch.dtype) -> Fit | None:
        """Find the smallest rank up to `max_rank` that keeps the tolerance beside a table of a given half width."""
        fits: dict[int, Fit] = {}

        def fitted(rank: int) -> Factors:
            table, factors = split(self.b, codes, half_width, rank, generator=self.generator, mask=self.mask)
            kept = factors.to(dtype)
            fits[rank] = Fit(kept, self.certify(self._realise(kept) + _read(table, codes)), table)
            return factors

        fitted(max_rank)  # if not even this does, nothing smaller need be tried
        if fits[max_rank].certificate > self.tol:
            return None
        found = smallest_rank(fitted, lambda f: fits[f.rank].certificate <= self.tol, max_rank, nested=False)
        return None if found is None else fits[found.rank]

    def best_certificate(self, rank: int, dtype: torch.dtype) -> float:
        """Certificate of the best factors of a rank."""
        if rank not in self.tried:
            self._certified(self._best(rank), dtype)
        return self.tried[rank]

    # ---------------------------------------------------------------- private

    def _centre(self, b: Tensor) -> Tensor:
        """Rows without their mean over what is read, zero elsewhere."""
        if self.mask is None:
            return centre_rows(b)
        return centre_rows(b, self.mask.to(b.dtype)).masked_fill(~self.mask, 0.0)

    def _is_unweighted(self) -> bool:
        return self.mask is None and self.weights is None

    def _read_weights(self) -> Tensor:
        """`[N, M]`: calibration weights where an entry is read; ones without calibration."""
        weights = torch.ones_like(self.b) if self.weights is None else self.weights.to(self.b.dtype)
        return weights if self.mask is None else weights * self.mask

    def _best(self, rank: int) -> Factors:
        return self._svd(rank) if self._is_unweighted() else self._weighted(rank)

    def _weighted(self, rank: int) -> Factors:
        return weighted_low_rank(self._centred.double(), self._read_weights(), self._svd(rank).to(torch.float64))

    def _kept(self, factors: Factors, dtype: torch.dtype) -> Fit | None:
        """The fit, if it keeps the tolerance."""
        sample = Factors(factors.left[self._sample], factors.right).to(dtype)
        if self.certify(self._realise(sample), self._sample) > self.tol:
            return None
        found = self._certified(factors, dtype)
        return found if found.certificate <= self.tol else None

    def _certified(self, factors: Factors, dtype: torch.dtype) -> Fit:
        kept = factors.to(dtype)
        found = Fit(kept, self.certify(self._realise(kept)))
        self.tried[factors.rank] = min(found.certificate, self.tried.get(factors.rank, 1.0))
        return found

    def _realise(self, factors: Factors) -> Tensor:
        return factors.to(self.b.dtype).dense()


def _read(table: Tensor, codes: Codes) -> Tensor:
    """What the attention reads from a table, which it is given in float32."""
    return table.to(torch.float32).to(table.dtype)[codes.index(len(table) // 2)]


def _largest_change(error: Tensor, weights: Tensor) -> Tensor:
    """Largest total variation between rows of probabilities `p` (the weights) and `p exp(error)`, both normalised."""
    tiny = torch.finfo(weights.dtype).tiny
    p = weights / weights.sum(-1, keepdim=True).clamp(min=tiny)
    highest = error.masked_fill(weights == 0, -torch.inf).amax(-1, keepdim=True)
    moved = p * (error - highest.nan_to_num(neginf=0.0)).clamp(max=0.0).exp()
    moved = moved / moved.sum(-1, keepdim=True).clamp(min=tiny)
    return ((moved - p).abs().sum(-1) / 2).amax()
