"""Squared distances: far origins, half precision, shards, weights of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.biases import SquaredDistance


def square_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.double()[..., :, None, :] - y.double()[..., None, :, :]).square().sum(-1)


@given(dim=st.integers(1, 12), n=st.integers(0, 6), m=st.integers(0, 6))
def test_rank_is_two_more_than_the_dimension(dim: int, n: int, m: int):
    x, y = torch.randn(n, dim), torch.randn(m, dim)
    bias = SquaredDistance(3)(x, y)
    assert bias.rank == dim + 2
    assert bool(bias.phi_q.isfinite().all())
    torch.testing.assert_close(bias.dense(torch.float64)[0], -square_distance(x, y), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_coordinates_whose_squares_overflow(dtype: torch.dtype):
    x = (300 * torch.randn(20, 3)).to(dtype)
    bias = SquaredDistance(1)(x)
    assert bias.phi_k.dtype == torch.float32
    expected = -square_distance(x, x)
    assert float(expected.abs().max()) > 65_504
    torch.testing.assert_close(bias.dense(torch.float64)[0], expected, rtol=1e-6, atol=0.3)


def test_far_from_the_origin_costs_no_accuracy():
    x = torch.randn(50, 3) + 4096.0
    expected = -square_distance(x, x)
    error = (SquaredDistance(1)(x).dense(torch.float64)[0] - expected).abs().max()
    about_zero = (SquaredDistance(1)(x, center=torch.zeros(3)).dense(torch.float64)[0] - expected).abs().max()
    assert error < 1e-5
    assert about_zero > 1.0


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 12, 13])
def test_partial_sums_of_near_pairs_stay_small(dim: int):
    """The order of the columns keeps what a float32 accumulator sees below the two squares that cancel."""
    x = torch.ones(1, dim, dtype=torch.float64)
    bias = SquaredDistance(1)(x, center=torch.zeros(dim))
    partial = (bias.phi_q * bias.phi_k)[0, 0].cumsum(-1)
    assert partial[-1] == 0.0
    assert partial.abs().max() <= (1.0 if dim < 3 else 0.7) * dim


def test_factors_of_several_calls_fit_if_they_share_a_center():
    """As in ring attention: each shard makes its own phi_k, and every phi_q meets all of them."""
    x, center = torch.randn(12, 3) + 7.0, torch.full((3,), 7.0)
    module = SquaredDistance(1)
    shards = [module(part, center=center) for part in x.split(4)]
    phi_k = torch.cat([shard.phi_k for shard in shards], dim=-2)
    for shard, part in zip(shards, x.split(4), strict=True):
        product = (shard.phi_q.double() @ phi_k.double().mT)[0]
        torch.testing.assert_close(product, -square_distance(part, x), rtol=0, atol=1e-5)


def test_several_points_per_token_are_one_point_of_more_dimensions():
    x, y = torch.randn(2, 5, 4, 3), torch.randn(2, 6, 4, 3)
    bias = SquaredDistance(2)(x.flatten(-2), y.flatten(-2), weight=torch.tensor([0.5, 2.0]))
    assert bias.rank == 14
    expected = sum(square_distance(x[:, :, p], y[:, :, p]) for p in range(4))
    expected = -torch.tensor([0.5, 2.0]).double()[:, None, None] * expected
    torch.testing.assert_close(bias.dense(torch.float64), expected, rtol=0, atol=1e-4)


def test_nothing_that_is_shared_is_stored_twice():
    x = torch.randn(10, 3)
    bias = SquaredDistance(8, learned_weight=True)(x)
    assert bias.phi_q.shape == (8, 10, 5)
    assert bias.phi_k.shape == (1, 10, 5)
    assert SquaredDistance(8)(x).phi_q.shape == (1, 10, 5)
    # Queries that a batch shares stay shared, whatever the keys have of their own.
    shared = SquaredDistance(2)(x, torch.randn(4, 2, 6, 3))
    assert shared.phi_q.shape == (1, 10, 5)
    assert shared.phi_k.shape == (4, 2, 6, 5)
    assert SquaredDistance(2)(torch.randn(4, 1, 10, 3), torch.randn(4, 2, 6, 3)).phi_q.shape == (4, 1, 10, 5)


def test_learned_weight_begins_at_one_and_stays_positive():
    module, x = SquaredDistance(3, learned_weight=True), torch.randn(6, 2)
    torch.testing.assert_close(module(x).dense(), SquaredDistance(3)(x).dense().expand(3, -1, -1))
    torch.nn.init.constant_(module.raw_weight, -20.0)
    assert bool((module(x).dense(torch.float64)[:, 0, 1:] < 0).all())


def test_learned_weight_multiplies_a_given_one():
    module, x, weight = SquaredDistance(2, learned_weight=True), torch.randn(4, 2), torch.rand(2, 4)
    torch.testing.assert_close(module(x, weight=weight).dense(), SquaredDistance(2)(x, weight=weight).dense())


@pytest.mark.parametrize("weight", [2.0, torch.tensor(2.0), torch.full((3,), 2.0), torch.full((1, 5), 2.0)], ids=str)
def test_weights_of_every_shape(weight: torch.Tensor | float):
    x = torch.randn(5, 3)
    found = SquaredDistance(3)(x, weight=weight).dense(torch.float64)
    torch.testing.assert_close(found, -2.0 * square_distance(x, x).expand(found.shape), rtol=0, atol=1e-5)


def test_double_coordinates_stay_double():
    assert SquaredDistance(1)(torch.randn(3, 2, dtype=torch.float64)).phi_q.dtype == torch.float64


def test_twice_differentiable():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: SquaredDistance(1)(x).dense(), x)


def test_bad_arguments():
    module, x = SquaredDistance(4), torch.randn(5, 3)
    with pytest.raises(TypeError, match=r"x_q .*int64"):
        module(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x_k 2"):
        module(x, torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"x_q must be .*\(3, 5, 3\)"):
        module(torch.randn(3, 5, 3))
    with pytest.raises(ValueError, match=r"x_q must be .*\(5,\)"):
        module(torch.randn(5))
    with pytest.raises(ValueError, match=r"weight must be .*\(3,\)"):
        module(x, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"weight must be .*\(4, 6\)"):
        module(x, weight=torch.ones(4, 6))
    with pytest.raises(TypeError, match="int64"):
        module(x, weight=torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="str"):
        module(x, weight="heavy")
    with pytest.raises(ValueError, match=r"center must broadcast against x_q, of shape \(1, 5, 3\), got \(2,\)"):
        module(x, center=torch.zeros(2))
    with pytest.raises(ValueError, match=r"center must broadcast against x_k, of shape \(1, 4, 3\), got \(5, 3\)"):
        module(x, x[:4], center=x)
    with pytest.raises(ValueError, match=r"center must broadcast against x_q"):
        module(x, center=torch.zeros(2, 1, 1, 3))  # would make two biases of one
    with pytest.raises(TypeError, match="center must be floating point, got list"):
        module(x, center=[0.0, 0.0, 0.0])
