"""Sums of the fused backward pass: their order in shared memory and in a gradient is one and the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import INTERPRETED

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

from flashbias.attention.hopper import slabs
from flashbias.attention.hopper.configs import SLAB

WIDTHS = (16, 32, 64)


def index(i: int, j: int) -> int:
    """Place of (i, j) in a slab, bit by bit as the module's docstring has it."""
    return (j & 1) + 2 * (i >> 3 & 1) + 4 * (j >> 1 & 3) + 16 * (i & 7) + 128 * (i >> 4) + 512 * (j >> 3)


@pytest.mark.parametrize("columns", WIDTHS)
def test_every_number_has_a_place_of_its_own(columns: int) -> None:
    places = {index(i, j) for i, j in itertools.product(range(SLAB), range(columns))}
    assert places == set(range(SLAB * columns))


@pytest.mark.parametrize("columns", WIDTHS)
def test_shared_memory_has_that_order(columns: int) -> None:
    """Bit by bit: where the layout puts a place, the index finds it again."""
    bases = slabs.order_of(columns).offset_bases
    assert len(bases) == (SLAB * columns).bit_length() - 1
    for bit, (i, j) in enumerate(bases):
        assert index(i, j) == 1 << bit


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_thread_stores_four_numbers_in_a_row(columns: int) -> None:
    """A thread of a warpgroup holds (i, j), (i, j + 1), (i + 8, j), (i + 8, j + 1) of every eight columns."""
    for thread in range(128):
        i, j = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        for first in range(j, columns, 8):
            held = [index(i, first), index(i, first + 1), index(i + 8, first), index(i + 8, first + 1)]
            assert held == list(range(held[0], held[0] + 4))
            assert held[0] == first // 8 * 512 + 4 * thread


def check_unfolding(device: str, width: int, columns: int, is_turned: bool) -> None:
    """A gradient of fewer rows and columns than the slabs have, of either stride."""
    b, h, n, rows, held = 2, 3, 100, 128, width - 8
    exact = torch.randn(b, h, rows, width)
    sums = slabs.zeros(b * h, rows, width, columns, torch.device(device))
    assert sums.shape == (b * h, rows // SLAB, width // columns, SLAB * columns)
    for i, j in itertools.product(range(rows), range(width)):
        sums[:, i // SLAB, j // columns, index(i % SLAB, j % columns)] = exact[:, :, i, j].flatten().to(device)
    out = torch.full((b, h, held, n) if is_turned else (b, h, n, held), torch.nan, device=device)
    grad = out.transpose(-1, -2) if is_turned else out
    slabs.unfold(sums, grad, 0.5)
    torch.testing.assert_close(grad.cpu(), 0.5 * exact[:, :, :n, :held], rtol=0, atol=0)


def check_unfolding_packed(device: str, lengths: list[int], width: int, columns: int) -> None:
    """Every row of every sequence from its own slabs; what lies in the rest of these, and in empty ones, is NaN."""
    h, t, held = 3, sum(lengths), width - 8
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    sums = slabs.packed_zeros(h, t, len(lengths), width, columns, torch.device(device)).fill_(torch.nan)
    exact = torch.randn(h, t, width)
    order = torch.tensor([[index(i, j) for j in range(columns)] for i in range(SLAB)])
    for s, (start, n) in enumerate(zip(cu.tolist(), lengths, strict=False)):
        first = start // SLAB + s
        for tile, part in itertools.product(range(-(-n // SLAB)), range(width // columns)):
            rows = exact[:, start + tile * SLAB : min(start + (tile + 1) * SLAB, start + n)]
            numbers = rows[..., part * columns : (part + 1) * columns].to(device)
            assert sums[:, first + tile, part, order[: rows.shape[1]].to(device)].isnan().all(), "a slab has two owners"
            sums[:, first + tile, part, order[: rows.shape[1]].to(device)] = numbers
    out = torch.full((1, h, t, held), torch.nan, device=device)
    slabs.unfold(sums, out, 0.5, cu.to(device))
    torch.testing.assert_close(out[0].cpu(), 0.5 * exact[..., :held], rtol=0, atol=0)


LENGTHS = [[100], [64, 64, 64], [1, 63, 64, 65, 127, 128, 129], [0, 5, 0, 0, 200, 0], [63] * 9, [1] * 70, [0, 0]]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_sequences_have_slabs_of_their_own(lengths: list[int]) -> None:
    """One after the other, and as many as there is room for."""
    starts = [0, *itertools.accumulate(lengths)]
    end = 0
    for s, n in enumerate(lengths):
        first = starts[s] // SLAB + s
        assert first >= end
        end = first + -(-n // SLAB)
    made = slabs.packed_zeros(2, starts[-1], len(lengths), 16, 16, torch.device("cpu"))
    assert end <= made.shape[1] == starts[-1] // SLAB + len(lengths)


CASES = [(16, 16, False), (32, 32, True), (64, 64, False), (128, 64, False)]


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
@pytest.mark.parametrize(("width", "columns", "is_turned"), CASES)
def test_unfold(width: int, columns: int, is_turned: bool) -> None:
    check_unfolding("cpu", width, columns, is_turned)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("width", "columns"), [(16, 16), (128, 64)])
def test_unfold_packed(lengths: list[int], width: int, columns: int) -> None:
    check_unfolding_packed("cpu", lengths, width, columns)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("width", "columns"), [(16, 16), (128, 64)])
def test_unfold_packed_on_a_gpu(lengths: list[int], width: int, columns: int) -> None:
    check_unfolding_packed("cuda", lengths, width, columns)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "columns", "is_turned"), CASES)
def test_unfold_on_a_gpu(width: int, columns: int, is_turned: bool) -> None:
    check_unfolding("cuda", width, columns, is_turned)
