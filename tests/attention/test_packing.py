"""Factors as kernel operands, against exact arithmetic.

A packed product is a sum of products of bfloat16 numbers. Where the docstring of a test says so, float64
holds each product and each partial sum exactly; elsewhere `fractions.Fraction` does.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashbias as fb
from flashbias.attention import packing

UNIT_ROUNDOFF = 2.0**-8
"""Largest relative error of rounding to bfloat16 (8 significant bits, to nearest)."""


def half_ulp(x: Tensor) -> Tensor:
    """Largest error of rounding a number of the binade of x to bfloat16; 0 for 0."""
    return torch.where(x == 0, 0.0, torch.exp2(torch.frexp(x).exponent - 9.0).double())


SLOPES = [2.0**-0.5, 0.7071067690849304, 2.0 ** (-8 / 16 * 15), 1.0, 0.1]
"""ALiBi slopes of heads, powers of two and not, as float32 holds them."""

MILLION = 2**20

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def exact(x: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in x.double().flatten().tolist()]


def exact_products(a: Tensor, b: Tensor) -> list[list[Fraction]]:
    """`a @ b.T` of two matrices without any rounding."""
    rows_a, rows_b = ([exact(row) for row in x] for x in (a, b))
    return [[sum((x * y for x, y in zip(p, q, strict=True)), Fraction(0)) for q in rows_b] for p in rows_a]


# -------------------------------------------------------------------- splitting


@given(st.lists(floats.filter(lambda x: x == 0 or 2.0**-100 < abs(x) < 2.0**126), min_size=1, max_size=8))
def test_three_parts_are_the_number(values: list[float]) -> None:
    x = torch.tensor(values)
    parts = packing.split(x, 3)
    assert [sum(p) for p in zip(*map(exact, parts), strict=True)] == exact(x)
    assert all(part.dtype == torch.bfloat16 for part in parts)


@given(st.lists(floats.filter(lambda x: 2.0**-100 < abs(x) < 2.0**126), min_size=1, max_size=8))
def test_each_part_is_the_rounding_of_what_is_left(values: list[float]) -> None:
    x = torch.tensor(values)
    first, second, third = packing.split(x, 3)
    assert torch.equal(first, x.bfloat16())
    assert (second.double().abs() <= UNIT_ROUNDOFF * x.double().abs()).all()
    assert (third.double().abs() <= UNIT_ROUNDOFF**2 * x.double().abs()).all()


def test_split_has_the_gradient_of_the_identity() -> None:
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(sum(p.float() for p in packing.split(x, 3)).sum(), x)  # type: ignore[union-attr]
    assert torch.equal(grad, torch.ones(5))


# -------------------------------------------------------------------- which products


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_ranks_keep_every_product_that_float32_can_see(rank: int, dtype: torch.dtype) -> None:
    kept = set(packing.products(rank, dtype))
    assert kept == {(a, b) for a in range(3) for b in range(3) if a + b <= 2}
    assert rank * len(kept) <= 32


@pytest.mark.parametrize("rank", [6, 16, 200])
def test_larger_ranks_keep_three_products(rank: int) -> None:
    assert set(packing.products(rank, torch.bfloat16)) == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_need_one_product(dtype: torch.dtype) -> None:
    assert packing.products(5, dtype) == ((0, 0),)


def test_half_precision_factors_are_operands_already() -> None:
    half, single = torch.zeros(1, 2, 1, dtype=torch.bfloat16), torch.zeros(1, 2, 1)
    assert not packing.is_packed(half, half, torch.bfloat16)
    assert packing.is_packed(single, single, torch.bfloat16)
    assert packing.is_packed(half, half, torch.float32)
    assert packing.is_packed(half, half.half(), torch.bfloat16)


def test_float16_has_no_room_for_parts() -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.float16.*torch\.bfloat16"):
        packing.pack(torch.ones(1, 2, 1), torch.ones(1, 2, 1), 1.0, torch.float16)


@pytest.mark.parametrize(
    ("x", "expected"), [(1.0, True), (0.125, True), (4.0, True), (0.3, False), (0.0, False), (-2.0, False)]
)
def test_is_power_of_two(x: float, expected: bool) -> None:
    assert packing.is_power_of_two(x) is expected


# -------------------------------------------------------------------- pack


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([1.0, 0.125, 0.3, 1 / 24**0.5]),
    st.integers(0, 10**6),
)
def test_packed_product_is_the_bias_up_to_a_row_constant(rank: int, n: int, m: int, scale: float, seed: int) -> None:
    """Against Fractions, within the accuracy that `pack` states; the row constant is that of the centre."""
    generator = torch.Generator().manual_seed(seed)
    phi_q, phi_k = torch.randn(n, rank, generator=generator), torch.randn(m, rank, generator=generator)
    a, b = packing.pack(phi_q, phi_k, scale, torch.bfloat16)
    terms = len(packing.products(rank, torch.bfloat16))
    assert a.shape == (n, rank * terms)
    assert b.shape == (m, rank * terms)
    found, bias = exact_products(a, b), exact_products(phi_q, phi_k)
    # Three products leave 2^-16; six are at float32's accuracy: centring and scale cost a rounding each.
    accuracy = 3 * 2.0**-24 if terms == 6 else 2.0**-16
    centre = packing.centre_of(phi_k, torch.zeros(1, dtype=torch.int64), m)
    constant = exact_products(phi_q, centre)
    for i in range(n):
        for j in range(m):
            wanted = bias[i][j] - constant[i][0]
            size = float(phi_q[i].abs() @ (phi_k[j].abs() + centre[0].abs()))
            assert abs(float(found[i][j] * Fraction(scale) - wanted)) <= accuracy * size


def test_leading_parts_come_first() -> None:
    """`column = t * rank + r`: gradients, which need the leading parts alone, read a prefix."""
    rank, scale = 7, 0.5
    phi_q, phi_k = torch.randn(3, rank), torch.randn(4, rank)
    packed_q, packed_k = packing.pack(phi_q, phi_k, scale, torch.bfloat16)
    centre = packing.centre_of(phi_k, torch.zeros(1, dtype=torch.int64), 4)
    parts_q, parts_k = packing.split(phi_q / scale, 3), packing.split(phi_k - centre, 3)
    for t, (a, b) in enumerate(packing.products(rank, torch.bfloat16)):
        assert torch.equal(packed_q[:, t * rank : (t + 1) * rank], parts_q[a])
        assert torch.equal(packed_k[:, t * rank : (t + 1) * rank], parts_k[b])
    assert packing.products(rank, torch.bfloat16)[0] == (0, 0)


def test_pack_is_differentiable_as_the_product_is() -> None:
    phi_q, phi_k = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(4, 5)
    weight -= weight.mean(1, keepdim=True)  # as dS: rows sum to zero
    a, b = packing.pack(phi_q, phi_k, 0.25, torch.bfloat16)
    found = torch.autograd.grad((a.float() @ b.float().mT * 0.25 * weight).sum(), (phi_q, phi_k))
    wanted = torch.autograd.grad((phi_q @ phi_k.mT * weight).sum(), (phi_q, phi_k))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)  # bfloat16 gradients of parts


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("n", "m"), [(5, 7), (300, 300), (1, 300), (300, 10)])
def test_row_constant_is_what_centring_took(n: int, m: int, tiled: bool) -> None:
    bias = fb.FactoredBias(torch.randn(2, n, 3), torch.randn(2, m, 3))
    starts, length = packing.reference_starts(n, m, bias.device, tiled=tiled)
    constant = packing.row_constant(bias, tiled=tiled)
    rows = torch.stack([(starts + offset).clamp(0, m - 1) for offset in packing.centre_offsets(length)])
    median = bias.phi_k.double()[:, rows].median(dim=1).values
    wanted = (bias.phi_q.double() * median).sum(-1)
    torch.testing.assert_close(constant.double(), wanted, atol=1e-5, rtol=1e-5)


def test_row_constant_skips_padding_columns() -> None:
    phi_q, phi_k = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    bias = fb.FactoredBias(phi_q, phi_k, ranks=(1, 4))
    assert packing.row_constant(bias, tiled=False)[:, 0].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("masked", [5, 6, 8])
def test_a_centre_is_no_mask(masked: int) -> None:
    """Entries beyond what positions reach are not taken off, however many keys have them."""
    phi_k = torch.stack([torch.where(torch.arange(8) >= 8 - masked, -1e9, 0.5), 2.0**20 + torch.arange(8.0)], dim=-1)
    centre = packing.centre_of(phi_k, torch.zeros(1, dtype=torch.int64), 8)
    assert centre.tolist() == [[0.0, 2.0**20 + 4.0]]


# -------------------------------------------------------------------- never worse than a dense bias


def tile_centres(phi_k: Tensor, query: int) -> tuple[Tensor, Tensor]:
    """Centre of each key's tile, `[M, R]`, and the one that a query's scores are measured from, `[1, R]`."""
    seqlen = phi_k.shape[0]
    tiles = torch.arange(seqlen) // packing.CENTRE_TILE * packing.CENTRE_TILE
    starts, length = packing.reference_starts(seqlen, seqlen, phi_k.device, tiled=True)
    return (
        packing.centre_of(phi_k, tiles, packing.CENTRE_TILE),
        packing.centre_of(phi_k, starts[query : query + 1], length),
    )


def realised_alibi(slope: float, seqlen: int, query: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What packed operands add to the scores of one query, `[seqlen]`, without rounding.

    Exact in float64: a slope has 24 bits and an integer position less its centre at most 20, so that every
    partial sum has at most 45 bits of 53.
    """
    position = torch.arange(float(seqlen))[:, None]
    phi_q = torch.tensor([[slope]])
    if not packing.is_tile_centred(seqlen, torch.bfloat16):
        a, b = packing.pack(phi_q, position, 1.0, dtype)
        return (b.double() @ a.double().mT)[:, 0]
    centre, reference = tile_centres(position, query)
    a, b = packing.pack(phi_q, position, 1.0, dtype, centre)
    offset = phi_q.double() * (centre - reference).double()
    return (b.double() @ a.double().mT + offset)[:, 0]


