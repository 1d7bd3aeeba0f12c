"""`compress`: any bias that is there as a tensor to the cheapest form that keeps a promise about the output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.plan import HeadCosts
from flashbias.attention.workload import Workload
from flashbias.decompose.choice import Evidence, Group, Option, bias_of, cheapest_groups, cheapest_of_each, report_of
from flashbias.decompose.fit import Fit
from flashbias.decompose.relative import Codes, find_codes, read_table, trim_tails
from flashbias.decompose.report import NotLowRankError, Report
from flashbias.decompose.request import FACTOR_DTYPES, Request
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__all__ = ["compress"]

NEAR_FIELDS = (1, 4, 16, 64)
"""Half widths of the near field that are tried beside factors."""

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
    heads of some hundred tokens, minutes where a mask or weights ask for weighted fits of high rank; memory is a few
    copies of one head.

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
        table: "auto" tries a relative table, alone and as near field beside factors; "exact" takes the relative table
            that the bias is, whatever it costs (no matrix is kept, and gradients reach its entries); an integer is
            the half width of a near field to use; None forbids tables.
        allow_dense: let heads differ in form, as factors, tables or the matrix that they were, each as is cheapest.
        workload: the attention that the bias is for; default head_dim 64, forward, bfloat16, one batch element. How
            many biases its batch has is taken from `bias`.
        device: whose measured times decide, as in `plan`.
        factor_dtype: torch.float32 or torch.bfloat16; default: bfloat16 where that keeps the promise and is faster.
        seed: of the random starts; the same seed gives the same factors.
        progress: called with the number of heads done, of heads, and what is going on.

    Returns:
        A `FactoredBias` with `ranks` per head (a `MixedBias` where heads differ in form), whose `report` is a `Report`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes that do not fit, entries that are not finite where they are read, a mask without any open
            entry, `tol` outside (0, 1).
        NotImplementedError: `allow_dense` for a bias with batch dimensions.
        NotLowRankError: no representation keeps the promise at less than the cost of the dense bias. It carries the
            report.

    Examples:
        >>> import torch, flashbias as fb
        >>> x = torch.linspace(0, 1, 96)
        >>> bias = fb.compress(torch.exp(-((x[:, None] - x) ** 2) * 20)[None], tol=1e-3, table=None)
        >>> bias.rank < 20, bias.report.certificate <= 1e-3
        (True, True)

    Reference:
        "FlashBias: Fast Computation of Attention with Bias", https://arxiv.org/abs/2505.12044, section 3.2, uses the
        SVD and the energy that it keeps; the bound on the output, the table and the choice by cost are derived in the
        docs.
    """
    started = time.monotonic()
    request = Request.checked(bias, tol, mask, weights, calibrated, max_rank, table, factor_dtype, seed)
    if allow_dense and request.biases > 1:
        raise NotImplementedError(f"allow_dense=True takes one bias per head, got shape {tuple(bias.shape)}")
    search = _Search(request, _Prices.of(request, workload, device), allow_dense, progress or _silent)
    codes = search.places(positions)
    if request.table == "exact":
        return search.table_alone(codes, started)
    if request.table == "auto" and codes is not None:
        search.exact_table(codes)
    search.factors()
    if request.table is not None:
        search.near_fields(codes)
    return search.result(started)


def _silent(done: int, total: int, what: str) -> None:
    """Show nothing."""


