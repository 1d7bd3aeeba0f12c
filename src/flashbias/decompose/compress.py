"""`compress`: any bias that is there as a tensor to the cheapest form that keeps a promise about the output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashbias.attention.plan import HeadCosts, Workload
from flashbias.decompose.bound import check_tol
from flashbias.decompose.fit import Fit, Head
from flashbias.decompose.relative import Codes, codes_of_positions, find_codes, read_table, trim_tails
from flashbias.decompose.report import HeadReport, NotLowRankError, Report
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__all__ = ["compress"]

NEAR_FIELDS = (1, 4, 16, 64)
"""Half widths of the near field that are tried beside factors."""

FACTOR_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that factors may have, exact first: float32 costs three to six products, bfloat16 one."""

Progress = Callable[[int, int, str], None]


def compress(
    bias: Tensor,
    tol: float = 1e-3,
    *,
    mask: Tensor | None = None,
    positions: Tensor | tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    calibrated: bool = False,
    max_rank: int | None = None,
    table: str | int | None = "auto",
    allow_dense: bool = False,
    workload: Workload | None = None,
    device: str = "h200",
    factor_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FactoredBias | MixedBias:
    """Replace a dense bias by factors, a relative table, or both, with a bound on what that does to the output.

    Promise: `|out_hat - out| <= tol * (diameter of the values a row can see)`, for every query, key and value, in exact
    arithmetic. It holds because `tanh(delta / 4) <= tol` for every row, with delta the spread of the row's error
    over the entries that are read (constants of a row do not matter to softmax, and are dropped: the log-sum-exp of
    the attention moves by them). Of the representations that keep the promise, the one with the smallest predicted
    time is taken.

    Use it for a bias that no formula covers: a learned table, the output of a network at a fixed input. For one that
    a family of this library covers, the family is exact and costs nothing to make. A call takes seconds for dozens of
    heads of some hundred tokens; memory is a few copies of one head.

    Args:
        bias: `[N, M]`, `[H, N, M]` or `[*batch, H, N, M]`, floating point. Entries that are read must be finite.
        tol: bound on the output's change, in (0, 1).
        mask: booleans that broadcast to the bias, True where an entry is read. Elsewhere the result means nothing:
            pass the same mask (or `is_causal`) to the attention. Factors are then fitted to the open entries alone,
            which can lower the rank.
        positions: integers `[N]` or `[N, D]` (D up to 3), the places of tokens if the bias is relative; a tuple of
            two if queries and keys differ. Default: found from the values.
        weights: not negative, broadcasts to the bias: attention probabilities of a calibration run. Factors are fitted
            where attention is paid.
        calibrated: make the promise for rows of probabilities proportional to `weights` only. Often a much smaller rank
            suffices; the report says so, and it is no bound for other inputs.
        max_rank: largest rank of a head. Default: the largest that is predicted to cost less than the dense bias.
        table: "auto" tries a relative table, alone and as near field beside factors; an integer is the half width of a
            near field to use; None forbids tables.
        allow_dense: keep the heads that do not pay as a matrix, and return a `MixedBias`.
        workload: the attention that the bias is for; default one batch element, head_dim 64, forward, bfloat16.
        device: whose measured times decide, as in `plan`.
        factor_dtype: torch.float32 or torch.bfloat16; default: bfloat16 where that keeps the promise and is faster.
        seed: of the random starts; the same seed gives the same factors.
        progress: called with the number of heads done, of heads, and what is going on.

    Returns:
        A `FactoredBias` with `ranks` per head (a `MixedBias` where heads stay dense), whose `report` is a `Report`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes that do not fit, entries that are not finite where they are read, a mask without any open
            entry, `tol` outside (0, 1).
        NotLowRankError: no representation keeps the promise at less than the cost of the dense bias. It carries the
            report.

    Example:
        >>> import torch, flashbias as fb
        >>> x = torch.linspace(0, 1, 96)
        >>> bias = fb.compress(torch.exp(-((x[:, None] - x) ** 2) * 20)[None], tol=1e-3, table=None)
        >>> bias.rank < 12, bias.report.certificate <= 1e-3
        (True, True)

    Reference:
        "FlashBias: Fast Computation of Attention with Bias", https://arxiv.org/abs/2505.12044, section 3.2, uses the
        SVD and the energy that it keeps; the bound on the output, the table and the choice by cost are derived in the
        docs.
    """
    started = time.monotonic()
    request = _checked(bias, tol, mask, weights, calibrated, max_rank, table, factor_dtype, seed)
    prices = _Prices.of(workload or _default_workload(request), device)
    search = _Search(request, prices, progress or _silent)
    codes = search.places(positions)
    if request.table == "auto" and codes is not None:
        search.exact_table(codes)
    search.factors()
    if request.table is not None:
        search.near_fields(codes)
    return search.choose(allow_dense, started)


def _silent(done: int, total: int, what: str) -> None:
    """Show nothing."""


# -------------------------------------------------------------------- what is asked for


@dataclass(frozen=True, eq=False)
class _Request:
    """Checked arguments. `bias` is `[B, N, M]`, batch and heads in one; what broadcasts is expanded, not copied."""

    bias: Tensor
    shape: torch.Size
    tol: float
    mask: Tensor | None
    weights: Tensor | None
    calibrated: bool
    max_rank: int
    table: str | int | None
    dtypes: tuple[torch.dtype, ...]
    seed: int

    def __len__(self) -> int:
        return len(self.bias)

    @property
    def num_heads(self) -> int:
        return self.shape[-3]

    def head(self, index: int) -> Head:
        """The entries of one head, checked."""
        b = self.bias[index]
        mask = None if self.mask is None else self.mask[index]
        weights = None if self.weights is None else self.weights[index]
        bad = ~torch.isfinite(b) if mask is None else mask & ~torch.isfinite(b)
        if int(bad.sum()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"bias has {int(bad.sum())} entries of head {index} that are not finite, the first at {where}: "
                f"{float(b[where])}; all that are read must be finite (hide the others with mask)"
            )
        if mask is not None and bool(mask.all()):
            mask = None
        return Head(b, self.tol, mask, weights, self.calibrated, self.seed)


def _checked(
    bias: Tensor,
    tol: float,
    mask: Tensor | None,
    weights: Tensor | None,
    calibrated: bool,
    max_rank: int | None,
    table: str | int | None,
    factor_dtype: torch.dtype | None,
    seed: int,
) -> _Request:
    check_tol(tol)
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        found = bias.dtype if isinstance(bias, Tensor) else type(bias)
        raise TypeError(f"bias must be a floating point tensor, got {found}")
    if bias.dim() < 2 or 0 in bias.shape:
        raise ValueError(
            f"bias must be [N, M] or [*batch, H, N, M] without an empty side, got shape {tuple(bias.shape)}"
        )
    shape = bias.shape if bias.dim() > 2 else torch.Size((1, *bias.shape))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
        if not bool(mask.any()):
            raise ValueError("mask has no open entry (True), so there is nothing to fit")
    if weights is not None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"weights must be a floating point tensor, got {getattr(weights, 'dtype', type(weights))}")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError("weights must be finite and not negative")
    if calibrated and weights is None:
        raise ValueError("calibrated=True needs weights, got None")
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 1):
        raise ValueError(f"max_rank must be None or an integer >= 1, got {max_rank!r}")
    if not (
        table is None or table == "auto" or (isinstance(table, int) and not isinstance(table, bool) and table >= 1)
    ):
        raise ValueError(f"table must be 'auto', None or a half width >= 1, got {table!r}")
    if factor_dtype not in (None, *FACTOR_DTYPES):
        raise ValueError(f"factor_dtype must be None, torch.float32 or torch.bfloat16, got {factor_dtype!r}")
    return _Request(
        bias.detach().reshape(-1, *shape[-2:]),
        shape,
        float(tol),
        _expanded("mask", mask, shape),
        _expanded("weights", weights, shape),
        calibrated,
        min(*shape[-2:], max_rank or max(shape)),
        table,
        FACTOR_DTYPES if factor_dtype is None else (factor_dtype,),
        seed,
    )