def worst_excess(realised: Tensor, slope: float, query: int) -> float:
    """Largest error beyond that of a dense bfloat16 bias, over keys; errors are measured from the diagonal.

    A constant in a row changes no probability: the key at the query itself, of bias 0, fixes it.
    """
    distance = torch.arange(realised.shape[0], dtype=torch.float64) - query
    bias = torch.tensor(slope).double() * distance
    error = (realised - realised[query] - bias).abs()
    return (error - half_ulp(bias)).max().item()


QUERIES = {
    "first": 0,
    "second": 1,
    "tile-end": packing.CENTRE_TILE - 1,
    "tile-start": packing.CENTRE_TILE,
    "middle": 500_000,
    "last": MILLION - 1,
}


@pytest.mark.parametrize("slope", SLOPES, ids=str)
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_alibi_up_to_a_million_positions(slope: float, query: int) -> None:
    """Elementwise over 1,048,576 keys: never further from slope * (j - i) than its rounding to bfloat16."""
    slope = torch.tensor(slope).item()
    assert worst_excess(realised_alibi(slope, MILLION, query), slope, query) <= 0.0


@pytest.mark.parametrize("slope", SLOPES, ids=str)
@pytest.mark.parametrize("query", [0, 1, 127, 30_000, packing.TILE_CENTRE_FROM - 1])
def test_alibi_with_one_centre(slope: float, query: int) -> None:
    """The same for the longest sequence that has one centre for all keys."""
    slope = torch.tensor(slope).item()
    assert worst_excess(realised_alibi(slope, packing.TILE_CENTRE_FROM, query), slope, query) <= 0.0


