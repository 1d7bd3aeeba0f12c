"""Which program computes which tiles of queries, decided on the host.

A program takes unit after unit, one in every turn. Where all tiles cost the same, the last turn is rarely full: its
tiles are then cut over the keys into parts, and their results joined afterwards. Where a band makes tiles of different
length, the longest go first, and odd turns may be dealt backwards, so that all programs get the same sum.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Band", "Schedule", "banded", "jagged", "ordered", "unbanded"]

OVERHEAD = 2.0
"""What starting and ending a unit costs, in tiles of keys."""

JOIN = 4.0
"""What joining the parts costs, in tiles of keys."""

MOST_PARTS = 16
FEWEST_KEY_TILES = 4
"""Tiles of keys that a part has at least."""

WORTHWHILE = 0.98
"""Tiles are cut if the time falls to this share at most."""

CACHE = 24 * 2**20
"""Bytes of keys and values that stay in the level-2 cache, with room for what else passes through."""

MISS = 1.05
"""What a group that does not fit into the cache costs."""

LONG_ENOUGH = 64
"""Turns from which on every order is balanced."""

ABREAST = 4
"""Blocks of one pair that run at the same time where they wait for each other; each one more is later by a step."""

MOST_TRIES = 12
"""Sizes of a group that are compared."""


@dataclass(frozen=True)
class Schedule:
    """Units in the order in which they are dealt.

    Args:
        programs: that run at the same time.
        units: whole tiles, then parts.
        whole: units that are whole tiles.
        parts: into which every other tile is cut; 1 if none is.
        part_tiles: tiles of keys of a part; the last part may have fewer.
        heads: (batch, head) pairs whose tiles are dealt together.
        alternates: whether odd turns are dealt backwards.
    """

    programs: int
    units: int
    whole: int
    parts: int = 1
    part_tiles: int = 0
    heads: int = 1
    alternates: bool = False

    @property
    def is_split(self) -> bool:
        """Whether some tiles are cut."""
        return self.parts > 1

    @property
    def cut(self) -> int:
        """Tiles that are cut."""
        return (self.units - self.whole) // self.parts if self.is_split else 0


@dataclass(frozen=True)
class Band:
    """Keys `i + shift - left ... i + shift + right` that query i sees; a negative side is unbounded."""

    shift: int
    left: int
    right: int

    def key_tiles(self, start: int, rows: int, keys: int, seqlen_k: int) -> int:
        """Tiles of `keys` keys that queries `start ... start + rows - 1` see, one at least; as in the kernel."""
        last = math.ceil(seqlen_k / keys)
        low, high = 0, last
        if self.left >= 0:
            low = min(max(start + self.shift - self.left, 0) // keys, last - 1)
        if self.right >= 0:
            high = min(high, math.ceil(max(start + rows + self.shift + self.right, 0) / keys))
        return max(high - low, 1)


@functools.lru_cache(maxsize=1024)
def unbanded(tiles: int, key_tiles: int, programs: int) -> Schedule:
    """Deal tiles of equal cost; cut those of the last, incomplete turn if that pays.

    Args:
        tiles: of queries, of all heads.
        key_tiles: tiles of keys that each of them walks over.
        programs: multiprocessors.
    """
    whole = tiles // programs * programs
    rest = tiles - whole
    uncut = Schedule(min(tiles, programs), tiles, tiles)
    if rest == 0:
        return uncut
    turns = whole // programs * (key_tiles + OVERHEAD)
    best, best_cost = uncut, WORTHWHILE * (turns + key_tiles + OVERHEAD)
    for wanted in range(2, min(MOST_PARTS, key_tiles // FEWEST_KEY_TILES) + 1):
        part_tiles = math.ceil(key_tiles / wanted)
        parts = math.ceil(key_tiles / part_tiles)
        cost = turns + math.ceil(rest * parts / programs) * (part_tiles + OVERHEAD) + JOIN
        if parts > 1 and cost < best_cost:
            units = whole + rest * parts
            best, best_cost = Schedule(min(units, programs), units, whole, parts, part_tiles), cost
    return best


@functools.lru_cache(maxsize=1024)
def banded(
    blocks: int,
    pairs: int,
    rows: int,
    keys: int,
    seqlen_k: int,
    band: Band,
    pair_bytes: int,
    group: int,
    programs: int,
    last_first: bool = True,
) -> Schedule:
    """Deal tiles of different length, the longest first, so that programs get the same sum.

    Tiles of a few heads are dealt together, so that their keys and values stay in the cache.

    Args:
        blocks: tiles of queries of one (batch, head) pair.
        pairs: (batch, head) pairs.
        rows: queries of a tile.
        keys: keys of a tile.
        seqlen_k: keys in all.
        band: what queries see.
        pair_bytes: of keys and values of one head of keys.
        group: pairs that share a head of keys.
        programs: multiprocessors.
        last_first: whether the last block of a pair is dealt first, else the first.
    """
    units = blocks * pairs
    running = min(units, programs)
    fitting = min(pairs, max(1, CACHE // pair_bytes) * group)
    if units <= programs or units >= LONG_ENOUGH * programs:
        return Schedule(running, units, units, heads=fitting)
    lengths = np.array([band.key_tiles(block * rows, rows, keys, seqlen_k) for block in range(blocks)])
    lengths = lengths[::-1] if last_first else lengths
    sizes = {max(1, math.ceil(fitting * n / (MOST_TRIES - 1))) for n in range(1, MOST_TRIES)} | {fitting, pairs}
    best, best_cost = Schedule(running, units, units, heads=fitting), math.inf
    for heads in sorted(sizes, reverse=True):
        dealt = _dealt(lengths, pairs, heads) + OVERHEAD
        miss = MISS if heads > fitting else 1.0
        for alternates in (True, False):
            cost = _longest(dealt, programs, alternates) * miss
            if cost < best_cost:
                best, best_cost = Schedule(running, units, units, heads=heads, alternates=alternates), cost
    return best


@functools.lru_cache(maxsize=1024)
def ordered(blocks: int, pairs: int, pair_bytes: int, programs: int) -> Schedule:
    """Deal blocks that wait for the block before of the same pair; each program draws one after the other.

    All pairs of a group have their first blocks drawn, then their second ones: so few blocks of one pair run at the
    same time, and of those each waits for one that has been drawn before.

    Args:
        blocks: tiles of keys of one (batch, head of keys) pair.
        pairs: (batch, head of keys) pairs.
        pair_bytes: of queries and dO of one pair.
        programs: multiprocessors.
    """
    wanted = max(CACHE // pair_bytes, math.ceil(programs / ABREAST))
    groups = max(pairs // wanted, 1)
    units = blocks * pairs
    return Schedule(min(units, programs), units, units, heads=math.ceil(pairs / groups))


def jagged(tokens: int, sequences: int, heads: int, rows: int, programs: int) -> Schedule:
    """Deal the blocks of a packed batch, whose lengths the host does not know: each program claims one after the other.

    All heads of a block come one after the other, sequence by sequence, so that what they read stays in the cache.

    Args:
        tokens: queries of all sequences; in the backward pass, which deals blocks of keys, keys.
        sequences: of the batch.
        heads: of queries, or of keys.
        rows: queries, or keys, of a tile.
        programs: multiprocessors.

    Returns:
        A schedule of as many units as there can be.
    """
    units = (tokens // rows + sequences) * heads
    return Schedule(min(units, programs), units, units)


def _dealt(lengths: np.ndarray, pairs: int, heads: int) -> np.ndarray:
    """Lengths of all tiles in the order of dealing: group by group, of each block the tiles of all its heads."""
    groups = [min(heads, pairs - first) for first in range(0, pairs, heads)]
    return np.concatenate([np.repeat(lengths, size) for size in groups])


def _longest(dealt: np.ndarray, programs: int, alternates: bool) -> float:
    """Sum of the program that gets most."""
    turns = math.ceil(len(dealt) / programs)
    table = np.zeros(turns * programs)
    table[: len(dealt)] = dealt
    table = table.reshape(turns, programs)
    if alternates:
        table[1::2] = table[1::2, ::-1].copy()
    return float(table.sum(0).max())
