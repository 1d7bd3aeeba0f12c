"""The promise: never broken, by chance or on purpose, and attained where the proof says so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.decompose.problems import attend, causal, diameter, generator, row_diameters
from torch import Tensor

from flashbias.decompose.bound import certificate, check_tol, row_spread, spread_allowed

ROUNDING = 1e-13


def total_variation(scores: Tensor, error: Tensor) -> Tensor:
    return (torch.softmax(scores + error, -1) - torch.softmax(scores, -1)).abs().sum(-1) / 2


def random_problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, error and values whose sizes vary over orders of magnitude."""
    g = generator(seed)
    n, m, dim = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 8), (1, 40), (1, 5)))
    sharpness, size = (10 ** float(4 * torch.rand((), generator=g) - 2) for _ in range(2))
    scores = sharpness * torch.randn(n, m, generator=g, dtype=torch.float64)
    error = size * torch.randn(n, m, generator=g, dtype=torch.float64)
    return scores, error, torch.randn(m, dim, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(100))
def test_output_never_moves_further_than_certified(seed: int):
    scores, error, value = random_problem(seed)
    moved = (attend(scores, error, value) - attend(scores, torch.zeros_like(error), value)).norm(dim=-1)
    assert bool((moved <= certificate(row_spread(error)) * diameter(value) + ROUNDING).all())


@pytest.mark.parametrize("seed", range(30))
def test_under_a_mask_only_what_is_seen_counts(seed: int):
    scores, error, value = random_problem(seed)
    mask = torch.rand(error.shape, generator=generator(seed)) > 0.4
    error = torch.where(mask, error, 1e6)
    moved = (attend(scores, error, value, mask) - attend(scores, torch.zeros_like(error), value, mask)).norm(dim=-1)
    bound = certificate(row_spread(error, mask)) * row_diameters(value, mask)
    assert bool((moved <= bound + ROUNDING).all())


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("seed", range(10))
def test_an_adversary_stays_below(seed: int, spread: float):
    """Errors and values chosen to do harm: the likeliest keys pushed down, all others up, wherever the cut is."""
    scores = torch.randn(24, generator=generator(seed), dtype=torch.float64)
    order = scores.argsort()
    worst = 0.0
    for cut in range(1, 24):
        up = torch.zeros(24, dtype=torch.bool)
        up[order[:cut]] = True
        error = torch.where(up, spread / 2, -spread / 2).double()
        value = torch.where(up, 1.0, -1.0).double()[:, None]
        moved = float((attend(scores[None], error[None], value) - attend(scores[None], 0 * error[None], value)).abs())
        worst = max(worst, moved)
    bound = float(certificate(torch.tensor(spread, dtype=torch.float64))) * 2.0
    assert worst <= bound + ROUNDING
    # … and does harm: a cut near the worst probability comes close.
    assert worst >= 0.9 * bound


@pytest.mark.parametrize("spread", [1e-6, 0.01, 0.08, 1.0, 7.0, 30.0])
def test_two_keys_attain_the_bound(spread: float):
    error = torch.tensor([[spread / 2, -spread / 2]], dtype=torch.float64)
    scores = torch.tensor([[-spread / 2, 0.0]], dtype=torch.float64)
    value = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    moved = (attend(scores, error, value) - attend(scores, 0 * error, value)).abs()
    torch.testing.assert_close(moved[0, 0] / diameter(value), certificate(row_spread(error))[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [3, 10, 101])
def test_many_keys_in_two_camps_attain_it_too(keys: int):
    spread, few = 0.7, keys // 3
    up = torch.arange(keys) < few
    error = torch.where(up, spread / 2, -spread / 2).double()[None]
    # Together the keys that rise have the odds exp(-spread / 2).
    scores = torch.where(up, -spread / 2 - math.log(few), -math.log(keys - few)).double()[None]
    torch.testing.assert_close(total_variation(scores, error), certificate(row_spread(error)), rtol=1e-12, atol=1e-12)


finite = st.floats(-50, 50)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=12))
def test_total_variation_is_bounded(pairs: list[tuple[float, float]]):
    scores, error = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    assert float(total_variation(scores, error)) <= float(certificate(row_spread(error[None]))) + ROUNDING


@given(st.lists(finite, min_size=1, max_size=9), finite)
def test_constants_of_a_row_are_free(entries: list[float], constant: float):
    error = torch.tensor([entries], dtype=torch.float64)
    torch.testing.assert_close(row_spread(error + constant), row_spread(error), rtol=0, atol=1e-13)


class TestRowSpread:
    def test_is_highest_minus_lowest(self):
        assert row_spread(torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]])).tolist() == [3.0, 0.0]

    def test_does_not_see_what_is_hidden(self):
        error = torch.tensor([[1.0, math.nan, -math.inf], [2.0, 5.0, 9.0]])
        mask = torch.tensor([[True, False, False], [True, True, False]])
        assert row_spread(error, mask).tolist() == [0.0, 3.0]

    def test_of_a_row_that_sees_nothing_is_zero(self):
        mask = torch.tensor([[False, False], [True, True]])
        assert row_spread(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), mask).tolist() == [0.0, 1.0]

    def test_of_no_keys_is_zero(self):
        assert row_spread(torch.zeros(2, 3, 0)).tolist() == [[0.0] * 3] * 2

    def test_mask_broadcasts(self):
        error = torch.randn(2, 5, 5, generator=generator())
        whole = row_spread(error, causal(5).expand(2, 5, 5))
        assert torch.equal(row_spread(error, causal(5)), whole)

    def test_nan_where_it_is_read_is_not_certified(self):
        assert not bool(certificate(row_spread(torch.tensor([[1.0, math.nan]]))) <= 1.0)


@pytest.mark.parametrize("tol", [1e-9, 0.02, 0.5, 0.999])
def test_allowed_spread_is_the_inverse_of_the_certificate(tol: float):
    assert float(certificate(torch.tensor(spread_allowed(tol), dtype=torch.float64))) == pytest.approx(tol, rel=1e-12)


@pytest.mark.parametrize("tol", [0.0, 1.0, -0.1, 2, True, math.nan, math.inf, "0.1", None])
def test_tolerance_must_lie_between_zero_and_one(tol: object):
    with pytest.raises(ValueError, match=r"tol must be a number in \(0, 1\), got"):
        check_tol(tol)  # type: ignore[arg-type]
