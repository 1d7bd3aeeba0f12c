"""A function of two coordinates as factors, by crosses: some of its rows, some of its columns, and nothing else.

`Skeleton` turns sampled rows and columns into factors, with O((N + M) R) evaluations and memory. Here their number is
raised until the tolerance is met with at most a quarter as many columns, and it is made sure that it is met: the rows
and entries on which that is measured took part in nothing before. If it is not met there, those where it is not join
the ones on which rank and lift are chosen (`probe.py`), and the choice is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flashbias.decompose.blocks import BlockFunction
from flashbias.decompose.bound import certificate, check_tol, row_spread
from flashbias.decompose.probe import Goal, Probe, View, extremes, fewest_columns
from flashbias.decompose.report import NotLowRankError
from flashbias.decompose.skeleton import OVERSAMPLING, Pivots, Skeleton, Truncation
from flashbias.factored import FactoredBias

__all__ = ["CrossReport", "compress_function"]

FIRST_SAMPLE = 256

PROBE_ROWS = 256
PROBE_SIDE = 1024
"""Rank and lift are chosen on some rows, at random columns and where they are highest or lowest, and on the entries
where more random rows and columns cross."""

FRESH_ROWS = 128
FRESH_ENTRIES = 1_000_000
FRESH_BLOCK = 32
"""The check compares that many rows or more, whole, and that many entries in small blocks all over."""

MARGIN = 0.85
"""Part of the tolerance that the choice may use up; less by this factor after each check that fails."""

STANDS_OUT = 3.0
"""Rows are named as worst if their error is so many times the median row's. A kink that every row has is no reason:
naming the worst of many equals would crowd the sample in some places, and cost columns everywhere."""

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class CrossReport:
    """How `compress_function` found its factors, and how far they are from the function where nothing had looked.

    Tuples have one entry per head. An error is `phi_q phi_k^T - f`; with `gauge` or relative to the output, up to the
    constant per row that makes it smallest. In the report of a refusal it is measured on entries that were used for
    choosing, and there are no fresh ones.

    Args:
        shape: `(H, N, M)`.
        tol: the tolerance asked for.
        relative_to: what it is relative to, "range" or "output".
        gauge: whether constants of rows were dropped.
        ranks: columns of each head.
        lifts: what was added to the singular values that were kept.
        value_range: largest minus smallest value that was seen; with `gauge`, the largest such difference in a row.
        limits: the error that `tol` allows.
        max_error: largest absolute error of a fresh entry.
        rms_error: root of the mean squared error of the fresh rows.
        certificate_quantiles: of the bound `tanh(spread / 4)` of the fresh rows, at 0.5, 0.9, 0.99 and 1. An estimate:
            with n fresh rows and 95 % confidence, at most 3/n of all rows are worse than the last.
        fresh_rows: how many rows were compared in every entry.
        fresh_entries: how many entries were compared, those of the rows included, per head.
        sample: number of rows and of columns that the factors were made from.
        evaluations: pairs of coordinates at which the function was asked, all in all.
        seconds: time taken.
    """

    shape: tuple[int, int, int]
    tol: float
    relative_to: str
    gauge: bool
    ranks: tuple[int, ...]
    lifts: tuple[float, ...]
    shifts: tuple[float, ...]
    value_range: tuple[float, ...]
    limits: tuple[float, ...]
    max_error: tuple[float, ...]
    rms_error: tuple[float, ...]
    certificate_quantiles: tuple[tuple[float, ...], ...]
    fresh_rows: int
    fresh_entries: int
    sample: tuple[int, int]
    evaluations: int
    seconds: float

    @property
    def is_met(self) -> bool:
        """Whether each head keeps its limit."""
        return all(error <= limit for error, limit in zip(self.max_error, self.limits, strict=True))

    def __str__(self) -> str:
        """One line for all, one for each head."""
        lines = [
            f"function {'×'.join(map(str, self.shape))}, tol {self.tol:g} of the {self.relative_to}: "
            f"{self.evaluations:,} evaluations, {self.seconds:.1f} s; {self.fresh_entries:,} fresh entries",
            f"{'head':>5} {'rank':>5} {'max error':>10} {'of range':>9} {'rms error':>10} {'certificate':>11}",
        ]
        for head, rank in enumerate(self.ranks):
            width = self.value_range[head]
            share = self.max_error[head] / width if width else 0.0
            lines.append(
                f"{head:>5} {rank:>5} {self.max_error[head]:>10.3g} {share:>9.2%} {self.rms_error[head]:>10.3g} "
                f"{self.certificate_quantiles[head][-1]:>11.2g}"
            )
        return "\n".join(lines)


def compress_function(
    f: Callable[[Tensor, Tensor], Tensor],
    q_coords: Tensor,
    k_coords: Tensor | None = None,
    *,
    tol: float = 0.01,
    num_heads: int = 1,
    relative_to: Literal["range", "output"] = "range",
    gauge: bool | None = None,
    max_rank: int | None = None,
    max_bytes: int = 5 << 29,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> FactoredBias:
    """Factor a bias that is given as a function of coordinates, without ever forming it.

    Formula: `b[h, i, j] = f(q_coords[i], k_coords[j])[h]`, approximated by `phi_q phi_k^T` of the smallest rank found.

    Use it where the N×M matrix is too large to form; for a matrix that exists, `compress` certifies what this can only
    estimate. Cost: O((N + M) R) memory, about `8 (N + M) R` evaluations and `16 (N + M) R^2` operations. Smooth
    functions need few columns; one with a kink at x = y, such as the distance, needs hundreds.

    No number of samples can bound an error everywhere. `tol` is met on rows that are drawn at random after all
    choices are made, every entry of them: at least 128 rows and a million entries, or all there are.

    Args:
        f: takes coordinates `[n, D]` and `[m, D]`, in the dtype and on the device of those given, and returns `[n,
            m]`, or
            `[H, n, m]`. It is called on thin blocks of at most four million entries, without gradients.
        q_coords: `[N, D]`, floating point or integers.
        k_coords: `[M, D']`; default those of the queries. A symmetric function then takes half the time.
        tol: the tolerance, in (0, 1); what of, `relative_to` says.
        num_heads: H.
        relative_to: "range": the largest error of an entry is at most `tol` times the largest minus the smallest
            value of the head. "output": each row keeps `tanh(spread / 4) <= tol`, the bound on the change of the
            attention output relative to the diameter of the values (`flashbias.decompose.bound`).
        gauge: drop constants of rows, which no softmax sees. That saves one column, more where the function has a
            kink, and
            moves `lse` by those constants. The error is then counted up to a constant per row. Default: only for
            "output", since "range" speaks of the entries themselves.
        max_rank: most columns a head may have; default as many as take less memory than the matrix.
        max_bytes: what may be allocated at the peak; default 2.5 GiB.
        seed: of the samples. The global generator is not touched.
        progress: called as `progress(done, total, text)`.

    Returns:
        Float32 factors `[H, N, R]` and `[H, M, R]`, contiguous, with `ranks` where heads differ, and a `CrossReport` as
        their `report`.

    Raises:
        NotLowRankError: the tolerance cannot be met with `max_rank` columns, in `max_bytes`, or in float32; its report
            has the best that was reached.
        TypeError: `f` returns no floating point tensor, coordinates are no real numbers, or an argument is of the
            wrong type.
        ValueError: `tol` outside (0, 1), shapes that do not fit, values that are not finite in float32.

    Examples:
        >>> import torch
        >>> from flashbias.decompose.cross import compress_function
        >>> x = torch.linspace(0.0, 1.0, 2000, dtype=torch.float64)[:, None]
        >>> bias = compress_function(lambda x, y: torch.exp(-4.0 * (x - y.mT) ** 2), x, tol=1e-3)
        >>> bias.shape, bias.rank < 8, bias.report.max_error[0] <= 1e-3
        (torch.Size([1, 2000, 2000]), True, True)

    Reference:
        Bebendorf, Approximation of boundary element matrices, https://doi.org/10.1007/PL00005410; Goreinov,
        Tyrtyshnikov and Zamarashkin, A theory of pseudoskeleton approximations,
        https://doi.org/10.1016/S0024-3795(96)00301-1.
    """
    goal = _checked_goal(tol, relative_to, gauge, max_rank, max_bytes)
    heads = _checked_integer(num_heads, "num_heads", 1)
    generator = torch.Generator().manual_seed(_checked_integer(seed, "seed", 0))
    function = BlockFunction(f, q_coords, q_coords if k_coords is None else k_coords, heads, progress)
    return _Search(function, goal, generator).run()


def _checked_goal(tol: float, relative_to: str, gauge: bool | None, max_rank: int | None, max_bytes: int) -> Goal:
    if relative_to not in ("range", "output"):
        raise ValueError(f"relative_to must be 'range' or 'output', got {relative_to!r}")
    if gauge is not None and not isinstance(gauge, bool):
        raise TypeError(f"gauge must be True, False or None, got {gauge!r}")
    if max_rank is not None:
        _checked_integer(max_rank, "max_rank", 1)
    _checked_integer(max_bytes, "max_bytes", 1)
    gauge = relative_to == "output" if gauge is None else gauge
    return Goal(check_tol(tol), relative_to, gauge, max_rank, max_bytes)


def _checked_integer(value: int, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


# -------------------------------------------------------------------- the check


@dataclass(frozen=True, eq=False)
class _Errors:
    """What was measured, per head.

    Attributes:
        rows: how many rows were compared whole.
        entries: how many entries were compared, all in all.
        spread: `[H, rows]`, of the error in each of these rows.
        largest: `[H]`, as the goal counts.
        rms: `[H]`, likewise.
        suspects: for each probe, rows and columns that it had better include.
    """

    rows: int
    entries: int
    spread: Tensor
    largest: Tensor
    rms: Tensor
    suspects: list[tuple[Tensor, Tensor]]


def _errors_of_rows(function: BlockFunction, goal: Goal, rows: Tensor, phi_q: Tensor, phi_k: Tensor) -> _Errors:
    """Compare all entries of some rows."""
    x, left, seqlen_k = function.x[rows], phi_q[:, rows].double(), len(function.y)
    found: list[tuple[Tensor, ...]] = []
    for piece in function.pieces(seqlen_k, len(rows), "fresh rows"):
        error = left @ phi_k[:, piece].double().mT - function(x, function.y[piece])
        low, high, sums = error.min(-1), error.max(-1), (error.sum(-1), error.square().sum(-1))
        found.append((low[0], low[1] + piece.start, high[0], high[1] + piece.start, *sums))
    low, low_at, high, high_at, total, square = (torch.stack(part) for part in zip(*found, strict=True))
    ends = [low_at.gather(0, low.argmin(0)[None]), high_at.gather(0, high.argmax(0)[None])]
    low, high = low.amin(0), high.amax(0)
    square = square.sum(0) / seqlen_k
    if not goal.by_entry:
        square = (square - (total.sum(0) / seqlen_k).square()).clamp(min=0.0)
    return _Errors(
        rows=len(rows),
        entries=len(rows) * seqlen_k,
        spread=high - low,
        largest=goal.of_rows(low, high).amax(1),
        rms=square.mean(1).sqrt(),
        suspects=[(rows, torch.cat(ends).flatten())],
    )


def _largest_all_over(
    function: BlockFunction, phi_q: Tensor, phi_k: Tensor, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`[H]`, the largest error in small blocks at random rows and columns, and the rows and columns of the worst."""
    count = -(-FRESH_ENTRIES // FRESH_BLOCK**2)
    rows, columns = (
        torch.randint(length, (count, FRESH_BLOCK), generator=generator).to(function.device)
        for length in function.shape[1:]
    )
    largest = torch.stack(
        [
            (phi_q[:, i].double() @ phi_k[:, j].double().mT - function(function.x[i], function.y[j])).abs().amax((1, 2))
            for i, j in zip(rows, columns, strict=True)
        ]
    )
    worst = int(largest.amax(1).argmax())
    return largest.amax(0), (rows[worst], columns[worst])


# -------------------------------------------------------------------- the search


class _Search:
    """Enlarges the sample until the tolerance is met on fresh rows and entries, or cannot be."""

    def __init__(self, function: BlockFunction, goal: Goal, generator: torch.Generator) -> None:
        self.started = time.perf_counter()
        self.function, self.goal, self.generator = function, goal, generator
        heads, seqlen_q, seqlen_k = function.shape
        self.rank_cap = goal.rank_cap(heads, seqlen_q, seqlen_k)
        self.sample_cap = min(goal.sample_cap(heads), 2 * OVERSAMPLING * self.rank_cap)
        self.margin = MARGIN
        self.pivots_q = Pivots(function.x, generator)
        self.pivots_k = self.pivots_q if function.same else Pivots(function.y, generator)
        self.used = torch.zeros(seqlen_q, dtype=torch.bool, device=function.device)
        rows, others = self.draw(PROBE_ROWS), self.draw(PROBE_SIDE)
        columns = torch.randperm(seqlen_k, generator=generator)[:PROBE_SIDE].to(function.device)
        low, high, ends = extremes(function, rows, PROBE_SIDE)
        self.low, self.high = low[:, :0], high[:, :0]
        self.see(low, high)
        self.probes = [Probe(function, rows, torch.cat([columns, ends])), Probe(function, others, columns)]

    def see(self, low: Tensor, high: Tensor) -> None:
        """Count some rows, which lie between `low` and `high`, `[H, rows]`, in what `tol` is relative to."""
        self.low, self.high = torch.cat([self.low, low], dim=1), torch.cat([self.high, high], dim=1)
        self.ranges, self.limits = self.goal.limits(self.low, self.high)

    def run(self) -> FactoredBias:
        """Find the factors."""
        size = min(FIRST_SAMPLE, self.sample_cap)
        while True:
            skeleton = self.skeleton(size)
            found, views = self.choose(skeleton)
            while self.excess(found) <= self.margin:
                truncations = [truncation for truncation, _ in found]
                phi_q, phi_k = skeleton.factors(truncations, self.dtype())
                errors = self.check(phi_q, phi_k)
                report = self.report(skeleton, truncations, errors)
                if report.is_met:
                    ranks = report.ranks if len(set(report.ranks)) > 1 else None
                    return FactoredBias(phi_q, phi_k, ranks=ranks, report=report)
                self.check_rounding(phi_q, phi_k, truncations, views, report)
                del phi_q, phi_k
                self.margin *= MARGIN
                for probe, suspects in zip(self.probes, errors.suspects, strict=False):
                    probe.include(*suspects)
                    self.see(*probe.values.aminmax(dim=-1))
                found, views = self.choose(skeleton)
            if skeleton.is_whole or size >= self.sample_cap:
                raise self.refusal(skeleton, found, views)
            self.name_worst(found, views, size // 16)
            size = min((4 if self.excess(found) > 2 else 2) * size, self.sample_cap)

    def skeleton(self, size: int) -> Skeleton:
        """Sample about `size` rows and columns."""
        rows, columns = self.pivots_q.take(size), self.pivots_k.take(size)
        self.used[rows] = True
        asymmetry = [limit / 20 for limit in self.limits]  # what is missed shows in the check
        skeleton = Skeleton(self.function, rows, columns, self.rank_cap, self.goal.gauge, asymmetry, self.generator)
        self.see(skeleton.low, skeleton.high)
        return skeleton

    def choose(self, skeleton: Skeleton) -> tuple[list[tuple[Truncation, float]], list[list[View]]]:
        """For each head the smallest rank that will do with the error that it leaves, and the head on each probe."""
        whole = [Truncation(len(head.sigma)) for head in skeleton.heads]
        width = max(truncation.rank for truncation in whole)
        views: list[list[View]] = [[] for _ in whole]
        for probe in self.probes:
            heads, rows, columns = probe.values.shape
            left = skeleton.queries(probe.rows, whole, probe.values.new_zeros(heads, rows, width))
            right = skeleton.keys(probe.columns, whole, probe.values.new_zeros(heads, columns, width))
            for of_head, target, phi_q, phi_k, head in zip(
                views, probe.values, left, right, skeleton.heads, strict=True
            ):
                of_head.append(View(target, phi_q, phi_k, head))
        limits = [self.margin * limit for limit in self.limits]
        found = [
            fewest_columns(of_head, self.goal, self.rank_cap, limit)
            for of_head, limit in zip(views, limits, strict=True)
        ]
        return found, views

    def excess(self, found: list[tuple[Truncation, float]]) -> float:
        """Largest error in terms of what is allowed."""
        return max(error / limit if error else 0.0 for (_, error), limit in zip(found, self.limits, strict=True))

    def check(self, phi_q: Tensor, phi_k: Tensor) -> _Errors:
        """Compare the factors with the function where nothing has looked yet."""
        seqlen_q, seqlen_k = self.function.shape[1:]
        rows = self.draw(max(FRESH_ROWS, -(-FRESH_ENTRIES // seqlen_k)))
        errors = _errors_of_rows(self.function, self.goal, rows, phi_q, phi_k)
        if not self.goal.by_entry or len(rows) == seqlen_q:
            return errors
        largest, worst = _largest_all_over(self.function, phi_q, phi_k, self.generator)
        return replace(
            errors,
            entries=errors.entries + FRESH_ENTRIES,
            largest=torch.maximum(errors.largest, largest),
            suspects=[*errors.suspects, worst],
        )

    def check_rounding(
        self,
        phi_q: Tensor,
        phi_k: Tensor,
        truncations: list[Truncation],
        views: list[list[View]],
        report: CrossReport,
    ) -> None:
        """Give up where float32 takes more than `tol` allows, which no number of columns brings back."""
        probe = self.probes[0]
        for head, (truncation, view, limit) in enumerate(zip(truncations, views, self.limits, strict=True)):
            kept = phi_q[head, probe.rows].double() @ phi_k[head, probe.columns].double().mT - probe.values[head]
            rounding = float(self.goal.of_rows(*(kept - view[0].error(truncation)).aminmax(dim=-1)).max())
            if rounding > limit:
                raise NotLowRankError(
                    f"float32 factors cannot hold f so well: their rounding alone changes head {head} by {rounding:.4g}"
                    f", and {self.allowed(head)}; subtract a constant, or raise tol",
                    report,
                )

    def allowed(self, head: int) -> str:
        """What `tol` is relative to, and how much that is."""
        of = f"range {self.ranges[head]:.4g}" if self.goal.relative_to == "range" else "output"
        return f"tol={self.goal.tol:g} of the {of} allows {self.limits[head]:.4g}"

    def name_worst(self, found: list[tuple[Truncation, float]], views: list[list[View]], count: int) -> None:
        """Have rows of the probes that stand out, and the columns where they do, in the next skeleton."""
        count = max(1, count // (len(self.probes) * len(views)))
        for of_head, (truncation, _) in zip(views, found, strict=True):
            for probe, view in zip(self.probes, of_head, strict=True):
                error = view.error(truncation)
                sizes = self.goal.of_rows(*error.aminmax(dim=-1))
                worst = sizes.topk(min(count, len(sizes)))
                rows = worst.indices[worst.values > STANDS_OUT * sizes.median()]
                columns = torch.cat([error[rows].argmin(-1), error[rows].argmax(-1)])
                self.pivots_q.name(probe.rows[rows])
                self.pivots_k.name(probe.columns[columns])

    def draw(self, count: int) -> Tensor:
        """Random rows that nothing has used yet; all rows, where `count` is most of them."""
        everything = torch.arange(len(self.used), device=self.used.device)
        if 2 * count >= len(everything):
            return everything
        free = everything[~self.used]
        free = free if len(free) >= count else everything
        rows = free[torch.randperm(len(free), generator=self.generator)[:count].to(free.device)]
        self.used[rows] = True
        return rows

    def dtype(self) -> torch.dtype:
        """What strips are multiplied in: float32 where its rounding does not matter."""
        is_coarse = min(self.limits) >= 1e-4 * float(self.probes[0].values.abs().max())
        return torch.float32 if is_coarse else torch.float64

    def report(self, skeleton: Skeleton, truncations: list[Truncation], errors: _Errors) -> CrossReport:
        """What was found."""
        levels = torch.tensor(QUANTILES, dtype=errors.spread.dtype, device=errors.spread.device)
        return CrossReport(
            shape=self.function.shape,
            tol=self.goal.tol,
            relative_to=self.goal.relative_to,
            gauge=self.goal.gauge,
            ranks=tuple(max(1, truncation.columns) for truncation in truncations),
            lifts=tuple(truncation.lift for truncation in truncations),
            shifts=tuple(truncation.shift for truncation in truncations),
            value_range=tuple(self.ranges),
            limits=tuple(self.limits),
            max_error=tuple(errors.largest.tolist()),
            rms_error=tuple(errors.rms.tolist()),
            certificate_quantiles=tuple(map(tuple, certificate(errors.spread).quantile(levels, dim=1).mT.tolist())),
            fresh_rows=errors.rows,
            fresh_entries=errors.entries,
            sample=(len(skeleton.rows), len(skeleton.columns)),
            evaluations=self.function.evaluations,
            seconds=time.perf_counter() - self.started,
        )

    def refusal(
        self, skeleton: Skeleton, found: list[tuple[Truncation, float]], views: list[list[View]]
    ) -> NotLowRankError:
        """Say what was asked for, what was reached, and what may be changed."""
        truncations = [truncation for truncation, _ in found]
        error = torch.stack([of_head[0].error(t) for of_head, t in zip(views, truncations, strict=True)])
        centred = error if self.goal.by_entry else error - error.mean(-1, keepdim=True)
        largest = error.new_tensor([size for _, size in found])
        measured = _Errors(0, 0, row_spread(error), largest, centred.square().mean((1, 2)).sqrt(), [])
        head = int((largest / largest.new_tensor(self.limits)).argmax())
        return NotLowRankError(
            f"f is not of low rank: with {truncations[head].rank} columns, the most that could be tried, head {head} is"
            f" off by {float(largest[head]):.4g}, and {self.allowed(head)}; "
            f"raise tol, max_rank ({self.goal.max_rank}) or max_bytes ({self.goal.max_bytes:,})",
            self.report(skeleton, truncations, measured),
        )