# -------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class _Prices:
    """Predicted milliseconds of one head of one bias in each form, for each dtype of factors."""

    costs: dict[torch.dtype, HeadCosts]
    share: float
    longest: int

    @classmethod
    def of(cls, request: Request, workload: Workload | None, device: str) -> _Prices:
        lengths = tuple(request.shape[-2:])
        workload = workload or Workload(request.num_heads, *lengths, head_dim=64, batch=request.biases)
        if (workload.seqlen_q, workload.seqlen_k) != lengths:
            raise ValueError(
                f"workload is for {workload.seqlen_q} queries and {workload.seqlen_k} keys, "
                f"bias has shape {tuple(request.shape)}"
            )
        if workload.batch % request.biases:
            raise ValueError(
                f"workload has a batch of {workload.batch}; it must be a multiple of the {request.biases} biases in "
                f"the batch dimensions of bias, {tuple(request.shape[:-3])}"
            )
        shared = replace(workload, shared_bias=request.biases)
        costs = {dtype: HeadCosts(replace(shared, factor_dtype=dtype), device) for dtype in FACTOR_DTYPES}
        return cls(costs, 1.0 / request.biases, min(lengths))

    @property
    def device(self) -> str:
        """Name of the device that was measured."""
        return self.costs[torch.float32].device

    @property
    def dense(self) -> float:
        """A head that stays a matrix."""
        return self.costs[torch.float32].dense() * self.share

    def factored(self, rank: int, dtype: torch.dtype) -> float:
        """A head with factors alone."""
        return self.costs[dtype].factored(rank) * self.share

    def table(self, length: int, codes: Codes, rank: int, dtype: torch.dtype) -> float:
        """A head with a table, and factors beside it unless the rank is 0."""
        half_width = length // 2 if codes.is_line else None
        return self.costs[dtype].table(length, codes.is_line, half_width, rank) * self.share

    def largest_rank(self, dtype: torch.dtype, bound: float, length: int = 0, codes: Codes | None = None) -> int:
        """Largest rank that costs less than `bound`, 0 if none; costs rise with the rank but for the first few."""

        def pays(rank: int) -> bool:
            return (self.factored(rank, dtype) if codes is None else self.table(length, codes, rank, dtype)) < bound

        few = min(packing.SIX_UP_TO_RANK, self.longest)  # these carry more products than the next ones
        low, high = few, self.longest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if pays(middle) else (low, middle - 1)
        return low if low > few else next((rank for rank in range(few, 0, -1) if pays(rank)), 0)


# -------------------------------------------------------------------- the search