def _expanded(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`[B, N, M]`, each head expanded when it is asked for."""
    if tensor is None:
        return None
    try:
        return (
            tensor.expand(shape).reshape(-1, *shape[-2:])
            if tensor.dim() > 2
            else tensor.expand(shape[-2:])[None].expand(math.prod(shape[:-2]), -1, -1)
        )
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must broadcast to that of bias, {tuple(shape)}"
        ) from None


def _default_workload(request: _Request) -> Workload:
    batch = math.prod(request.shape[:-3])
    return Workload(request.num_heads, request.shape[-2], request.shape[-1], 64, batch=batch)


# -------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class _Prices:
    """Predicted milliseconds of one head in each form, for each dtype of factors."""

    costs: dict[torch.dtype, HeadCosts]
    device: str
    dense: float

    @classmethod
    def of(cls, workload: Workload, device: str) -> _Prices:
        costs = {dtype: HeadCosts(replace(workload, factor_dtype=dtype), device) for dtype in FACTOR_DTYPES}
        return cls(costs, costs[torch.float32].device, costs[torch.float32].dense())

    def factored(self, rank: int, dtype: torch.dtype) -> float:
        return self.costs[dtype].factored(rank)

    def table(self, length: int, codes: Codes, rank: int, dtype: torch.dtype) -> float:
        return self.costs[dtype].table(length, codes.is_line, length // 2 if codes.is_line else None, rank)

    def largest_rank(self, dtype: torch.dtype, bound: float, length: int = 0, codes: Codes | None = None) -> int:
        """Largest rank that costs less than `bound`, 0 if none; costs are taken to rise with the rank."""
        low, high = 0, min(self.costs[dtype].workload.seqlen_q, self.costs[dtype].workload.seqlen_k)
        while low < high:
            middle = (low + high + 1) // 2
            cost = self.factored(middle, dtype) if codes is None else self.table(length, codes, middle, dtype)
            low, high = (middle, high) if cost < bound else (low, middle - 1)
        return low


# -------------------------------------------------------------------- the search


@dataclass(frozen=True, eq=False)
class _Option:
    """One form for all heads: a fit for each (None: it has none) and its cost."""

    form: str
    dtype: torch.dtype
    fits: list[Fit | None]
    costs: list[float]
    codes: Codes | None = None

    @property
    def cost(self) -> float:
        return sum(self.costs)

    @property
    def is_complete(self) -> bool:
        return all(fit is not None for fit in self.fits)


class _Search:
    """Representations of all heads that keep the promise, and the choice among them."""

    def __init__(self, request: _Request, prices: _Prices, progress: Progress) -> None:
        self.request, self.prices, self.progress = request, prices, progress
        self.options: list[_Option] = []
        self.tried: list[dict[int, float]] = [{} for _ in range(len(request))]
        self.extents = [0.0] * len(request)
        self.energies = [0.0] * len(request)

    # ---------------------------------------------------------------- a table

    def places(self, positions: Tensor | tuple[Tensor, Tensor] | None) -> Codes | None:
        """Codes by which a table could be read: those of the caller's places, or found from the first head."""
        if positions is not None:
            return _codes_of(positions, self.request.shape)
        if self.request.table is None or self._is_batched():
            return None
        head = self.request.head(0)
        # Entries that nobody reads are zeros here and would hide what is relative: then only a line is tried.
        return find_codes(head.b, 1e-5 * head.extent()) if head.mask is None else _line(self.request.shape)

    def exact_table(self, codes: Codes) -> None:
        """A table and nothing else, if every head is relative."""
        if self._is_batched():
            return  # one table serves the whole batch, and these biases differ
        tables: list[Tensor] = []
        fits: list[Fit | None] = []
        for index in range(len(self.request)):
            self.progress(index, len(self.request), f"head {index}: table")
            head = self.request.head(index)
            tables.append(read_table(head.b, codes, head.mask))
            fit = head.with_table(tables[-1], codes)
            if fit.certificate > self.request.tol:
                return
            fits.append(fit)
        if codes.is_line:
            stacked = torch.stack(tables)
            trimmed = trim_tails(stacked, 1e-6 * float(stacked.abs().max()))
            if trimmed.shape != stacked.shape:
                fits = [self.request.head(h).with_table(table, codes) for h, table in enumerate(trimmed)]
        self._add("table", self.request.dtypes[0], fits, codes)

    # ---------------------------------------------------------------- factors

    def factors(self) -> None:
        """Factors for each head, in each dtype, as far as they cost less than what is known already."""
        bound = min([self.prices.dense, *(option.cost / len(self.request) for option in self.options)])
        most = {dtype: min(self.request.max_rank, self.prices.largest_rank(dtype, bound)) for dtype in FACTOR_DTYPES}
        fits: dict[torch.dtype, list[Fit | None]] = {dtype: [] for dtype in self.request.dtypes}
        for index in range(len(self.request)):
            self.progress(index, len(self.request), f"head {index}: factors")
            for dtype, fit in self._factors_of_head(index, most).items():
                fits[dtype].append(fit)
        self.progress(len(self.request), len(self.request), "factors found")
        for dtype, found in fits.items():
            self._add("low rank", dtype, found)

    def _factors_of_head(self, index: int, most: dict[torch.dtype, int]) -> dict[torch.dtype, Fit | None]:
        """The smallest rank in each dtype, None where it costs too much; notes what was learnt on the way."""
        first, *coarser = self.request.dtypes
        head = self.request.head(index)
        widest = max(most[dtype] for dtype in self.request.dtypes)
        fit = head.low_rank(widest, first)
        found: dict[torch.dtype, Fit | None] = {first: fit if fit is not None and fit.rank <= most[first] else None}
        self.energies[index] = 0.0 if fit is None else head.energy(fit)
        for dtype in coarser:
            found[dtype] = None if fit is None else head.rounded(fit, dtype, most[dtype])
        if fit is None:
            for rank in {widest >> 4, widest >> 2, widest} - {0}:
                head.best_certificate(rank, first)
        self.tried[index] = dict(sorted(head.tried.items()))
        self.extents[index] = head.extent()
        return found

    def near_fields(self, codes: Codes | None) -> None:
        """A short table beside factors, where factors alone do not do."""
        if self._is_batched() or (codes is not None and not codes.is_line):
            return
        asked = isinstance(self.request.table, int)
        if not asked and any(option.is_complete and option.cost < self._dense_cost() for option in self.options):
            return
        widths = (self.request.table,) if isinstance(self.request.table, int) else NEAR_FIELDS
        for width in widths:
            if width < max(self.request.shape[-2:]) - 1:
                self._near_field(codes or _line(self.request.shape), width)

    def _near_field(self, codes: Codes, width: int) -> None:
        dtype = self.request.dtypes[0]
        length = 2 * width + 1
        bound = min(
            [self.prices.dense, *(o.cost / len(self.request) for o in self.options if o.form.startswith("table +"))]
        )
        most = min(self.request.max_rank, self.prices.largest_rank(dtype, bound, length, codes))
        fits: list[Fit | None] = []
        for index in range(len(self.request)):
            self.progress(index, len(self.request), f"head {index}: near field of {width}, and factors")
            fits.append(self.request.head(index).near_field(codes, width, most, dtype) if most else None)
            if fits[-1] is None:
                return
        self._add("table + low rank", dtype, fits, codes)

    def _is_batched(self) -> bool:
        return len(self.request) != self.request.num_heads

    def _dense_cost(self) -> float:
        return self.prices.dense * len(self.request)

    def _add(self, form: str, dtype: torch.dtype, fits: Sequence[Fit | None], codes: Codes | None = None) -> None:
        costs = []
        for fit in fits:
            if fit is None:
                costs.append(math.inf)
            elif fit.table is None or codes is None:
                costs.append(self.prices.factored(fit.rank, dtype))
            else:
                costs.append(self.prices.table(len(fit.table), codes, fit.rank, dtype))
        self.options.append(_Option(form, dtype, list(fits), costs, codes))

    # ---------------------------------------------------------------- choice

    def choose(self, allow_dense: bool, started: float) -> FactoredBias | MixedBias:
        """Take the cheapest option, or groups of heads in different forms."""
        complete = [option for option in self.options if option.is_complete]
        best = min(complete, key=lambda option: option.cost, default=None)
        if best is not None and best.cost >= self._dense_cost():
            best = None
        if allow_dense:
            kept = self._dense_heads(best)
            if kept is not None:
                return self._mixed(*kept, started)
        if best is None:
            raise self._refusal(started)
        report = self._report(best, None, started)
        return _assemble(best, list(range(len(self.request))), self.request, report)

    def _dense_heads(self, best: _Option | None) -> tuple[_Option, list[int]] | None:
        """The option, and the heads to keep dense beside it, that are cheaper than the best option for all heads."""
        if len(self.request) != self.request.num_heads:
            raise NotImplementedError(
                f"allow_dense=True takes one bias per head, got shape {tuple(self.request.shape)} with batch dimensions"
            )
        cheapest, found = (math.inf if best is None else best.cost), None
        for option in self.options:
            heads = [h for h, cost in enumerate(option.costs) if cost >= self.prices.dense]
            cost = sum(min(cost, self.prices.dense) for cost in option.costs)
            if heads and cost < cheapest:
                cheapest, found = cost, (option, heads)
        return found

    def _mixed(self, option: _Option, dense_heads: list[int], started: float) -> MixedBias:
        report = self._report(option, dense_heads, started)
        factored = [h for h in range(len(self.request)) if h not in dense_heads]
        matrix = self.request.bias[dense_heads]
        if self.request.mask is not None:
            matrix = matrix.masked_fill(~self.request.mask[dense_heads], 0.0)
        if not factored:
            return MixedBias((matrix,), (tuple(dense_heads),), report)
        part = _assemble(option, factored, self.request, None)
        return MixedBias((part, matrix), (tuple(factored), tuple(dense_heads)), report)

    def _refusal(self, started: float) -> NotLowRankError:
        nearest = self.options[0]
        report = self._report(nearest, None, started)
        lost = [h for h, cost in enumerate(nearest.costs) if cost >= self.prices.dense]
        most = max((max(tried, default=0) for tried in (self.tried[h] for h in lost)), default=0)
        message = (
            f"no form keeps tol={self.request.tol:g} at less than the cost of the dense bias ({self.prices.device}): "
        )
        if most:
            worst = max((min(tried.values()) for tried in (self.tried[h] for h in lost) if tried), default=0.0)
            message += f"{len(lost)} of {len(self.request)} heads need more than rank {most}, "
            message += f"where certificates reach {worst:.2g}"
        else:
            message += "not even one column pays"
        message += "; " + ("no table fits" if self.request.table is not None else "tables were not allowed")
        message += "; a larger tol may do, allow_dense=True keeps such heads dense; print(error.report) has each head"
        return NotLowRankError(message, report)

    def _report(self, option: _Option, dense_heads: list[int] | None, started: float) -> Report:
        entries = []
        for index, (fit, cost) in enumerate(zip(option.fits, option.costs, strict=True)):
            tried = self.tried[index]
            is_dense = fit is None or (dense_heads is not None and index in dense_heads)
            keeps_dense = dense_heads is not None and is_dense
            entries.append(
                HeadReport(
                    head=index,
                    form="dense" if is_dense else option.form,
                    rank=max(tried, default=0) if fit is None else fit.rank,
                    certificate=0.0
                    if keeps_dense
                    else min(tried.values(), default=1.0)
                    if fit is None
                    else fit.certificate,
                    cost_ms=self.prices.dense if is_dense else cost,
                    dense_ms=self.prices.dense,
                    extent=self.extents[index],
                    energy=1.0 if fit is None or fit.table is not None else self.energies[index],
                    certificates=tried,
                )
            )
        codes = option.codes
        length = next((len(fit.table) for fit in option.fits if fit is not None and fit.table is not None), 0)
        return Report(
            tol=self.request.tol,
            shape=tuple(self.request.shape),
            heads=tuple(entries),
            codes="" if codes is None else str(codes),
            table_entries=length,
            factor_dtype=str(option.dtype).removeprefix("torch."),
            break_even_rank=self.prices.largest_rank(option.dtype, self.prices.dense),
            device=self.prices.device,
            certified_for="probabilities like the calibration's"
            if self.request.calibrated
            else "every query, key and value",
            seconds=time.monotonic() - started,
        )


def _codes_of(positions: Tensor | tuple[Tensor, Tensor], shape: torch.Size) -> Codes:
    """Check the caller's places and number them."""
    pair = positions if isinstance(positions, tuple) else (positions, positions)
    for name, places, length in zip(("queries", "keys"), pair, shape[-2:], strict=True):
        if not isinstance(places, Tensor) or places.is_floating_point() or places.dtype == torch.bool:
            found = getattr(places, "dtype", type(places))
            raise TypeError(f"positions of {name} must be an integer tensor, got {found}")
        if places.dim() not in (1, 2) or len(places) != length or (places.dim() == 2 and not 1 <= places.shape[1] <= 3):
            raise ValueError(
                f"positions of {name} must be [{length}] or [{length}, 1 to 3], got shape {tuple(places.shape)}"
            )
    return codes_of_positions(*pair)


def _line(shape: torch.Size) -> Codes:
    """Codes of queries and keys in order, from 0."""
    return codes_of_positions(torch.arange(shape[-2]), torch.arange(shape[-1]))


# -------------------------------------------------------------------- assembly


def _assemble(option: _Option, heads: list[int], request: _Request, report: Report | None) -> FactoredBias:
    """Stack the heads' factors, padded to the widest, and their tables."""
    fits = [option.fits[h] for h in heads]
    found = [fit for fit in fits if fit is not None]
    assert len(found) == len(fits), "an option is assembled from heads that have a fit"
    ranks = [fit.rank for fit in found]
    has_table = found[0].table is not None
    width = max(ranks) if has_table else max(1, *ranks) if len(ranks) > 1 else max(1, ranks[0])
    device = request.bias.device

    def stacked(side: str, length: int) -> Tensor:
        out = torch.zeros(len(found), length, width, dtype=option.dtype, device=device)
        for row, fit in zip(out, found, strict=True):
            row[:, : fit.rank] = getattr(fit.factors, side)
        return out if len(request) == request.num_heads else out.reshape(*request.shape[:-2], length, width)

    table, code_q, code_k = None, None, None
    if has_table and option.codes is not None:
        table = torch.stack([fit.table for fit in found if fit.table is not None]).to(torch.float32)
        if not option.codes.is_positions:
            code_q, code_k = option.codes.code_q, option.codes.code_k
    per_head = (
        torch.tensor(ranks).reshape(-1, request.num_heads if len(request) != request.num_heads else len(found)).amax(0)
    )
    uniform = bool((per_head == width).all())
    return FactoredBias(
        stacked("left", request.shape[-2]),
        stacked("right", request.shape[-1]),
        table,
        code_q,
        code_k,
        None if uniform else per_head.tolist(),
        report,
    )
