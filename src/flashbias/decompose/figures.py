"""What a page shows of a bias: each head reduced to numbers that can be drawn, one head in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.decompose.bound import certificate, row_spread, spread_allowed
from flashbias.decompose.relative import Codes, codes_of_positions, find_codes, read_table
from flashbias.decompose.report import HeadReport, NotLowRankError, Report
from flashbias.decompose.svd import Factors, centre_rows, truncated_svd, weighted_low_rank
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__all__ = ["Analysis", "HeadFigures", "analyse"]

FULL_SVD = 1024
"""Side up to which all singular values are found; of larger matrices the first `LARGEST`."""

LARGEST = 256

ENERGY = 0.99
"""Share of the squared entries whose rank is reported, because that is how ranks are often chosen."""

LINE = 1e-6
"""Bound up to which a table along a line is taken for the bias itself."""


@dataclass(frozen=True, eq=False)
class HeadFigures:
    """One head, reduced.

    Args:
        report: what `compress` found out about it.
        bias: `[n, m]`: the matrix, of each block of pixels the entry that stands out most; NaN where nothing is read.
        spectrum: singular values of the matrix as it is; where nothing is read, as the chosen form leaves it.
        centred: those of the matrix with each row's mean taken off.
        ranks: ranks for which the SVD of the centred matrix was certified, rising.
        certificates: the bounds at those ranks.
        error: `[n, m]`: distance of the chosen form from the matrix, constants of rows apart, in units of what the
            tolerance allows; of each block the largest.
        error_of: the form that `error` belongs to, in words.
        table: of a form with a table: `[T]` along a line, rows of offsets in a window; else None.
        relative: whether the head depends on the difference of two places alone, and along what; "" if it does not.
        line_certificate: bound of the best table along a line.
    """

    report: HeadReport
    bias: Tensor
    spectrum: Tensor
    centred: Tensor
    ranks: tuple[int, ...]
    certificates: tuple[float, ...]
    error: Tensor
    error_of: str
    table: Tensor | None
    relative: str
    line_certificate: float

    @property
    def energy_rank(self) -> int:
        """Smallest rank that keeps 99 % of the squared entries, rows centred; of a large matrix, of what is known."""
        squares = self.centred.square().cumsum(0)
        return int((squares < ENERGY * squares[-1]).sum()) + 1 if float(squares[-1]) > 0 else 0

    def certificate_at(self, rank: int) -> float:
        """Bound of the SVD at the largest certified rank up to `rank`."""
        within = [c for r, c in zip(self.ranks, self.certificates, strict=True) if r <= rank]
        return within[-1] if within else 1.0

    def rank_for(self, tol: float) -> int | None:
        """Smallest rank whose bound is within `tol`, None if none of those that were certified is."""
        return next((r for r, c in zip(self.ranks, self.certificates, strict=True) if c <= tol), None)


@dataclass(frozen=True, eq=False)
class Analysis:
    """A layer's bias and everything that was found out about it.

    Args:
        name: of the layer; "" for the only one.
        report: of `compress`, or of its refusal.
        heads: in their order.
        stored_bytes: of the chosen form; None after a refusal.
        refusal: why there is no form that pays, "" if there is.
    """

    name: str
    report: Report
    heads: tuple[HeadFigures, ...]
    stored_bytes: int | None
    refusal: str = ""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the matrix in half precision."""
        return 2 * math.prod(self.report.shape)


def analyse(
    name: str,
    bias: Tensor,
    found: FactoredBias | MixedBias | NotLowRankError,
    *,
    mask: Tensor | None = None,
    pixels: int = 256,
    progress: Callable[[int, int, str], None] | None = None,
) -> Analysis:
    """Reduce a bias, and what `compress` made of it, to what can be drawn.

    Costs an SVD per head; needs a few copies of one head.

    Args:
        name: of the layer.
        bias: `[H, N, M]`, as it was given to `compress`.
        found: what `compress` returned, or the refusal that it raised.
        mask: booleans `[N, M]`, True where an entry is read; None: everywhere.
        pixels: longest side of the images.
        progress: called with the number of heads done, of heads, and what is going on.

    Returns:
        The analysis.
    """
    report: Report = found.report
    heads = []
    for head, entry in enumerate(report.heads):
        if progress is not None:
            progress(head, len(report.heads), f"{name} head {head}: figures".lstrip())
        heads.append(_head_figures(bias[head], entry, report.tol, _form(found, head), mask, pixels))
    refused = isinstance(found, NotLowRankError)
    return Analysis(name, report, tuple(heads), None if refused else found.nbytes, str(found) if refused else "")