class _Search:
    """Representations that keep the promise: of all heads, or of any if heads `may_differ` in form."""

    def __init__(self, request: Request, prices: _Prices, may_differ: bool, progress: Progress) -> None:
        self.request, self.prices, self.may_differ, self.progress = request, prices, may_differ, progress
        self.options: list[Option] = []
        self.evidence = [Evidence() for _ in range(len(request))]
        self.widest = 0

    # ---------------------------------------------------------------- a table

    def places(self, positions: Tensor | tuple[Tensor, Tensor] | None) -> Codes | None:
        """Codes by which a table could be read: of the caller's places, or found from heads that are not constant."""
        if positions is not None:
            return self.request.places(positions)
        if self.request.table is None or self.request.biases > 1:
            return None
        if self.request.near_width is not None:
            return self.request.line()
        for index in range(len(self.request)):
            extent = self.request.head(index).extent()
            if extent == 0.0:
                continue
            # Hidden entries may follow the rule as well; only if they do, it can be seen from all values.
            values = self.request.values(index)
            found = None if values is None else find_codes(values, 1e-5 * extent)
            if found is not None:
                return found
            if not self.may_differ:
                break
        return None if self.request.mask is None else self.request.line()

    def exact_table(self, codes: Codes) -> None:
        """A table and nothing else, if every head is relative."""
        # One table serves a whole batch, whose biases differ; one with more entries than the matrix saves nothing.
        if self.request.biases > 1 or 2 * codes.half_width >= math.prod(self.request.shape[-2:]):
            return
        fits: list[Fit | None] = []
        for index in range(len(self.request)):
            self.progress(index, len(self.request), f"head {index}: table")
            head = self.request.head(index)
            fits.append(head.with_table(read_table(head.b, codes, head.mask), codes))
            if fits[-1] is None and not self.may_differ:
                return
        self._add("table", self.request.dtypes[0], self._trimmed(fits, codes) if codes.is_line else fits, codes)

    def _trimmed(self, fits: list[Fit | None], codes: Codes) -> list[Fit | None]:
        """The same tables without what is constant at their ends, if they keep the promise still."""
        tables = {head: fit.table for head, fit in enumerate(fits) if fit is not None and fit.table is not None}
        if not tables:
            return fits
        whole = torch.stack(list(tables.values()))
        short = trim_tails(whole, 1e-6 * float(whole.abs().max()))
        trimmed: list[Fit | None] = [None] * len(fits)
        for head, table in zip(tables, short, strict=True):
            trimmed[head] = self.request.head(head).with_table(table, codes)
            if trimmed[head] is None:
                return fits
        return trimmed

    def table_alone(self, codes: Codes | None, started: float) -> FactoredBias | MixedBias:
        """Make the bias as a table and nothing else; its cost is told and does not count."""
        if codes is not None:
            self.exact_table(codes)
        heads = tuple(range(len(self.request)))
        option = next((option for option in self.options if None not in option.fits), None)
        report = self._report((Group(option, heads),), started, refused=option is None)
        if option is None:
            raise NotLowRankError(
                f"table='exact' needs a bias that is relative to tol={self.request.tol:g} in every head and has one "
                f"table for the whole batch; no table gives this one, of shape {tuple(self.request.shape)}",
                report,
            )
        return bias_of((Group(option, heads),), self.request, report)

    # ---------------------------------------------------------------- factors

    def factors(self) -> None:
        """Factors for each head, in each dtype, as far as they cost less than what is known already."""
        bound = min([self.prices.dense, *(sum(option.costs) / len(self.request) for option in self.options)])
        most = {d: min(self.request.max_rank, self.prices.largest_rank(d, bound)) for d in self.request.dtypes}
        self.widest = max(most.values())
        is_last_hope = bound == self.prices.dense
        fits: dict[torch.dtype, list[Fit | None]] = {dtype: [] for dtype in self.request.dtypes}
        for index in range(len(self.request)):
            self.progress(index, len(self.request), f"head {index}: factors")
            for dtype, fit in self._factors_of_head(index, most, is_last_hope).items():
                fits[dtype].append(fit)
        self.progress(len(self.request), len(self.request), "factors found")
        for dtype, found in fits.items():
            self._add("low rank", dtype, found)

    def _factors_of_head(
        self, index: int, most: dict[torch.dtype, int], is_last_hope: bool
    ) -> dict[torch.dtype, Fit | None]:
        """The smallest rank in each dtype, None where it costs too much; notes what was learnt on the way."""
        first, *coarser = self.request.dtypes
        head = self.request.head(index)
        fit = head.low_rank(self.widest, first)
        found = {first: fit}
        for dtype in coarser:
            found[dtype] = None if fit is None else head.rounded(fit, dtype, most[dtype])
        energy = fit.energy if fit is not None else head.explore(self.widest, first) if is_last_hope else 0.0
        self.evidence[index] = Evidence(head.extent(), energy, head.tried)
        return found

    def near_fields(self, codes: Codes | None) -> None:
        """A short table beside factors: that which was asked for, or some where nothing else does."""
        if self.request.biases > 1 or (codes is not None and not codes.is_line):
            return
        codes = codes or self.request.line()
        if self.request.near_width is not None:
            self._near_field(codes, self.request.near_width)
        elif cheapest_groups(self.options, len(self.request), self.prices.dense, allow_dense=False) is None:
            for width in NEAR_FIELDS:
                if width < max(self.request.shape[-2:]) - 1:
                    self._near_field(codes, width)

    def _near_field(self, codes: Codes, width: int) -> None:
        dtype = self.request.dtypes[0]
        length = 2 * width + 1
        others = [sum(o.costs) / len(self.request) for o in self.options if o.form == "table + low rank"]
        most = self.prices.largest_rank(dtype, min([self.prices.dense, *others]), length, codes)
        most = min(self.request.max_rank, most)
        if not most:
            return
        fits: list[Fit | None] = [None] * len(self.request)
        # First the heads whose factors got least far: if one of them fails, no other need be tried.
        reached = [min(found.certificates.values(), default=1.0) for found in self.evidence]
        for done, index in enumerate(sorted(range(len(fits)), key=lambda h: reached[h], reverse=True)):
            self.progress(done, len(fits), f"head {index}: near field of {width}, and factors")
            if self.may_differ and any(option.costs[index] < self.prices.dense for option in self.options):
                continue  # it has a form of its own
            fits[index] = self.request.head(index).near_field(codes, width, most, dtype)
            if fits[index] is None and not self.may_differ:
                return
        self._add("table + low rank", dtype, fits, codes)

    def _add(self, form: str, dtype: torch.dtype, fits: Sequence[Fit | None], codes: Codes | None = None) -> None:
        def cost(fit: Fit | None) -> float:
            if fit is None:
                return math.inf
            if fit.table is None or codes is None:
                return self.prices.factored(fit.rank, dtype)
            return self.prices.table(len(fit.table), codes, fit.rank, dtype)

        self.options.append(Option(form, dtype, fits, [cost(fit) for fit in fits], codes))

    # ---------------------------------------------------------------- the result

    def result(self, started: float) -> FactoredBias | MixedBias:
        """Make the bias with the smallest predicted time, or raise."""
        groups = cheapest_groups(self.options, len(self.request), self.prices.dense, self.may_differ)
        if groups is None:
            raise self._refusal(started)
        return bias_of(groups, self.request, self._report(groups, started))

    def _report(self, groups: Sequence[Group], started: float, refused: bool = False) -> Report:
        used = [group.option.dtype for group in groups if group.option is not None and not refused]
        dtypes = used or self.request.dtypes
        return report_of(
            groups,
            self.evidence,
            self.request,
            dense_ms=self.prices.dense,
            device=self.prices.device,
            break_even_rank=max(self.prices.largest_rank(dtype, self.prices.dense) for dtype in dtypes),
            seconds=time.monotonic() - started,
            refused=refused,
        )

    def _refusal(self, started: float) -> NotLowRankError:
        """Say how far factors get within the ranks that pay, what became of tables, and what may help."""
        request, count = self.request, len(self.request)
        groups, _ = cheapest_of_each([(option, option.costs) for option in self.options], count)
        report = self._report(groups, started, refused=True)
        factors = [option for option in self.options if option.codes is None]
        best = [min(option.costs[head] for option in factors) for head in range(count)]
        lost = [min(self.evidence[h].certificates.values(), default=1.0) for h in range(count) if best[h] == math.inf]
        dear = [
            fit.rank
            for option in factors
            for fit, cost, least in zip(option.fits, option.costs, best, strict=True)
            if fit is not None and self.prices.dense <= cost == least
        ]
        reasons = [] if self.widest else ["not even one column pays"]
        if lost and self.widest:
            reasons.append(f"up to rank {self.widest} factors reach {_range(lost)} in {len(lost)} of {count} heads")
        if dear and self.widest:
            reasons.append(f"{len(dear)} of {count} heads need rank {_range(dear)}, which costs more")
        if not (lost or dear):
            reasons.append("each head has factors that pay, but not all of one dtype")
        tables = [sum(option.costs) for option in self.options if option.codes is not None]
        if tables:
            reasons.append(f"a table costs {min(tables) / self.prices.dense / count:.2g} times as much")
        else:
            reasons.append("no table fits" if request.table is not None else "tables were not allowed")
        message = (
            f"no form keeps tol={request.tol:g} at less than the cost of the dense bias ({self.prices.device}): "
            f"{'; '.join(reasons)}. A larger tol may do; allow_dense=True keeps heads dense where that is cheaper; "
            "print(error.report) has each head"
        )
        return NotLowRankError(message, report)


def _range(values: Sequence[float]) -> str:
    """`0.31 to 0.94`, or the one value that all have."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
