"""Packed batches on Hopper: the kernel's own arithmetic and its descriptors, run on the host."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import INTERPRETED
from torch import Tensor

import flashbias as fb
from flashbias.attention.hopper.schedule import OVERHEAD, Band, Schedule, jagged

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from triton.runtime.jit import JITFunction

from flashbias.attention.hopper import tiles, walks
from flashbias.attention.hopper.configs import SLAB
from flashbias.attention.hopper.operands import FAR, packed

CAUSAL = Band(0, -1, 0)


# -------------------------------------------------------------------- device functions, on the host


@dataclass(frozen=True)
class Pointer:
    """The address of an element."""

    x: Tensor
    index: int = 0

    def __add__(self, step: int) -> Pointer:
        return Pointer(self.x, self.index + int(step))


def load(pointer: Pointer) -> int:
    assert 0 <= pointer.index < len(pointer.x), "outside of the tensor"
    return int(pointer.x[pointer.index])


class Slots(dict[int, Any]):
    """Shared memory, slot by slot: what is stored in one is what is loaded from it."""

    def index(self, slot: int) -> SimpleNamespace:
        return SimpleNamespace(store=lambda x: self.update({slot: x}), load=lambda layout: self[slot])


@contextmanager
def on_host(*more: ModuleType) -> Iterator[SimpleNamespace]:
    """Functions of `tiles.py` and more as Python, for the program that this names; tickets come from one counter."""
    chosen = SimpleNamespace(place=0, count=1, tickets=itertools.count())
    host = SimpleNamespace(
        load=load, minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b,
        full=lambda shape, x, *rest: x, max=lambda x, axis: x, int32=int, BlockedLayout=lambda *rest: None,
        program_id=lambda axis: chosen.place, num_programs=lambda axis: chosen.count,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in (tiles, *more):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, function.fn)
            patch.setattr(module, "gl", host)
            patch.setattr(module, "SLAB", SLAB)
        patch.setattr(tiles, "FAR", FAR)
        patch.setattr(tiles, "mbarrier", SimpleNamespace(wait=lambda *_: None, arrive=lambda *_: None))
        patch.setattr(tiles, "ticket", lambda pointer: next(chosen.tickets))
        yield chosen


@dataclass(frozen=True)
class Unit:
    """What a program learns about one of its units."""

    sequence: int
    head: int
    block: int
    queries: tuple[int, int, int, int]
    keys: tuple[int, int, int, int]
    diagonal: int


class Program:
    """One program: its loading warp, which claims units, and a warpgroup, which is told."""

    def __init__(self, place: int, batch: tuple[Any, ...], rows: int) -> None:
        self.place, self.batch, self.rows, self.turn, self.unit = place, batch, rows, 0, 0
        self.walk = self.told = (-1, 0)
        self.queue = (None, Slots(), Slots(), Slots())

    def claim(self) -> Unit | None:
        """The next unit, None after the last."""
        self.unit, self.walk = tiles.claimed(self.turn, self.walk, self.batch, self.queue, self.rows)
        heard, self.told = tiles.heard_of(self.turn, self.told, self.batch, self.queue, self.rows)
        self.turn += 1
        assert heard == self.unit
        if self.unit < 0:
            return None
        assert self.told == self.walk
        deal = (0,) * 6  # of batches that are not packed
        h, own, block, part, queries, keys, diagonal = tiles.place_in_batch(
            self.unit, self.walk, deal, self.batch, True, False, False
        )
        assert own == h and part == -1
        return Unit(self.walk[0], h, block, queries, keys, diagonal)


def units_of(
    plan: Schedule, cu_q: Tensor, cu_k: Tensor, heads: int, rows: int, bottom_right: bool, seed: int = 0
) -> Iterator[Unit]:
    """All units of all programs, which get on at any pace."""
    batch = (Pointer(cu_q), Pointer(cu_k), len(cu_q) - 1, heads, int(cu_q[-1]), int(cu_k[-1]), int(bottom_right))
    running = [Program(place, batch, rows) for place in range(plan.programs)]
    pace = random.Random(seed)
    with on_host() as program:
        program.count = plan.programs
        while running:
            chosen = pace.choice(running)
            program.place = chosen.place
            unit = chosen.claim()
            if unit is None:
                running.remove(chosen)
            else:
                yield unit


def key_units(
    place: int, plan: Schedule, cu_q: Tensor, cu_k: Tensor, kv_heads: int, rows: int, bottom_right: bool
) -> Iterator[tuple[int, Any]]:
    """Sequence and place of each unit of the backward pass that one program takes, told by its loading warp."""
    with on_host(walks) as program:
        program.place, program.count = place, plan.programs
        program.tickets = itertools.count() if place == 0 else itertools.count(10**6)
        queue = (None, Slots(), Slots(), Slots())
        deal = (plan.units, 0, len(cu_k) - 1, 0)
        batch = (Pointer(cu_k), Pointer(cu_q), kv_heads, 1, 0, 0)
        walk = told = (-1, 0)
        for turn in itertools.count():
            unit, walk, turns = walks.next_unit(turn, walk, 0, deal, batch, queue, True, False, rows)
            heard, told, also = walks.told_unit(turn, told, 0, deal, batch, queue, True, False, rows)
            assert (heard, also) == (unit, turns)
            if turns == turn:
                return
            assert told == walk
            place = walks.place_of_keys(
                turn, unit, walk, deal, batch, int(bottom_right), True, False, False, False, rows
            )
            yield walk[0], place


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


class TestUnits:
    @settings(deadline=None, max_examples=80)
    @given(
        lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=12),
        heads=st.integers(1, 5),
        rows=st.sampled_from([4, 16, 64]),
        programs=st.integers(1, 9),
        bottom_right=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_every_block_of_every_head_is_dealt_once(
        self, lengths: list[tuple[int, int]], heads: int, rows: int, programs: int, bottom_right: bool, seed: int
    ) -> None:
        lengths_q, lengths_k = ([pair[side] for pair in lengths] for side in range(2))
        cu_q, cu_k = starts(lengths_q), starts(lengths_k)
        plan = jagged(sum(lengths_q), len(lengths), heads, rows, programs)
        seen = Counter()
        for unit in units_of(plan, cu_q, cu_k, heads, rows, bottom_right, seed):
            seen[unit.sequence, unit.head, unit.block] += 1
            n, m = lengths[unit.sequence]
            for cu, size, found in (
                (cu_q, n, unit.queries), (cu_k, m, unit.keys)
            ):  # fmt: skip
                assert found == (cu[unit.sequence], size, cu[unit.sequence + 1], FAR - size)
            assert unit.diagonal == (m - n if bottom_right else 0)
        blocks = [
            (s, h, block) for s, n in enumerate(lengths_q) for h in range(heads) for block in range(-(-n // rows))
        ]
        assert seen == Counter(blocks)

    @pytest.mark.parametrize(
        "lengths", [[2048] * 8, [4096] * 4, [100, 4000, 900, 2500, 50, 3100] * 2, [8000] + [300] * 40]
    )
    @pytest.mark.parametrize("heads", [8, 16, 40])
    def test_programs_are_equally_busy_under_a_causal_mask(self, heads: int, lengths: list[int]) -> None:
        """Whoever is done first claims the next unit."""
        rows = keys = 128
        cu, plan = starts(lengths), jagged(sum(lengths), len(lengths), heads, rows, 132)
        batch = (Pointer(cu), Pointer(cu), len(lengths), heads, sum(lengths), sum(lengths), 0)
        running = [(0.0, place, Program(place, batch, rows)) for place in range(plan.programs)]
        ends, total = [], 0.0
        with on_host() as program:
            program.count = plan.programs
            while running:
                time, place, chosen = heapq.heappop(running)
                program.place = place
                unit = chosen.claim()
                if unit is None:
                    ends.append(time)
                    continue
                cost = OVERHEAD + CAUSAL.key_tiles(unit.block * rows, rows, keys, lengths[unit.sequence])
                total += cost
                heapq.heappush(running, (time + cost, place, chosen))
        assert max(ends) <= 1.06 * total / plan.programs


class TestKeyUnits:
    """Blocks of keys, as the backward pass deals them."""

    @settings(deadline=None, max_examples=60)
    @given(
        lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=12),
        kv_heads=st.integers(1, 5),
        rows=st.sampled_from([4, 16, 64]),
        programs=st.integers(1, 9),
        bottom_right=st.booleans(),
    )
    def test_every_block_of_every_head_is_dealt_once(
        self, lengths: list[tuple[int, int]], kv_heads: int, rows: int, programs: int, bottom_right: bool
    ) -> None:
        lengths_q, lengths_k = ([pair[side] for pair in lengths] for side in range(2))
        cu_q, cu_k = starts(lengths_q), starts(lengths_k)
        plan = jagged(sum(lengths_k), len(lengths), kv_heads, rows, programs)
        seen = Counter()
        for place in range(plan.programs):
            for s, (b, hk, block, blocks, queries, keys, diagonal, slab) in key_units(
                place, plan, cu_q, cu_k, kv_heads, rows, bottom_right
            ):
                seen[s, hk, block] += 1
                n, m = lengths[s]
                assert (b, blocks) == (0, -(-m // rows))
                assert queries == (cu_q[s], n, cu_q[s + 1], FAR - n)
                assert keys == (cu_k[s], m, cu_k[s + 1], FAR - m)
                assert diagonal == (m - n if bottom_right else 0)
                assert slab == cu_q[s] // SLAB + s
        blocks = [
            (s, h, block) for s, m in enumerate(lengths_k) for h in range(kv_heads) for block in range(-(-m // rows))
        ]
        # Programs run one after the other here: the first one takes all that the others do not begin with.
        assert seen == Counter(blocks)

    @pytest.mark.parametrize(
        "lengths", [[2048] * 8, [4096] * 4, [100, 4000, 900, 2500, 50, 3100] * 2, [8000] + [300] * 40]
    )
    @pytest.mark.parametrize("heads", [8, 16, 40])
    @pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
    def test_programs_are_equally_busy(self, is_causal: bool, heads: int, lengths: list[int]) -> None:
        """Whoever is done first claims the next unit."""
        keys, programs = 128, 132
        ends, total = [0.0] * programs, 0.0
        for n in lengths:
            for block in range(-(-n // keys)):
                cost = OVERHEAD + -(-n // SLAB) - (block * keys // SLAB if is_causal else 0)
                total += heads * cost
                for _ in range(heads):
                    heapq.heapreplace(ends, ends[0] + cost)
        assert max(ends) <= 1.06 * total / programs


# -------------------------------------------------------------------- boxes, on the host


def addresses(descriptor: Any, corner: list[int]) -> tuple[Tensor, Tensor]:
    """Of each element of a box: its address, and whether the copy engine touches it."""
    address, inside = torch.tensor(descriptor.base.data_ptr()), torch.tensor(True)
    size = descriptor.base.element_size()
    for axis, (first, count) in enumerate(zip(corner, descriptor.block_shape, strict=True)):
        shape = [-1 if other == axis else 1 for other in range(len(corner))]
        place = (first + torch.arange(count)).reshape(shape)
        address = address + place * descriptor.strides[axis] * size
        inside = inside & (place >= 0) & (place < descriptor.shape[axis])
    return address.flatten(0, -3)[0], inside.expand(descriptor.block_shape).flatten(0, -3)[0]


def elements(descriptor: Any, corner: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a box, as a matrix: where its elements lie in the storage, those that exist, and the storage."""
    address, inside = addresses(descriptor, corner)
    x = descriptor.base
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    index = (address - storage.data_ptr()) // x.element_size()
    assert ((index >= 0) & (index < len(storage)))[inside].all(), "outside of the storage"
    return index, inside, storage


