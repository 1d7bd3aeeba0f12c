"""ALiBi: the sign, the slopes of odd head counts, shards, and positions far away."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.biases import Alibi, alibi_slopes


def published_slopes(n: int) -> list[float]:
    """The authors' rule, recursive as they state it."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_two(closest) + published_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("num_heads", range(1, 129))
def test_official_slopes_for_every_head_count(num_heads: int):
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32
    expected = torch.tensor(published_slopes(num_heads), dtype=torch.float64)
    torch.testing.assert_close(slopes.double(), expected, rtol=2.0**-23, atol=0.0)


def test_slopes_as_printed_in_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(16)[:2].tolist() == pytest.approx([0.5**0.5, 0.5])


def test_slopes_of_twelve_heads_interleave_two_series():
    between = [2.0**-k for k in (0.5, 1.5, 2.5, 3.5)]
    assert alibi_slopes(12).tolist() == pytest.approx([2.0**-k for k in range(1, 9)] + between)


@given(num_heads=st.integers(1, 40), seqlen=st.integers(2, 30))
def test_nearer_keys_get_more(num_heads: int, seqlen: int):
    last_row = Alibi(num_heads)(seqlen, seqlen, dtype=torch.float64).dense()[:, -1]
    assert bool((last_row.diff(dim=-1) > 0).all())
    assert bool((last_row[:, -1] == 0).all())
    assert bool((last_row <= 0).all())


@given(num_heads=st.integers(1, 20), n=st.integers(1, 20), m=st.integers(1, 20), shift=st.integers(-5, 25))
def test_symmetric_is_never_positive_and_equal_in_both_directions(num_heads: int, n: int, m: int, shift: int):
    bias = Alibi(num_heads, symmetric=True)(n, m, query_offset=shift)
    distance = (torch.arange(m)[None, :] - torch.arange(n)[:, None] - shift).abs()
    assert torch.equal(bias.dense(), -alibi_slopes(num_heads)[:, None, None] * distance)


def test_symmetric_table_is_as_wide_as_needed():
    assert Alibi(2, symmetric=True)(7, 7).table.shape == (2, 13)


def test_shards_use_the_slopes_of_the_whole_model():
    whole = Alibi(12)(5, 9).dense()
    shards = [Alibi(12, heads=range(start, start + 3))(5, 9) for start in range(0, 12, 3)]
    assert all(shard.num_heads == 3 for shard in shards)
    assert torch.equal(torch.cat([shard.dense() for shard in shards]), whole)
    assert not torch.equal(Alibi(3)(5, 9).dense(), whole[:3])


def test_one_query_after_many_keys_is_the_last_row():
    whole = Alibi(6)(40, 40).dense()
    assert torch.equal(Alibi(6)(1, 40, query_offset=39).dense(), whole[:, -1:])


def test_keys_are_stored_once_for_all_heads():
    bias = Alibi(32)(16, 24)
    assert bias.phi_q.shape == (32, 16, 2)
    assert bias.phi_k.shape == (1, 24, 2)


@pytest.mark.parametrize("num_heads", [8, 12, 50])
@pytest.mark.parametrize("position", [4_096, 131_072, 1_048_576])
def test_far_positions_differ_from_the_formula_by_a_row_constant_only(num_heads: int, position: int):
    n, m = 5, 64
    start = position - m
    bias = Alibi(num_heads)(n, m, query_offset=position - n, key_offset=start)
    i = torch.arange(position - n, position, dtype=torch.float64)[:, None]
    j = torch.arange(start, position, dtype=torch.float64)[None, :]
    error = bias.dense(torch.float64) - bias.phi_q[:, :1, 1:].double() * (j - i)
    assert float((error.amax(-1) - error.amin(-1)).max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_module_keeps_its_slopes(dtype: torch.dtype):
    module = Alibi(12).to(dtype)
    assert torch.equal(module.slopes, alibi_slopes(12))
    assert module(3, 3).phi_q.dtype == torch.float32


def test_own_slopes():
    bias = Alibi(2, slopes=[1.0, 3.0])(2, 2)
    assert bias.dense().tolist() == [[[0.0, 1.0], [-1.0, 0.0]], [[0.0, 3.0], [-3.0, 0.0]]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_at_positions_equals_the_range(symmetric: bool):
    module = Alibi(6, symmetric=symmetric)
    called = module(7, 9, query_offset=4, key_offset=1)
    assert torch.equal(module.at(torch.arange(4, 11), torch.arange(1, 10)).dense(), called.dense())


@pytest.mark.parametrize("symmetric", [False, True])
def test_at_permuted_positions_permutes_the_bias(symmetric: bool):
    module, order = Alibi(4, symmetric=symmetric), torch.tensor([0, 7, 1, 6, 2, 5, 3, 4])
    expected = module(8, 8).dense()[:, order][:, :, order]
    assert torch.equal(module.at(order, order).dense(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_at_positions_of_narrow_dtypes(dtype: torch.dtype, symmetric: bool):
    """Their difference need not fit into the dtype that holds them."""
    info, module = torch.iinfo(dtype), Alibi(3, symmetric=symmetric)
    positions = torch.tensor([info.min, 0, 7, info.max], dtype=dtype)
    assert torch.equal(module.at(positions, positions).dense(), module.at(positions.long(), positions.long()).dense())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_empty(n: int, m: int, symmetric: bool):
    module = Alibi(2, symmetric=symmetric)
    assert module(n, m).shape == (2, n, m)
    assert module.at(torch.arange(n), torch.arange(m)).shape == (2, n, m)


def test_double_precision_on_request():
    assert Alibi(2)(3, 3, dtype=torch.float64).phi_q.dtype == torch.float64


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"slopes .*\(4,\)"):
        Alibi(4, slopes=[1.0, 2.0])
    with pytest.raises(ValueError, match="gradient"):
        Alibi(2, slopes=torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="heads"):
        Alibi(4, heads=range(2, 5))
    with pytest.raises(ValueError, match="heads"):
        Alibi(4, heads=[])
    with pytest.raises(ValueError, match=r"float16"):
        Alibi(4)(3, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"16777217"):
        Alibi(4)(2, 2, query_offset=2**24)
    Alibi(4)(2, 2, query_offset=2**24, dtype=torch.float64)
    with pytest.raises(ValueError, match="vector"):
        Alibi(4).at(torch.zeros(2, 2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(TypeError, match="position_k"):
        Alibi(4).at(torch.arange(2), torch.zeros(2))
    with pytest.raises(TypeError, match="position_q must be integers, got list"):
        Alibi(4).at([0, 1], torch.arange(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)