# -------------------------------------------------------------------- one head


Form = FactoredBias | Tensor | None
"""What stands for one head: factors and table, the matrix itself, or nothing."""


def _form(found: FactoredBias | MixedBias | NotLowRankError, head: int) -> Form:
    if isinstance(found, NotLowRankError):
        return None
    if isinstance(found, FactoredBias):
        return _one_head(found, head)
    for part, group in zip(found.parts, found.heads, strict=True):
        if head in group:
            index = group.index(head)
            return _one_head(part, index) if isinstance(part, FactoredBias) else part[index]
    raise AssertionError("a MixedBias holds every head")


def _one_head(bias: FactoredBias, head: int) -> FactoredBias:
    def pick(tensor: Tensor) -> Tensor:
        return tensor[[head if len(tensor) > 1 else 0]]

    rank = bias.rank if bias.ranks is None else bias.ranks[head]
    width = max(rank, bias.table is None)  # without a table there must be a column, of zeros where the head has none
    return FactoredBias(
        pick(bias.phi_q)[..., :width] * (rank > 0),
        pick(bias.phi_k)[..., :width],
        None if bias.table is None else pick(bias.table),
        bias.code_q,
        bias.code_k,
    )


def _head_figures(
    b: Tensor, entry: HeadReport, tol: float, form: Form, mask: Tensor | None, pixels: int
) -> HeadFigures:
    b = b.to(torch.float64)
    read = b if mask is None else b.masked_fill(~mask, 0.0)
    if form is None:
        approximation, error_of = _refused(read, entry, mask)
    else:
        approximation, error_of = _realised(form, entry, read)
    filled = read if mask is None else _filled(read, approximation, mask)
    svd = _decompose(centre_rows(filled))
    ranks, certificates = _curve(filled, svd, tol, mask)
    codes = find_codes(filled, 1e-5 * entry.extent)
    line = _line_certificate(read, mask)
    return HeadFigures(
        report=entry,
        bias=_reduced(read if mask is None else read.masked_fill(~mask, math.nan), pixels),
        spectrum=_singular_values(filled),
        centred=_values(svd),
        ranks=ranks,
        certificates=certificates,
        error=_error_map(approximation - read, tol, mask, pixels),
        error_of=error_of,
        table=_shaped_table(form, codes),
        relative=str(codes) if codes is not None else "position" if line <= LINE else "",
        line_certificate=line,
    )


