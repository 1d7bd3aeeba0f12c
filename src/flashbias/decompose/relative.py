"""Relative biases: found from their values, and read into a table.

A bias is relative if it depends on the difference of two places alone: along a line, in a window of two or three
dimensions (Swin), or in such a window behind a class token (BEiT). It is then exact as a table, whatever its rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Codes", "codes_of_grid", "codes_of_positions", "find_codes", "read_table", "trim_tails"]


@dataclass(frozen=True, eq=False)
class Codes:
    """How a table is read: entry `clip(code_k[j] - code_q[i], -half_width, half_width) + half_width`.

    Args:
        code_q: `[N]` integers.
        code_k: `[M]` integers.
        half_width: half of the table's length.
        axes: sides of the window; empty for places along a line.
        has_class_token: whether a token without a place stands first.
    """

    code_q: Tensor
    code_k: Tensor
    half_width: int
    axes: tuple[int, ...] = ()
    has_class_token: bool = False

    @property
    def is_line(self) -> bool:
        """Whether codes are positions, so that only tiles near the diagonal read the table's middle."""
        return not self.axes

    @property
    def is_positions(self) -> bool:
        """Whether codes are the default ones, 0 … N-1 and 0 … M-1."""
        return all(torch.equal(c, torch.arange(len(c), device=c.device)) for c in (self.code_q, self.code_k))

    def index(self, half_width: int | None = None) -> Tensor:
        """`[N, M]`: the entry that each pair reads, of a table of this or another half width."""
        half = self.half_width if half_width is None else half_width
        return (self.code_k[None, :] - self.code_q[:, None]).clamp_(-half, half) + half

    def __str__(self) -> str:
        """As it is said in a report."""
        if self.is_line:
            return "position"
        window = "×".join(str(side) for side in self.axes)
        return f"place in a {window} window" + (" behind a class token" if self.has_class_token else "")


def codes_of_positions(positions_q: Tensor, positions_k: Tensor) -> Codes:
    """Number integer places so that differences of places are differences of numbers.

    Args:
        positions_q: `[N]` or `[N, D]` integers.
        positions_k: `[M]` or `[M, D]` integers.

    Returns:
        Codes that two pairs share only if their differences are equal in every dimension.
    """
    q, k = (p[:, None] if p.dim() == 1 else p for p in (positions_q.long(), positions_k.long()))
    both = torch.cat([q, k])
    low = both.amin(0)
    sides = (both.amax(0) - low + 1).tolist()
    code_q, code_k = _number(q - low, sides), _number(k - low, sides)
    half = max(int(code_k.max() - code_q.min()), int(code_q.max() - code_k.min()), 0)
    if q.shape[1] == 1:
        return Codes(q[:, 0], k[:, 0], half)
    return Codes(code_q, code_k, half, tuple(sides))


def codes_of_grid(axes: tuple[int, ...], has_class_token: bool = False) -> Codes:
    """Codes of all places of a window in row-major order.

    A class token reads entries beyond those of the window: as a query it stands so far to the right that every place
    is to its left, as a key so far to the right again that it is beyond itself as a query, and further beyond every
    place.
    """
    places = torch.cartesian_prod(*(torch.arange(side) for side in axes)).reshape(-1, len(axes))
    code = _number(places, axes)
    half = math.prod(2 * side - 1 for side in axes) // 2
    if not has_class_token:
        return Codes(code, code, half, axes)
    as_query, as_key = code.new_tensor([2 * half + 1]), code.new_tensor([3 * half + 2])
    return Codes(torch.cat([as_query, code]), torch.cat([as_key, code]), half + 2, axes, True)


def _number(places: Tensor, sides: tuple[int, ...] | list[int]) -> Tensor:
    """Places `[n, D]` in a base where differences do not collide."""
    code = places.new_zeros(len(places))
    for axis, side in enumerate(sides):
        code = code * (2 * side - 1) + places[:, axis]
    return code


