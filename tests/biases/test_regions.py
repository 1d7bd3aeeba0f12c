"""Masks between regions: the mask that Swin builds, boolean masks, halves, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashbias as fb

sides = st.integers(1, 4)


def swin_mask(size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> Tensor:
    """Number regions by three slices of each axis; cut into windows; -100 between numbers. `[windows, N, N]`."""
    numbers = torch.zeros(size)
    slices = [(slice(0, -w), slice(-w, -s or None), slice(-s, None)) for w, s in zip(window, shift, strict=True)]
    for count, region in enumerate(itertools.product(*slices)):
        numbers[region] = count
    starts = itertools.product(*(range(0, length, w) for length, w in zip(size, window, strict=True)))
    cuts = [tuple(slice(a, a + w) for a, w in zip(start, window, strict=True)) for start in starts]
    windows = torch.stack([numbers[cut].flatten() for cut in cuts])
    return torch.where(windows[:, None, :] != windows[:, :, None], -100.0, 0.0)


def up_to_rows(matrix: Tensor) -> Tensor:
    """Take off each row's largest entry, which no attention weight sees."""
    return matrix - matrix.amax(-1, keepdim=True)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    """Size, window and shift of an image or a video; every axis shifted, as in Swin."""
    axes = range(draw(st.integers(2, 3)))
    window = tuple(draw(st.integers(2, 4)) for _ in axes)
    size = tuple(draw(sides) * side for side in window)
    return size, window, tuple(draw(st.integers(1, side - 1)) for side in window)


@given(partition=partitions())
def test_equals_the_mask_of_swin(partition: tuple[tuple[int, ...], ...]) -> None:
    size, window, shift = partition
    bias = fb.ShiftedWindowMask(3, size, window, shift)()
    expected = swin_mask(size, window, shift)
    assert bias.rank == 2 ** len(size) - 1
    assert torch.equal(up_to_rows(bias.dense()[:, 0]), expected)


def test_shift_is_half_the_window_by_default() -> None:
    mask = fb.ShiftedWindowMask(1, (14, 10), (7, 5))
    assert mask.shift == (3, 2)
    assert torch.equal(up_to_rows(mask().dense()[:, 0]), swin_mask((14, 10), (7, 5), (3, 2)))


def test_windows_before_the_edges_have_no_bias_at_all() -> None:
    dense = fb.ShiftedWindowMask(1, (12, 12), (4, 4))().dense().unflatten(0, (3, 3))
    assert not dense[:2, :2].any()
    assert all(dense[y, x].any() for y, x in ((2, 0), (0, 2), (2, 2)))


@pytest.mark.parametrize(("shift", "rank"), [((0, 1), 1), ((2, 0), 1), ((1, 2), 3)])
def test_an_axis_without_a_shift_costs_nothing(shift: tuple[int, int], rank: int) -> None:
    bias = fb.ShiftedWindowMask(1, (6, 6), (3, 3), shift)()
    assert bias.rank == rank
    last = up_to_rows(bias.dense()[-1, 0]).view(3, 3, 3, 3)  # y, x of the query; y, x of the key
    assert bool(last[0, 0, -1, 0]) == (shift[0] > 0)
    assert bool(last[0, 0, 0, -1]) == (shift[1] > 0)


@given(data=st.data(), num_regions=st.integers(2, 6), penalty=st.sampled_from([8.0, 20.0, 100.0]))
def test_attention_equals_a_boolean_mask(data: st.DataObject, num_regions: int, penalty: float) -> None:
    numbers = st.integers(0, num_regions - 1)
    region_k = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=12)))
    region_q = torch.tensor(data.draw(st.lists(st.sampled_from(region_k.tolist()), min_size=1, max_size=12)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = (
        torch.rand(2, 2, len(r), 4, dtype=torch.float64, generator=generator) for r in (region_q, region_k, region_k)
    )

    bias = fb.RegionMask(2, num_regions, penalty)(region_q, region_k)
    assert bias.rank == num_regions - 1
    found = fb.attention(q, k, v, bias)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=region_q[:, None] == region_k)
    # Entries are in [0, 1], so scores are in [0, 2]; each hidden key keeps exp(2 - penalty) of a key that is seen.
    leak = len(region_k) * math.exp(2.0 - penalty)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=leak + 1e-13)


@given(num_regions=st.integers(2, 5))
def test_no_row_constant_leaves_fewer_columns(num_regions: int) -> None:
    """Rank G - 1 is the least: that of the mask without its component along the rows' constants."""
    region = torch.arange(num_regions)
    different = (region[:, None] != region).double()
    least = torch.linalg.matrix_rank(different - different.mean(-1, keepdim=True))
    assert fb.RegionMask(1, num_regions)(region).rank == int(least)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("penalty", [100.0, 200.0, 2.0**-3, 2.0**15])
def test_penalty_survives_the_dtype(dtype: torch.dtype, penalty: float) -> None:
    region = torch.tensor([0, 1, 2, 1, 0])
    mask, windows = fb.RegionMask(1, 3, penalty), fb.ShiftedWindowMask(1, (4, 4), (2, 2), penalty=penalty)
    for bias, exact in ((mask(region, dtype=dtype), mask(region)), (windows(dtype=dtype), windows())):
        assert bias.phi_q.dtype == bias.phi_k.dtype == dtype
        assert torch.equal(bias.dense(torch.float64), exact.dense(torch.float64))
        assert set(up_to_rows(bias.dense(torch.float64)).flatten().tolist()) == {0.0, -penalty}


