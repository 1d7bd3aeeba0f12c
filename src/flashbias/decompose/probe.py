"""Entries set aside on which the rank of a skeleton is chosen, and the lift that saves columns.

Lift. A function with a kink or a peak, as at x = y, loses the tip of it when singular values are cut off, and hardly
anything elsewhere. Raising the values that are kept raises the tip again, at the price of ripples beside it: the
largest error falls, the mean squared one grows a little. How much is found on the probes, and only where it saves
columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.decompose.blocks import BlockFunction
from flashbias.decompose.bound import spread_allowed
from flashbias.decompose.skeleton import Head, Truncation

__all__ = ["Goal", "Probe", "View", "extremes", "fewest_columns"]

ROUNDING = 2.0**-23
"""Error that is allowed to a constant function, relative to it: factors are float32."""

REACH = 2.5
"""A lift takes a part of the tip away and never all of it: errors further above the limit are not tried."""


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Args:
        tol: the tolerance.
        relative_to: "range" or "output".
        gauge: whether constants of rows are dropped.
        max_rank: most columns of a head; None for no limit.
        max_bytes: what may be allocated.
    """

    tol: float
    relative_to: str
    gauge: bool
    max_rank: int | None
    max_bytes: int

    @property
    def by_entry(self) -> bool:
        """Whether an error counts as it is, and not only up to a constant per row."""
        return self.relative_to == "range" and not self.gauge

    def of_rows(self, low: Tensor, high: Tensor) -> Tensor:
        """How large errors are that lie between `low` and `high` in each row."""
        return torch.maximum(high, -low) if self.by_entry else (high - low) / 2

    def limits(self, low: Tensor, high: Tensor) -> tuple[list[float], list[float]]:
        """The range of each head's values and the error that is allowed, from the rows' ends, `[H, rows]`."""
        ranges = (high - low).amax(1) if self.gauge else high.amax(1) - low.amin(1)
        if self.relative_to == "output":
            return ranges.tolist(), [spread_allowed(self.tol) / 2] * len(ranges)
        rounding = ROUNDING * torch.maximum(high, -low).amax(1)
        return ranges.tolist(), torch.where(ranges > 0, self.tol * ranges, rounding).tolist()

    def rank_cap(self, heads: int, seqlen_q: int, seqlen_k: int) -> int:
        """Most columns that `max_rank`, `max_bytes` and the size of the matrix itself leave."""
        tokens = seqlen_q + seqlen_k
        by_memory = max(int(0.6 * self.max_bytes) // (4 * heads * tokens), 1)
        by_size = max(seqlen_q * seqlen_k // tokens, 1)
        return min(by_memory, by_size, self.max_rank or by_size)

    def sample_cap(self, heads: int) -> int:
        """Most rows and columns whose crossing, with what its decomposition needs, fits into `max_bytes`."""
        return max(math.isqrt(int(0.8 * self.max_bytes) // (8 * (heads + 5))), 1)


class Probe:
    """Some rows and columns, and the values where they cross.

    Args:
        function: the matrix.
        rows: indices of queries.
        columns: indices of keys.

    Attributes:
        values: `[H, rows, columns]`, float64.
    """

    def __init__(self, function: BlockFunction, rows: Tensor, columns: Tensor) -> None:
        self.function, self.rows, self.columns = function, rows[:0], columns[:0]
        self.include(rows, columns)

    def include(self, rows: Tensor, columns: Tensor) -> None:
        """Add rows and columns."""
        self.rows = torch.cat([self.rows, rows]).unique()
        self.columns = torch.cat([self.columns, columns]).unique()
        self.values = self.function.block(self.rows, self.columns, "entries set aside").double()


def extremes(function: BlockFunction, rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Look some rows through.

    Args:
        function: the matrix.
        rows: indices of queries.
        count: how many columns to name.

    Returns:
        Lowest and highest values, `[H, rows]` in float64, and about `count` columns where the rows are lowest or
        highest.
    """
    each = min(max(1, count // (2 * function.num_heads * len(rows))), len(function.y))
    lows, highs, columns = [], [], []
    for piece in function.pieces(len(rows), len(function.y), "rows set aside"):
        values = function(function.x[rows[piece]], function.y)
        low, high = values.topk(each, largest=False), values.topk(each)
        lows.append(low.values[..., 0].double())
        highs.append(high.values[..., 0].double())
        columns += [low.indices.flatten(), high.indices.flatten()]
    return torch.cat(lows, 1), torch.cat(highs, 1), torch.cat(columns).unique()


# -------------------------------------------------------------------- rank and lift


@dataclass(frozen=True, eq=False)
class View:
    """One head of a skeleton on a probe: `left right^T` with all its singular values.

    Args:
        target: `[rows, columns]`, the function.
        left: `[rows, R]`.
        right: `[columns, R]`.
        head: whose factors they are.
    """

    target: Tensor
    left: Tensor
    right: Tensor
    head: Head

    def error(self, truncation: Truncation) -> Tensor:
        """`[rows, columns]`: the factors minus the function."""
        rank = truncation.rank
        error = self.left[:, :rank] @ self.right[:, :rank].mT - self.target + truncation.shift
        return error + truncation.lift * self.ripple(self.head.lifting(rank)) if truncation.lift else error

    def ripple(self, lifting: Tensor) -> Tensor:
        """`[rows, columns]`: what a lift of one adds."""
        rank = len(lifting)
        root = self.head.sigma[:rank].sqrt()
        return (self.left[:, :rank] / root) @ lifting @ (self.right[:, :rank] / root).mT


def fewest_columns(views: list[View], goal: Goal, column_cap: int, limit: float) -> tuple[Truncation, float]:
    """Find the fewest columns, to 1 %, with which the error keeps the limit.

    Args:
        views: one head on each probe.
        goal: how errors count.
        column_cap: most columns, one for a shift included.
        limit: error that is allowed.

    Returns:
        The truncation and its error; if none keeps the limit, the most columns and what they leave.
    """
    most = min(column_cap, len(views[0].head.sigma))
    best, bad = _fitted(views, goal, most, column_cap, limit), -1
    if best[1] > limit and goal.by_entry and most == column_cap > 1:  # one less leaves room for a shift
        best = min(best, _fitted(views, goal, most - 1, column_cap, limit), key=lambda fitted: fitted[1])
    while best[1] <= limit and best[0].rank - bad > 1 + best[0].rank // 100:
        middle = _fitted(views, goal, (bad + best[0].rank) // 2, column_cap, limit)
        best, bad = (middle, bad) if middle[1] <= limit else (best, middle[0].rank)
    return best


def _fitted(views: list[View], goal: Goal, rank: int, column_cap: int, limit: float) -> tuple[Truncation, float]:
    """Keep `rank` singular values, lifted and shifted as suits them if they are not enough by themselves."""
    errors = [view.error(Truncation(rank)) for view in views]
    may_shift = goal.by_entry and rank < column_cap
    plain = _size(errors, goal, may_shift)
    lift = 0.0
    if rank and limit < plain < REACH * limit:
        lifting = views[0].head.lifting(rank)
        ripples = [view.ripple(lifting) for view in views]

        def size(lift: float) -> float:
            return _size([e + lift * ripple for e, ripple in zip(errors, ripples, strict=True)], goal, may_shift)

        lift = _minimum(size, plain / max(float(ripple.abs().max()) for ripple in ripples))
        errors = [error + lift * ripple for error, ripple in zip(errors, ripples, strict=True)]
    size_left = _size(errors, goal, may_shift)
    shift = _shift(errors, max(limit, size_left)) if may_shift else 0.0
    return Truncation(rank, lift, shift), size_left


def _size(errors: list[Tensor], goal: Goal, may_shift: bool) -> float:
    """How large errors `[rows, columns]` are, after the best shift if there may be one."""
    if not may_shift:
        return max(float(goal.of_rows(*error.aminmax(dim=-1)).max()) for error in errors)
    return (max(float(error.max()) for error in errors) - min(float(error.min()) for error in errors)) / 2


def _shift(errors: list[Tensor], limit: float) -> float:
    """The smallest constant that brings all errors within the limit."""
    most = limit - max(float(error.max()) for error in errors)
    least = -limit - min(float(error.min()) for error in errors)
    return min(max(0.0, least), most)


def _minimum(of: Callable[[float], float], end: float, steps: int = 14) -> float:
    """Where a convex function is smallest between 0 and `end`, by the golden section."""
    ratio, low, high = (math.sqrt(5) - 1) / 2, 0.0, end
    for _ in range(steps):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if of(left) <= of(right) else (left, high)
    return (low + high) / 2