def find_codes(b: Tensor, allowed: float) -> Codes | None:
    """Find out whether a bias is relative: along a line, or in a window of two or three dimensions.

    Args:
        b: `[N, M]`, every entry of which is read.
        allowed: how far entries that should be equal may lie apart.

    Returns:
        Codes that fit, with the fewest dimensions; None if there are none.
    """
    if _is_constant_along(b, 1, None, allowed):
        half = max(b.shape) - 1
        code_q, code_k = (torch.arange(n, device=b.device) for n in b.shape)
        return Codes(code_q, code_k, half)
    if b.shape[0] != b.shape[1]:
        return None
    for first in (0, 1):
        axes = _find_axes(b[first:, first:], allowed)
        if axes is not None:
            codes = codes_of_grid(axes, has_class_token=first == 1)
            return Codes(
                codes.code_q.to(b.device), codes.code_k.to(b.device), codes.half_width, axes, codes.has_class_token
            )
    return None


def _find_axes(b: Tensor, allowed: float) -> tuple[int, ...] | None:
    """Sides of the window in which `b` is relative, two of them or three."""
    size = len(b)
    outer = [step for step in _divisors(size) if _is_constant_along(b, step, None, allowed)]
    for step in outer:
        if _is_constant_along(b, 1, step, allowed):
            return size // step, step
    for step in outer:
        for inner in _divisors(step):
            if _is_constant_along(b, inner, step, allowed) and _is_constant_along(b, 1, inner, allowed):
                return size // step, step // inner, inner
    return None


def _divisors(size: int) -> list[int]:
    """Divisors other than 1 and the size itself."""
    return [d for d in range(2, size) if size % d == 0]


SAMPLE_ROWS = 16
"""Rows that are looked at before all are."""


def _is_constant_along(b: Tensor, step: int, block: int | None, allowed: float) -> bool:
    """Whether moving query and key on by `step`, each within its block of places, changes nothing."""
    if min(b.shape) <= step:
        return False
    for stride in (max(1, len(b) // SAMPLE_ROWS), 1):
        before, after = b[:-step:stride, :-step], b[step::stride, step:]
        moved = (after - before).abs()
        if block is not None:
            q, k = (torch.arange(n, device=b.device) for n in (b.shape[0] - step, b.shape[1] - step))
            stays_q, stays_k = (q[::stride] % block) + step < block, (k % block) + step < block
            moved = moved[stays_q][:, stays_k]
        if moved.numel() and float(moved.max()) > allowed:
            return False
    return True


def read_table(b: Tensor, codes: Codes, mask: Tensor | None = None) -> Tensor:
    """Read a table from the values: for each difference the middle between the extremes found there.

    Args:
        b: `[N, M]`.
        codes: how it is read.
        mask: booleans `[N, M]`, True where an entry is read; None: everywhere.

    Returns:
        `[T]`; an entry that nothing reads repeats the next one that is read (at the end the last one), so that tails
        can be constant.
    """
    index = codes.index().flatten()
    values = b.flatten()
    if mask is not None:
        keep = mask.expand(b.shape).flatten()
        index, values = index[keep], values[keep]
    length = 2 * codes.half_width + 1
    low = b.new_full((length,), math.inf).scatter_reduce_(0, index, values, "amin")
    high = b.new_full((length,), -math.inf).scatter_reduce_(0, index, values, "amax")
    seen = torch.nonzero(low <= high)[:, 0]
    if len(seen) == 0:
        return b.new_zeros(length)
    following = torch.searchsorted(seen, torch.arange(length, device=b.device)).clamp_(max=len(seen) - 1)
    return ((low + high) / 2)[seen[following]]


def trim_tails(table: Tensor, allowed: float) -> Tensor:
    """Shorten tables to the smallest half width beyond which each is constant on either side.

    Args:
        table: `[H, T]`.
        allowed: largest range of what becomes one constant.

    Returns:
        `[H, T']`, T' odd, at least 3 unless T is 1; a tail's constant is the middle of its range.
    """
    half = table.shape[1] // 2
    if half < 1:
        return table
    # From the ends inwards: range of everything at least as far out.
    right = table[:, half + 1 :].flip(1)
    left = table[:, :half]

    def spread(outwards: Tensor) -> tuple[Tensor, Tensor]:
        high, low = outwards.cummax(1).values, outwards.cummin(1).values
        return high - low, (high + low) / 2

    range_right, middle_right = spread(right)
    range_left, middle_left = spread(left)
    fits = ((range_right <= allowed) & (range_left <= allowed)).all(0)
    count = max(1, int(fits.sum()))  # entries of each side that become one
    width = half - count + 1
    trimmed = table[:, half - width : half + width + 1].clone()
    trimmed[:, 0], trimmed[:, -1] = middle_left[:, count - 1], middle_right[:, count - 1]
    return trimmed