@pytest.mark.parametrize(
    ("dtype", "penalty"),
    [
        (torch.bfloat16, 100.3),
        (torch.bfloat16, 257.0),
        (torch.float16, 2049.0),
        (torch.float16, 2.0**16),
        (torch.float16, 2.0**-20),
        (torch.float32, 1e39),
    ],
    ids=str,
)
def test_dtypes_that_do_not_hold_the_penalty_are_refused(dtype: torch.dtype, penalty: float) -> None:
    region = torch.tensor([0, 1])
    for mask in (fb.RegionMask(1, 2, penalty), fb.ShiftedWindowMask(1, (2, 2), (2, 2), penalty=penalty)):
        arguments = (region,) if isinstance(mask, fb.RegionMask) else ()
        with pytest.raises(ValueError, match=f"{dtype} does not hold the penalty"):
            mask(*arguments, dtype=dtype)
        with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch\.int32"):
            mask(*arguments, dtype=torch.int32)


def test_joins_the_table_of_the_window() -> None:
    torch.manual_seed(0)
    table, mask = fb.WindowBias(2, (4, 3)), fb.ShiftedWindowMask(2, (8, 6), (4, 3))
    torch.nn.init.normal_(table.weight)
    q, k, v = torch.randn(3, 5, 4, 2, 12, 8, dtype=torch.float64)  # images, windows, heads, tokens, head_dim
    out = fb.attention(q, k, v, table() + mask())
    expected = q @ k.mT / 8**0.5 + table().dense() + swin_mask((8, 6), (4, 3), (2, 1))[:, None]
    torch.testing.assert_close(out, expected.softmax(-1) @ v, rtol=0.0, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 2, 16, 16)
    bias = fb.ShiftedWindowMask(2, (8, 8), (4, 4))(dtype=dtype)
    found, expected = (fb.attention(q, k, v, bias, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


def test_compiles_to_one_graph() -> None:
    mask, windows = fb.RegionMask(1, 3), fb.ShiftedWindowMask(1, (4, 4), (2, 2))

    def both(region: Tensor) -> tuple[Tensor, Tensor]:
        return mask(region).dense(), windows().dense()

    region = torch.tensor([0, 2, 1])
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(region), both(region), strict=True):
        assert torch.equal(found, expected)


def test_deferred_initialisation() -> None:
    for make in (lambda: fb.RegionMask(1, 3), lambda: fb.ShiftedWindowMask(1, (4, 6), (2, 3))):
        with torch.device("meta"):
            module = make()
        module.to_empty(device="cpu")
        module.reset_parameters()
        for found, expected in zip(module.buffers(), make().buffers(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("num_regions", [1, 0, -2, 2.0])
def test_bad_numbers_of_regions(num_regions: int) -> None:
    with pytest.raises(ValueError, match="num_regions must be an integer of at least 2"):
        fb.RegionMask(1, num_regions)


@pytest.mark.parametrize("penalty", [0.0, -100.0, math.inf, math.nan, True, "100"])
def test_bad_penalties(penalty: float) -> None:
    with pytest.raises(ValueError, match="penalty must be a positive finite number"):
        fb.RegionMask(1, 2, penalty)
    with pytest.raises(ValueError, match="penalty must be a positive finite number"):
        fb.ShiftedWindowMask(1, (4, 4), (2, 2), penalty=penalty)


def test_bad_regions() -> None:
    mask, right = fb.RegionMask(2, 3), torch.tensor([0, 1, 2])
    for wrong in (right.float(), right.bool()):
        with pytest.raises(TypeError, match="region_k must be integers"):
            mask(right, wrong)
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match=r"region_q must lie in 0 … 2, got (0 … 3|-1 … 2)"):
            mask(wrong)
    for wrong in (torch.tensor(1), right.expand(4, 3, 3)):
        with pytest.raises(ValueError, match=r"region_q must be \[length\] or \[\*batch, 2 or 1, length\]"):
            mask(wrong)


@pytest.mark.parametrize(
    ("size", "window", "shift", "message"),
    [
        ((4, 0), (2, 2), (1, 1), "size must be 2 or 3 positive integers"),
        ((8,), (2,), (1,), "size must be 2 or 3 positive integers"),
        ((8, 8.0), (2, 2), (1, 1), "size must be 2 or 3 positive integers"),
        ((4, 4), (2, -2), (1, 1), "window must be 2 positive integers"),
        ((4, 4), (2, 2, 2), (1, 1), "window must be 2 positive integers"),
        ((5, 7), (7, 7), (0, 0), r"window must divide size, got \(7, 7\) for \(5, 7\); .* be the axis, with a shift"),
        ((9, 8), (4, 4), (1, 1), "window must divide size.* pad the image"),
        ((8, 8), (4, 4), (4, 1), "shift must be 2 integers, 0 <= shift < "),
        ((8, 8), (4, 4), (1, -1), "shift must be 2 integers, 0 <= shift < "),
        ((8, 8), (4, 4), (1, 1.0), "shift must be 2 integers, 0 <= shift < "),
        ((8, 8), (4, 4), 2, "shift must be 2 integers, 0 <= shift < .*, got 2"),
        (8, (4, 4), None, "size must be 2 or 3 positive integers, got 8"),
        ((8, 8), 4, None, "window must be 2 positive integers, got 4"),
        ((8, 8), (4, 4), (1, 1, 1), "shift must be 2 integers, 0 <= shift < "),
        ((8, 8), (4, 4), (0, 0), r"shift must be positive on one axis, got \(0, 0\); .* leave the mask out"),
        ((8, 8), (1, 1), None, r"shift must be positive on one axis, got \(0, 0\)"),
    ],
)
def test_bad_partitions(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fb.ShiftedWindowMask(1, size, window, shift)