def read(descriptor: Any, corner: list[int]) -> Tensor:
    """A box as the copy engine reads it."""
    index, inside, storage = elements(descriptor, corner)
    return torch.where(inside, storage[torch.where(inside, index, 0)], 0.0)


def write(descriptor: Any, corner: list[int], rows: Tensor) -> None:
    """Write a box as the copy engine does."""
    index, inside, storage = elements(descriptor, corner)
    storage[index[inside]] = rows.to(storage.dtype)[inside]


@pytest.mark.parametrize("order", ["tokens first", "heads first", "sliced"])
@pytest.mark.parametrize("heads", [1, 3])
def test_boxes_end_where_a_sequence_ends(heads: int, order: str) -> None:
    lengths = [5, 0, 33, 1, 16, 40]
    cu, width = starts(lengths), 24
    x = torch.randn(sum(lengths), heads, 2 * width).bfloat16()[..., :width]
    x = {"tokens first": x.contiguous(), "heads first": x.transpose(0, 1).contiguous().transpose(0, 1), "sliced": x}[
        order
    ]
    descriptor = packed(x.transpose(0, 1)[None], 16, 32)
    for (s, n), h in itertools.product(enumerate(lengths), range(heads)):
        own = x[cu[s] : cu[s + 1], h]
        for first in range(0, n + 32, 16):
            found = read(descriptor, [FAR, int(cu[s + 1]), h, FAR - n + first, 0])
            expected = torch.zeros(16, 32).bfloat16()
            rows = own[first : first + 16]
            expected[: len(rows), :width] = rows
            assert torch.equal(found, expected)