def _filled(b: Tensor, approximation: Tensor, mask: Tensor) -> Tensor:
    """The matrix with what nobody reads as the approximation leaves it, up to the constant of the row."""
    weights = mask.to(b.dtype)
    constant = ((b - approximation) * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.where(mask, b, approximation + constant)


def _realised(form: FactoredBias | Tensor, entry: HeadReport, b: Tensor) -> tuple[Tensor, str]:
    """The matrix that a form stands for, and what the form is called."""
    if isinstance(form, Tensor):
        return b, "the matrix itself"
    what = {
        "table": "the table",
        "low rank": f"factors of rank {entry.rank}",
        "table + low rank": f"the table and factors of rank {entry.rank}",
    }[entry.form]
    return form.dense(torch.float64)[0], what


def _refused(b: Tensor, entry: HeadReport, mask: Tensor | None) -> tuple[Tensor, str]:
    """The matrix that a refused form would have stood for: one that costs too much, or factors that came nearest."""
    codes = find_codes(b, 1e-5 * entry.extent) if mask is None else _line(b)
    if entry.form == "table" and codes is not None:
        return read_table(b, codes, mask)[codes.index()], "the table"
    generator = torch.Generator().manual_seed(0)
    what = f"factors of rank {entry.rank}" + (", which do not do" if entry.form == "dense" else "")
    if entry.rank == 0:
        return torch.zeros_like(b), what
    if mask is None:
        return truncated_svd(centre_rows(b).to(torch.float32), entry.rank, generator).dense().double(), what
    weights = mask.to(b.dtype)
    centred = centre_rows(b, weights) * weights
    return weighted_low_rank(centred, weights, truncated_svd(centred, entry.rank, generator)).dense(), what


def _line(b: Tensor) -> Codes:
    """Codes of queries and keys in order."""
    return codes_of_positions(torch.arange(b.shape[0]), torch.arange(b.shape[1]))


def _decompose(b: Tensor) -> Factors:
    rank = min(b.shape) if min(b.shape) <= FULL_SVD else LARGEST
    return truncated_svd(b.to(torch.float32), rank, torch.Generator().manual_seed(0))


def _values(svd: Factors) -> Tensor:
    """Singular values: columns carry their root on either side."""
    return svd.left.double().norm(dim=0) * svd.right.double().norm(dim=0)


def _singular_values(b: Tensor) -> Tensor:
    if min(b.shape) <= FULL_SVD:
        return torch.linalg.svdvals(b.to(torch.float32)).double()
    return _values(_decompose(b))


def _curve(b: Tensor, svd: Factors, tol: float, mask: Tensor | None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Certificates of the SVD at ranks that grow by a quarter or so, and one by one where the tolerance is met."""

    def add(error: Tensor, start: int, stop: int) -> tuple[Tensor, float]:
        part = Factors(svd.left[:, start:stop].double(), svd.right[:, start:stop].double())
        error = error + part.dense()
        return error, float(certificate(row_spread(error, mask).amax()))

    ranks = sorted({round(2 ** (step / 3)) for step in range(3 * 17)})
    bounds: dict[int, float] = {}
    error, done = -b, 0
    for rank in [rank for rank in ranks if rank < svd.rank] + [svd.rank]:
        before = error
        error, bounds[rank] = add(before, done, rank)
        if bounds[rank] <= tol < min((bounds[r] for r in bounds if r < rank), default=1.0):
            failed, met = done, rank
            while met - failed > 1:
                middle = (met + failed) // 2
                at_middle, bounds[middle] = add(before, failed, middle)
                if bounds[middle] <= tol:
                    met = middle
                else:
                    before, failed = at_middle, middle
        done = rank
    return tuple(sorted(bounds)), tuple(bounds[rank] for rank in sorted(bounds))


def _shaped_table(form: Form, codes: Codes | None) -> Tensor | None:
    """The table of a form; that of a window as a picture of its offsets, in 3-D plane below plane."""
    if not isinstance(form, FactoredBias) or form.table is None:
        return None
    table = form.table[0]
    if codes is None or codes.is_line or len(table) != 2 * codes.half_width + 1:
        return table
    if codes.has_class_token:
        table = table[2:-2]
    return table.view(-1, 2 * codes.axes[-1] - 1)


def _line_certificate(b: Tensor, mask: Tensor | None) -> float:
    """Bound of the best table along a line: how far from relative the head is."""
    codes = _line(b)
    table = read_table(b, codes, mask)
    return float(certificate(row_spread(table[codes.index()] - b, mask).amax()))


# -------------------------------------------------------------------- images


def _block(shape: torch.Size, pixels: int) -> int:
    return -(-max(shape) // pixels)


def _reduced(b: Tensor, pixels: int) -> Tensor:
    """One entry for each block: the one furthest from the middle of all, so that a thin diagonal stays visible."""
    block = _block(b.shape, pixels)
    distance = (b - b.nanmedian()).abs().nan_to_num(nan=-1.0)
    _, index = torch.nn.functional.max_pool2d(distance[None], block, ceil_mode=True, return_indices=True)
    return b.flatten()[index[0].flatten()].view(index.shape[1:]).to(torch.float32)


def _error_map(error: Tensor, tol: float, mask: Tensor | None, pixels: int) -> Tensor:
    """Distance from the middle of each row's errors, over half the spread that the tolerance allows."""
    if mask is None:
        high, low = error.amax(-1, keepdim=True), error.amin(-1, keepdim=True)
    else:
        high = error.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)
        low = error.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    share = (error - (high + low) / 2).abs() / (spread_allowed(tol) / 2)
    if mask is not None:
        share = share.masked_fill(~mask, 0.0)
    return torch.nn.functional.max_pool2d(share[None], _block(error.shape, pixels), ceil_mode=True)[0].to(torch.float32)
