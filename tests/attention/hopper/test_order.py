"""Additions in a fixed order: nobody waits forever, however few programs run at the same time, or for long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import INTERPRETED

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from tests.attention.hopper.on_host import Device, on_host

from flashbias.attention.hopper import backward, order, tiles, walks
from flashbias.attention.hopper.configs import ROWS, SLAB
from flashbias.attention.hopper.schedule import ordered
from flashbias.attention.layout import Sharing, cdiv

Slab = tuple[int, int, int]
"""Pair, head of its group, tile of queries."""


@dataclass
class Call:
    """A backward pass as far as its additions go; functions of the kernels say what comes when."""

    n: int
    m: int
    pairs: int
    group: int
    consumers: int
    left: int
    right: int
    shift: int
    heads: int
    resident: int
    counter: int = 0
    tickets: dict[Slab, int] = field(default_factory=dict)
    adding: set[Slab] = field(default_factory=set)
    added: dict[Slab, list[int]] = field(default_factory=dict)

    @property
    def block_n(self) -> int:
        return ROWS * self.consumers

    @property
    def blocks(self) -> int:
        return cdiv(self.m, self.block_n)

    def seen(self, block: int) -> tuple[int, int]:
        """Tiles of queries that see a block."""
        sides = (self.left >= 0, self.right >= 0)
        lo, _, _, hi = tiles.query_tiles(
            block * self.block_n, self.n, self.shift, self.left, self.right, *sides, self.block_n
        )
        return int(lo), int(hi)

    def program(self) -> Iterator[Slab | None]:
        """What the warpgroup that adds does, from one wait to the next; it names a slab whose turn it waits for."""
        while self.counter < self.blocks * self.pairs:
            unit, self.counter = self.counter, self.counter + 1
            yield None
            pair, block = (int(x) for x in tiles.place_of(unit, self.blocks, self.pairs, self.heads, True))
            lo, hi = self.seen(block)
            _, end_before = self.seen(block - 1)
            last: Slab | None = None
            for g in range(self.group):
                for n in range(hi - lo):
                    yield None
                    if last is not None:
                        self.hand_over(last, block)
                    last = (pair, g, int(walks.tile_at(lo, n, hi - lo, 0, True)))
                    turn = int(order.turn_at(last[2], block, end_before))
                    while self.tickets.get(last, 0) < turn:
                        yield last
                    assert last not in self.adding, "two blocks add to a slab at once"
                    self.adding.add(last)
            yield None
            if last is not None:
                self.hand_over(last, block)

    def hand_over(self, slab: Slab, block: int) -> None:
        self.adding.remove(slab)
        self.added.setdefault(slab, []).append(block)
        self.tickets[slab] = block + 1

    def run(self, seed: int) -> None:
        """Run all programs, `resident` at a time; which goes on is drawn among those that can."""
        draw = random.Random(seed)
        waiting: dict[Iterator[Any], Slab | None] = {}
        turns: dict[Iterator[Any], int] = {}
        left = min(7, self.blocks * self.pairs)
        while left or waiting:
            while left and len(waiting) < self.resident:
                left -= 1
                waiting[self.program()] = None
            able = [p for p, slab in waiting.items() if slab is None or self.tickets.get(slab, 0) != turns[p]]
            assert able, "all programs that run wait"
            chosen = draw.choice(able)
            try:
                waiting[chosen] = next(chosen)
            except StopIteration:
                del waiting[chosen]
                continue
            slab = waiting[chosen]
            if slab is not None:
                turns[chosen] = self.tickets.get(slab, 0)


BANDS = [(-1, -1), (-1, 0), (-1, 70), (0, -1), (300, -1), (64, 0), (130, 90), (0, 0)]


@settings(deadline=None, max_examples=300)
@given(
    n=st.integers(1, 700),
    m=st.integers(1, 1200),
    pairs=st.integers(1, 6),
    group=st.integers(1, 2),
    consumers=st.sampled_from([2, 3]),
    band=st.sampled_from(BANDS),
    shift=st.integers(-300, 700),
    heads=st.integers(1, 6),
    resident=st.integers(1, 7),
    seed=st.integers(0, 2**20),
)
def test_all_is_added_in_one_order_by_any_number_of_programs(
    n: int, m: int, pairs: int, group: int, consumers: int, band: tuple[int, int], shift: int, heads: int,
    resident: int, seed: int,
):  # fmt: skip
    """Also by one that runs alone, before the others start."""
    with on_host(Device(0), (walks, order, tiles)):
        call = Call(n, m, pairs, group, consumers, *band, shift, min(heads, pairs), resident)
        call.run(seed)
        ranges = [call.seen(block) for block in range(call.blocks)]
        for pair in range(pairs):
            for g in range(group):
                for tile in range(cdiv(n, SLAB)):
                    expected = [block for block, (lo, hi) in enumerate(ranges) if lo <= tile < hi]
                    assert call.added.pop((pair, g, tile), []) == expected
        assert not call.added


def call(
    sharing_q: Sharing, sharing_k: Sharing, group: int = 1, rank: int = 16, width: int = 64, is_varlen: bool = False
) -> Any:
    """What the choice of kernels looks at."""
    return SimpleNamespace(
        sharing_q=sharing_q, sharing_k=sharing_k, group=group, rank=rank, is_varlen=is_varlen, is_tile_centred=False,
        table=None, mask=None, block_d=width, block_dv=width, head_dim=width, head_dim_v=width,
    )  # fmt: skip


class TestChoice:
    @pytest.mark.parametrize(
        ("sharing_q", "sharing_k", "group", "own_q", "own_k"),
        [
            (Sharing(1, 1, 12, 1), Sharing(1, 1, 12, 1), 1, True, True),
            (Sharing(1, 3, 4, 1), Sharing(1, 1, 12, 1), 1, False, True),
            (Sharing(1, 1, 12, 1), Sharing(1, 12, 1, 1), 1, True, False),
            (Sharing(1, 1, 12, 1), Sharing(1, 1, 6, 2), 2, True, True),
            (Sharing(1, 1, 12, 1), Sharing(1, 3, 2, 2), 2, True, False),
        ],
    )
    @pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
    def test_pairs_add_to_gradients_of_their_own(
        self, sharing_q: Sharing, sharing_k: Sharing, group: int, own_q: bool, own_k: bool, needs: tuple[bool, bool]
    ):
        """Pairs do not wait for each other."""
        expected = (own_q or not needs[0]) and (own_k or not needs[1])
        assert backward.is_ordered(call(sharing_q, sharing_k, group), (True, True, True, *needs, False)) == expected

    def test_packed_batches_have_no_order(self):
        own = Sharing(1, 1, 12, 1)
        assert not backward.is_ordered(call(own, own, is_varlen=True), (True, True, True, False, False, False))

    def test_wide_factors_that_are_summed_apart_have_no_order(self):
        shared = Sharing(1, 12, 4, 1)
        ops = call(shared, shared, rank=33)
        assert backward.are_summed_apart(ops)
        assert not backward.is_ordered(ops, (True, True, True, True, False, False))
        assert backward.is_ordered(ops, (True, True, True, False, False, False))

    @pytest.mark.parametrize(("width", "expected"), [(16, False), (64, False), (128, True)])
    def test_gradients_of_factors_beside_wide_heads_are_slower(self, width: int, expected: bool):
        own = Sharing(1, 1, 12, 1)
        ops = call(own, own, width=width)
        assert backward.is_slower(ops, 16, repeatable=True) == expected
        assert not backward.is_slower(ops, 16)
        assert not backward.is_slower(ops, 0, repeatable=True)


class TestSchedule:
    @settings(deadline=None, max_examples=100)
    @given(
        blocks=st.integers(1, 300), pairs=st.integers(1, 300), pair_bytes=st.sampled_from([2**10, 2**21, 2**26]),
        programs=st.integers(1, 140),
    )  # fmt: skip
    def test_each_block_comes_after_the_one_before(self, blocks: int, pairs: int, pair_bytes: int, programs: int):
        plan = ordered(blocks, pairs, pair_bytes, programs)
        assert plan.units == plan.whole == blocks * pairs
        assert plan.programs == min(programs, plan.units)
        with on_host(Device(0), (tiles,)):
            places = [tiles.place_of(unit, blocks, pairs, plan.heads, True) for unit in range(min(plan.units, 3000))]
        next_block = [0] * pairs
        for pair, block in places:
            assert block == next_block[pair]
            next_block[pair] += 1

    @pytest.mark.parametrize("pairs", [33, 64, 65, 128, 2048])
    def test_few_blocks_of_a_pair_run_at_the_same_time(self, pairs: int):
        assert ordered(64, pairs, 2**30, 132).heads >= 33

    @pytest.mark.parametrize(
        ("name", "n", "bands", "pairs", "most"),
        [
            ("full", 8192, (-1, -1), 16, 1.02),
            ("full, few heads", 8192, (-1, -1), 8, 1.05),
            ("causal", 4096, (-1, 0), 128, 1.05),
            ("causal, few heads", 8192, (-1, 0), 25, 1.05),
            ("window", 8192, (1024, 0), 16, 1.05),
            ("short", 576, (-1, -1), 1024, 1.02),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_waits_are_short(self, name: str, n: int, bands: tuple[int, int], pairs: int, most: float):
        """Against the same schedule without waits, where an addition takes half a step more to be handed over."""
        with on_host(Device(0), (walks, order, tiles)):
            call = Call(n, n, pairs, 1, 2, *bands, 0, 0, 132)
            ranges = [call.seen(block) for block in range(call.blocks)]
            walks_of = [[int(walks.tile_at(lo, i, hi - lo, 0, True)) for i in range(hi - lo)] for lo, hi in ranges]
            plan = ordered(call.blocks, pairs, n * 256, 132)
            units = [
                tuple(int(x) for x in tiles.place_of(unit, call.blocks, pairs, plan.heads, True))
                for unit in range(plan.units)
            ]
        assert _duration(units, walks_of, 1.5) <= most * _duration(units, walks_of, -float("inf"))


def _duration(units: list[tuple[int, ...]], walks_of: list[list[int]], latency: float) -> float:
    """Steps that 132 programs take which draw units one after the other, two steps for each unit beside its own."""
    free = [0.0] * 132
    done: dict[int, dict[int, float]] = {}
    for pair, block in units:
        now = free.pop(free.index(min(free))) + 2
        before = done.get(pair, {})
        own = {}
        for tile in walks_of[block]:
            now = max(now + 1, before.get(tile, -float("inf")) + latency)
            own[tile] = now
        done[pair] = before | own
        free.append(now)
    return max(free)
