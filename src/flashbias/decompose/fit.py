"""`Head`: the bias of one head, what of it is read, and its fits by factors, by a table, and by both."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from flashbias.decompose.bound import certificate, row_spread, spread_allowed
from flashbias.decompose.relative import Codes
from flashbias.decompose.split import split
from flashbias.decompose.svd import Factors, NestedSvd, centre_rows, smallest_rank, weighted_low_rank

__all__ = ["Fit", "Head"]

SINGLE_FROM = 1 << 16, 1e-4
"""Entries of a head and tolerance from which factors are found in float32. What is kept is certified in float64."""

SAMPLE_ROWS = 48
"""Rows that are looked at before all are: most ranks of a search are ruled out by these."""


UNDERESTIMATE = 1.5
"""The square of the last singular value that a randomised range finds may be too small by this factor."""


@dataclass(frozen=True, eq=False)
class Fit:
    """One representation of a head that was found.

    Args:
        factors: `[N, R]` and `[M, R]` in the dtype in which they are kept.
        certificate: bound on the output's change, relative to the diameter of the values.
        table: `[T]` or None.
        energy: share of the squared entries, rows centred, that is kept. A diagnostic alone.
    """

    factors: Factors
    certificate: float
    table: Tensor | None = None
    energy: float = 1.0

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
        self._weighted_fits: dict[int, Factors] = {}
        self._sample = slice(0, None, max(1, len(self.b) // SAMPLE_ROWS))

    @cached_property
    def _centred(self) -> Tensor:
        single = self.b.numel() >= SINGLE_FROM[0] and self.tol >= SINGLE_FROM[1]
        return self._centre(self.b).to(torch.float32 if single else torch.float64)

    @cached_property
    def _svd(self) -> NestedSvd:
        return NestedSvd(self._centred, self.generator)

    # ---------------------------------------------------------------- how good is it

    def certify(self, approximation: Tensor, rows: slice = slice(None)) -> float:
        """Bound on the output's change when these rows of the bias are replaced by `approximation`, `[n, M]`."""
        error = approximation - self.b[rows]
        mask = None if self.mask is None else self.mask[rows]
        if self.calibrated and self.weights is not None:
            return float(_largest_change(error, self._read_weights()[rows]))
        return float(certificate(row_spread(error, mask).amax()))

    def extent(self) -> float:
        """Largest spread of a row: how far the bias can move a score against another."""
        return float(row_spread(self.b, self.mask).amax())

    # ---------------------------------------------------------------- fits

    def low_rank(self, max_rank: int, dtype: torch.dtype) -> Fit | None:
        """Find the smallest rank that keeps the tolerance, its factors rounded to `dtype`; None up to `max_rank`."""
        nothing = self._kept(self._no_factors(), dtype)
        if nothing is not None or max_rank < 1:
            return nothing

        def accepts(factors: Factors) -> bool:
            return self._kept(factors, dtype) is not None

        if self._is_unweighted():
            found = smallest_rank(self._svd, accepts, max_rank, at_least=self._at_least)
        else:
            found = smallest_rank(self._svd, accepts, max_rank)
            if found is None or found.rank > 1:
                narrower = found.rank - 1 if found else max_rank
                found = smallest_rank(self._weighted, accepts, narrower, nested=False) or found
        fit = None if found is None else self._kept(found, dtype)
        return None if fit is None else replace(fit, energy=self._energy(fit.factors))

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

        columns = smallest_rank(more, accepts, max_rank - fit.rank, nested=self._is_unweighted())
        return None if columns is None else self._kept(first.beside(columns.to(dtype)), dtype)

    def with_table(self, table: Tensor, codes: Codes) -> Fit | None:
        """Take a table that is given, if it keeps the tolerance."""
        fit = Fit(self._no_factors(), self.certify(_read(table, codes)), table)
        return fit if fit.certificate <= self.tol else None

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

    def explore(self, rank: int, dtype: torch.dtype) -> float:
        """Certify the best factors of a rank and of some below it; the share of energy that the widest keep."""
        for some in {rank >> 4, rank >> 2, rank} - {0}:
            self._certified(self._best(some), dtype)
        return self._energy(self._best(rank))

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
        if rank == 0:
            return self._no_factors()
        return self._svd(rank) if self._is_unweighted() else self._weighted(rank)

    def _weighted(self, rank: int) -> Factors:
        if rank not in self._weighted_fits:
            start = self._svd(rank).to(torch.float64)
            self._weighted_fits[rank] = weighted_low_rank(self._centred.double(), self._read_weights(), start)
        return self._weighted_fits[rank]

    def _no_factors(self) -> Factors:
        return Factors(self.b.new_zeros(len(self.b), 0), self.b.new_zeros(self.b.shape[1], 0))

    def _energy(self, factors: Factors) -> float:
        """Share of the squared entries, rows centred, that factors keep."""
        whole = float(self._centred.double().square().sum())
        if whole == 0.0:
            return 1.0
        if self._is_unweighted():
            return float(factors.energies().sum()) / whole
        return 1.0 - float(self._centre(self._realise(factors) - self.b).square().sum()) / whole

    def _at_least(self, factors: Factors) -> int:
        """A rank below which no factors keep the tolerance, judged from the leading ones.

        A centred row of spread d has a mean square of at most d^2 / 4. So an error that keeps the tolerance has at
        most a certain energy, and each further column takes no more off it than the last one did.
        """
        energies = factors.energies()
        allowed = self.b.numel() * spread_allowed(self.tol) ** 2 / 4.0
        missing = float(self._centred.double().square().sum() - energies.sum()) - allowed
        last = UNDERESTIMATE * float(energies[-1])
        return factors.rank + (math.ceil(missing / last) if missing > 0.0 < last else 1)

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
