"""Cosine of a difference: large phases, frequencies, weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.biases import CosineDifference


@given(frequency=st.floats(-50.0, 50.0), offset=st.floats(-1e6, 1e6))
def test_large_phases_lose_nothing(frequency: float, offset: float):
    x, y = torch.randn(4) + offset, torch.randn(5) + offset
    found = CosineDifference(1, frequency)(x, y).dense(torch.float64)[0]
    expected = torch.cos(frequency * (x.double()[:, None] - y.double()[None, :]))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_is_periodic():
    angle = torch.linspace(0, 6, 7, dtype=torch.float64)
    module = CosineDifference(1)
    torch.testing.assert_close(module(angle, angle + 2 * math.pi).dense(), module(angle).dense())


def test_same_place_has_the_largest_bias():
    dense = CosineDifference(1)(torch.linspace(0, 6, 9)).dense()[0]
    assert torch.equal(dense.argmax(-1), torch.arange(9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_module_keeps_its_frequencies(dtype: torch.dtype):
    frequency = [2 * math.pi / 360, 7.3]
    assert CosineDifference(2, frequency).to(dtype).frequency.tolist() == frequency


def test_one_frequency_is_stored_once_for_all_heads():
    bias = CosineDifference(8)(torch.randn(5))
    assert bias.phi_q.shape == bias.phi_k.shape == (1, 5, 2)


def test_weights():
    x = torch.randn(4, dtype=torch.float64)
    plain = CosineDifference(2)(x).dense()
    per_head = torch.tensor([2.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(CosineDifference(2)(x, weight=per_head).dense(), per_head[:, None, None] * plain)
    learned = CosineDifference(2, learned_weight=True)
    torch.testing.assert_close(learned(x, weight=2.0).dense(), (2.0 * plain).expand(2, -1, -1))


def test_empty():
    assert CosineDifference(3)(torch.randn(0), torch.randn(4)).shape == (1, 0, 4)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"frequency must be a number or \[2\], got shape \(3,\)"):
        CosineDifference(2, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="gradient"):
        CosineDifference(1, torch.ones(1, dtype=torch.float64, requires_grad=True))
    with pytest.raises(TypeError, match="x_k"):
        CosineDifference(2)(torch.randn(3), torch.arange(3))
    with pytest.raises(ValueError, match=r"x_q must be .*\(3, 4\)"):
        CosineDifference(2)(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"x_q must be .*\(\)"):
        CosineDifference(2)(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"weight must be .*\(2, 5\)"):
        CosineDifference(2)(torch.randn(3), weight=torch.ones(2, 5))