def test_naive_half_precision_positions_break_the_promise() -> None:
    """The measure can fail: positions rounded to bfloat16 are off by up to 2^11 at 2^20."""
    slope, query = 1.0, MILLION - 1
    naive = torch.arange(float(MILLION)).bfloat16().double() * slope
    assert worst_excess(naive, slope, query) > 1000.0


def test_one_centre_would_not_reach_a_million() -> None:
    """What tiles of centres are for: one centre, summed in float32, is too coarse near the diagonal."""
    slope, query = torch.tensor(0.1).item(), MILLION - 1
    position = torch.arange(float(MILLION))[:, None]
    a, b = packing.pack(torch.tensor([[slope]]), position, 1.0, torch.bfloat16)
    columns = a.float() * b.float()  # exact products, summed in float32 as a matrix unit does
    assert worst_excess(columns.sum(1).double(), slope, query) > 0.0


@pytest.mark.parametrize("slope", SLOPES, ids=str)
@pytest.mark.parametrize("seqlen", [packing.TILE_CENTRE_FROM, MILLION])
def test_float32_accumulation_keeps_the_promise(slope: float, seqlen: int) -> None:
    """The sum as a kernel makes it, every step rounded to float32, on top of dot products of size about 1.

    Beyond the dense bias's own error only roundings of the dot product itself are allowed.
    """
    slope, query = torch.tensor(slope).item(), seqlen - 1
    position = torch.arange(float(seqlen))[:, None]
    centre, offset = None, torch.zeros(1)
    if packing.is_tile_centred(seqlen, torch.bfloat16):
        centre, reference = tile_centres(position, query)
        offset = torch.tensor(slope) * (centre - reference)[:, 0]
    a, b = packing.pack(torch.tensor([[slope]]), position, 1.0, torch.bfloat16, centre)
    dot = torch.randn(seqlen, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(seqlen)
    for column in range(a.shape[1]):
        total = total + a[0, column].float() * b[:, column].float()
    total = (total + dot) + offset
    realised = total.double() - dot.double()
    distance = torch.arange(seqlen, dtype=torch.float64) - query
    bias = torch.tensor(slope).double() * distance
    error = (realised - realised[query] - bias).abs()
    dot_rounding = 4 * 2.0**-24 * dot.abs().max().item()
    assert (error <= half_ulp(bias) + dot_rounding).all()


@pytest.mark.parametrize("origin", [0, 1000])
def test_squared_distances_far_from_the_origin(origin: int) -> None:
    """Integer points, so that every number is exact: the error of a row is below the dense bias's largest."""
    generator = torch.Generator().manual_seed(0)
    points = origin + torch.randint(-30, 31, (60, 3), generator=generator)
    x = points.float()
    ones = torch.ones(60, 1)
    phi_q = torch.cat([2 * x, -(x**2).sum(-1, keepdim=True), -ones], -1)
    phi_k = torch.cat([x, ones, (x**2).sum(-1, keepdim=True)], -1)
    a, b = packing.pack(phi_q, phi_k, 1.0, torch.bfloat16)
    difference = (points[:, None] - points[None]).double()
    bias = -(difference**2).sum(-1)
    error = a.double() @ b.double().mT - bias  # 16-bit products, exact in float64
    error = error - error.gather(1, torch.arange(60)[:, None])
    dense = half_ulp(bias).amax(1, keepdim=True)
    assert (error.abs() <= dense).all()
    naive = phi_q.bfloat16().double() @ phi_k.bfloat16().double().mT - bias
    if origin:
        assert not ((naive - naive.gather(1, torch.arange(60)[:, None])).abs() <= dense).all()


@pytest.mark.parametrize("outlier", ["first", "middle", "last"])
def test_one_outlying_key_does_not_spoil_the_others(outlier: str) -> None:
    """Any finite factors: a key of size 1e6, at the centre or elsewhere, costs the other keys nothing."""
    m = 64
    phi_q, phi_k = torch.full((1, 1), 0.7), torch.linspace(1.0, 2.0, m)[:, None]
    where = {"first": 0, "middle": m // 2, "last": m - 1}[outlier]
    phi_k[where] = 1e6
    a, b = packing.pack(phi_q, phi_k, 1.0, torch.bfloat16)
    bias = phi_k.double() @ phi_q.double().mT
    error = (b.double() @ a.double().mT - bias)[:, 0]
    calm = torch.arange(m) != where
    spread = error[calm].max() - error[calm].min()
    assert spread <= 2 * half_ulp(bias[calm]).max()


def test_hypothesis_draws_reach_the_limits() -> None:
    """`split` near the ends of float32: no part is infinite or NaN."""
    for value in (3.0e38, 1e-30, -3.0e38):
        assert all(part.isfinite().all() for part in packing.split(torch.tensor([value]), 3))
        assert math.isfinite(float(packing.split(torch.tensor([value]), 1)[0]))