def test_a_batch_of_one_token() -> None:
    x = torch.randn(1, 2, 16).bfloat16()
    descriptor = packed(x.transpose(0, 1)[None], 16, 16)
    for h in range(2):
        found = read(descriptor, [FAR, 1, h, FAR - 1, 0])
        assert torch.equal(found[0], x[0, h])
        assert (found[1:] == 0).all()


# -------------------------------------------------------------------- the whole walk, on the host


@pytest.mark.parametrize(("kv_heads", "head_dim_v"), [(1, 32), (2, 16), (4, 32)])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "bottom_right"}, {"window": (9, 4)}],
    ids=["full", "top left", "bottom right", "window"],
)
def test_attention_by_these_boxes(options: dict[str, Any], kv_heads: int, head_dim_v: int) -> None:
    """Every sequence alone, whatever stands in the others; what a box holds of a neighbour may be NaN."""
    torch.manual_seed(0)
    heads, rows, keys_of_tile, head_dim = 4, 16, 8, 16
    lengths_q, lengths_k = [17, 0, 5, 33, 8, 3], [9, 4, 21, 33, 0, 16]
    options = {"causal_alignment": "top_left"} | options if options else {}
    widths = {"q": (sum(lengths_q), heads, head_dim), "k": (sum(lengths_k), kv_heads, head_dim)}
    q, k, v = (torch.randn(size) for size in (*widths.values(), (sum(lengths_k), kv_heads, head_dim_v)))
    cu_q, cu_k = starts(lengths_q), starts(lengths_k)
    left, right = options.get("window", (-1, -1))
    right = 0 if options.get("is_causal") else right
    bottom_right = options.get("causal_alignment") == "bottom_right"
    expected = fb.varlen_attention(q, k, v, cu_q, cu_k, impl="reference", enable_gqa=True, **options)
    assert isinstance(expected, Tensor)

    for poisoned in range(len(lengths_q)):
        own_q, own_k = (slice(int(cu[poisoned]), int(cu[poisoned + 1])) for cu in (cu_q, cu_k))
        tensors = [x.clone() for x in (q, k, v)]
        for x, own in zip(tensors, (own_q, own_k, own_k), strict=True):
            x[own] = math.nan
        out = torch.full((sum(lengths_q), heads, head_dim_v), math.nan)
        boxes = (
            (tensors[0], rows, 16),
            (tensors[1], keys_of_tile, 16),
            (tensors[2], keys_of_tile, 32),
            (out, rows, 32),
        )
        q_desc, k_desc, v_desc, o_desc = (packed(x.transpose(0, 1)[None], size, width) for x, size, width in boxes)
        plan = jagged(sum(lengths_q), len(lengths_q), heads, rows, 5)
        for unit in list(units_of(plan, cu_q, cu_k, heads, rows, bottom_right)):
            start_m, h, own = unit.block * rows, unit.head, unit.keys[1]
            with on_host():
                lo, full_lo, full_hi, hi = tiles.key_tiles(
                    start_m, own, unit.diagonal, left, right, left >= 0, right >= 0, rows, keys_of_tile
                )
            places = [
                [FAR, unit.keys[2], h // (heads // kv_heads), unit.keys[3] + n * keys_of_tile, 0] for n in range(lo, hi)
            ]
            queries = read(q_desc, [FAR, unit.queries[2], h, unit.queries[3] + start_m, 0])
            own_keys, values = (torch.cat([read(x, place) for place in places]) for x in (k_desc, v_desc))
            i = start_m + torch.arange(rows)[:, None] + unit.diagonal
            j = lo * keys_of_tile + torch.arange(len(own_keys))
            keep = j < own
            keep = keep & (j <= i + right) if right >= 0 else keep
            keep = keep & (j >= i - left) if left >= 0 else keep
            # Only the last tile, and those outside of the full ones, get a mask in the kernel.
            tile = j // keys_of_tile
            is_masked = (tile == hi - 1) | ((tile < full_lo) | (tile >= full_hi) if left >= 0 or right >= 0 else False)
            exists = start_m + torch.arange(rows) < unit.queries[1]
            assert (keep | is_masked)[exists.nonzero()].all()
            scores = (queries @ own_keys.mT * head_dim**-0.5).masked_fill(~keep, -math.inf)
            weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
            sums = weights.sum(-1, keepdim=True)
            write(o_desc, [FAR, unit.queries[2], h, unit.queries[3] + start_m, 0],
                  weights @ values / torch.where(sums == 0, 1.0, sums))  # fmt: skip
        others = torch.ones(len(out), dtype=torch.bool)
        others[own_q] = False
        torch.testing.assert_close(out[others], expected[others])
