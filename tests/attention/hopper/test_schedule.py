"""Which program computes which tiles: nothing is lost or done twice, and programs are kept equally busy."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbias.attention.hopper import schedule
from flashbias.attention.hopper.schedule import FEWEST_KEY_TILES, MOST_PARTS, OVERHEAD, Band, Schedule, banded, unbanded

PROGRAMS = 132
CAUSAL = Band(0, -1, 0)


def units_of(plan: Schedule, program: int) -> list[int]:
    """Units of a program, by the arithmetic of the kernel."""
    full, rest = divmod(plan.units, plan.programs)

    def place(turn: int) -> int:
        return plan.programs - 1 - program if plan.alternates and turn % 2 else program

    turns = full + (place(full) < rest)
    return [turn * plan.programs + place(turn) for turn in range(turns)]


def tile_of(plan: Schedule, unit: int, blocks: int, pairs: int, is_banded: bool) -> tuple[int, int, int]:
    """Pair, block and part of a unit, by the arithmetic of the kernel; part -1 is a whole tile."""
    part, tile = unit - plan.whole, unit
    if plan.is_split and part >= 0:
        tile, part = plan.whole + part // plan.parts, part % plan.parts
    else:
        part = -1
    if not is_banded:
        return tile // blocks, tile % blocks, part
    first = tile // (plan.heads * blocks) * plan.heads
    within = tile % (plan.heads * blocks)
    heads = min(plan.heads, pairs - first)
    return first + within % heads, blocks - 1 - within // heads, part


def load(plan: Schedule, program: int, key_tiles: int) -> float:
    """Tiles of keys that a program walks over, with what its units cost beside."""
    total = 0.0
    for unit in units_of(plan, program):
        part = (unit - plan.whole) % plan.parts
        whole = unit < plan.whole
        total += OVERHEAD + (key_tiles if whole else min(plan.part_tiles, key_tiles - part * plan.part_tiles))
    return total


class TestUnbanded:
    @settings(deadline=None, max_examples=60)
    @given(
        blocks=st.integers(1, 40), pairs=st.integers(1, 20), key_tiles=st.integers(1, 300), programs=st.integers(1, 140)
    )
    def test_every_key_of_every_tile_is_dealt_once(self, blocks: int, pairs: int, key_tiles: int, programs: int):
        plan = unbanded(blocks * pairs, key_tiles, programs)
        assert plan.programs <= programs
        seen = Counter()
        for program in range(plan.programs):
            units = units_of(plan, program)
            assert units
            for unit in units:
                pair, block, part = tile_of(plan, unit, blocks, pairs, False)
                assert 0 <= pair < pairs
                first = 0 if part < 0 else part * plan.part_tiles
                last = key_tiles if part < 0 else min(key_tiles, first + plan.part_tiles)
                assert first < last
                seen[pair, block] += last - first
        assert set(seen.values()) == {key_tiles}
        assert len(seen) == blocks * pairs

    @settings(deadline=None, max_examples=60)
    @given(tiles=st.integers(1, 2000), key_tiles=st.integers(1, 300), programs=st.integers(1, 140))
    def test_cutting_pays_and_parts_are_few_and_long(self, tiles: int, key_tiles: int, programs: int):
        plan = unbanded(tiles, key_tiles, programs)
        assert plan.parts <= MOST_PARTS
        if plan.is_split:
            assert plan.part_tiles >= FEWEST_KEY_TILES
            assert plan.whole % programs == 0
            assert plan.whole + plan.cut == tiles
            longest = max(load(plan, program, key_tiles) for program in range(plan.programs))
            assert longest < math.ceil(tiles / programs) * (key_tiles + OVERHEAD)

    @pytest.mark.parametrize(
        ("tiles", "key_tiles", "most"),
        [(688, 64, 5.4), (344, 64, 2.9), (1344, 252, 10.35)],
        ids=["16 heads of 8192", "8 heads of 8192", "8 heads of 32186"],
    )
    def test_the_last_turn_shrinks(self, tiles: int, key_tiles: int, most: float):
        plan = unbanded(tiles, key_tiles, PROGRAMS)
        longest = max(load(plan, program, key_tiles) for program in range(plan.programs))
        assert longest / (key_tiles + OVERHEAD) <= most

    @pytest.mark.parametrize(("tiles", "key_tiles"), [(1320, 64), (12288, 5), (132, 64), (1, 1), (60, 4)])
    def test_nothing_is_cut_where_it_gains_nothing(self, tiles: int, key_tiles: int):
        plan = unbanded(tiles, key_tiles, PROGRAMS)
        assert plan == Schedule(min(tiles, PROGRAMS), tiles, tiles)
        assert plan.cut == 0


class TestBanded:
    @settings(deadline=None, max_examples=40)
    @given(
        blocks=st.integers(1, 33),
        pairs=st.integers(1, 40),
        pair_bytes=st.sampled_from([2**16, 2**21, 2**26]),
        group=st.sampled_from([1, 4]),
        left=st.sampled_from([-1, 0, 300]),
    )
    def test_every_tile_is_dealt_once(self, blocks: int, pairs: int, pair_bytes: int, group: int, left: int):
        band = Band(5, left, 0)
        plan = banded(blocks, pairs, 192, 128, blocks * 192 + 5, band, pair_bytes, group, PROGRAMS)
        assert not plan.is_split
        dealt = [unit for program in range(plan.programs) for unit in units_of(plan, program)]
        tiles = Counter(tile_of(plan, unit, blocks, pairs, True)[:2] for unit in dealt)
        assert len(tiles) == blocks * pairs
        assert set(tiles.values()) == {1}

    @pytest.mark.parametrize(
        ("blocks", "pairs", "rows", "head_bytes", "most"),
        [(32, 128, 128, 512, 1.03), (128, 32, 128, 512, 1.02), (43, 25, 192, 256, 1.04)],
        ids=["4096", "16384", "8192, narrow"],
    )
    def test_programs_are_equally_busy(self, blocks: int, pairs: int, rows: int, head_bytes: int, most: float):
        seqlen = blocks * rows // 128 * 128
        plan = banded(blocks, pairs, rows, 128, seqlen, CAUSAL, seqlen * head_bytes, 1, PROGRAMS)
        sums = []
        for program in range(plan.programs):
            tiles = [tile_of(plan, unit, blocks, pairs, True)[1] for unit in units_of(plan, program)]
            sums.append(sum(CAUSAL.key_tiles(block * rows, rows, 128, seqlen) + OVERHEAD for block in tiles))
        assert max(sums) <= most * sum(sums) / PROGRAMS

    def test_groups_fit_into_the_cache_and_share_heads_of_keys(self):
        pair_bytes = schedule.CACHE // 3
        assert banded(64, 4096, 128, 128, 8192, CAUSAL, pair_bytes, 1, PROGRAMS).heads == 3
        assert banded(64, 4096, 128, 128, 8192, CAUSAL, pair_bytes, 8, PROGRAMS).heads == 24
        assert banded(64, 4096, 128, 128, 8192, CAUSAL, 10 * schedule.CACHE, 1, PROGRAMS).heads == 1


class TestBand:
    @pytest.mark.parametrize("band", [CAUSAL, Band(7, 40, 0), Band(-9, 20, 30), Band(0, 64, -1), Band(0, -1, 10)])
    def test_counts_the_tiles_in_which_a_query_sees_a_key(self, band: Band):
        rows, keys, seqlen_k = 32, 16, 150
        for start in range(0, 200, rows):
            seen = [
                j // keys
                for i in range(start, start + rows)
                for j in range(seqlen_k)
                if (band.left < 0 or j >= i + band.shift - band.left)
                and (band.right < 0 or j <= i + band.shift + band.right)
            ]
            expected = max(seen) - min(seen) + 1 if seen else 1
            assert band.key_tiles(start, rows, keys, seqlen_k) == expected
