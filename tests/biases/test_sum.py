"""Sums: as a module, and of what modules return."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.biases import Alibi, CosineDifference, RelativeBuckets, SquaredDistance, Sum, WindowBias


@given(n=st.integers(1, 20), m=st.integers(1, 20), offset=st.integers(0, 30), symmetric=st.booleans())
def test_module_is_the_sum_of_its_terms(n: int, m: int, offset: int, symmetric: bool):
    alibi, buckets = Alibi(3, symmetric=symmetric), RelativeBuckets(3, 8, 10)
    found = Sum(alibi, buckets)(n, m, query_offset=offset).dense(torch.float64)
    expected = [term(n, m, query_offset=offset).dense(torch.float64) for term in (alibi, buckets)]
    torch.testing.assert_close(found, sum(expected), rtol=0, atol=1e-5)


def test_ranks_add_and_tables_merge():
    bias = Sum(Alibi(2), Alibi(2), RelativeBuckets(2), RelativeBuckets(2, max_distance=64))(9, 9)
    assert bias.rank == 4
    assert bias.table.shape == (2, 257)


def test_terms_that_are_called_differently_are_added_afterwards():
    x, angle = torch.randn(6, 3), torch.randn(6)
    terms = [Alibi(4)(6, 6), SquaredDistance(4)(x), CosineDifference(4)(angle), WindowBias(4, (2, 3))()]
    total = terms[0] + terms[1] + terms[2] + terms[3]
    assert total.rank == 2 + 5 + 2
    assert total.table is not None
    expected = sum(term.dense(torch.float64) for term in terms)
    torch.testing.assert_close(total.dense(torch.float64), expected, rtol=0, atol=1e-5)


def test_gradients_reach_every_term():
    first, second = RelativeBuckets(2, 8, 16), RelativeBuckets(2, 8, 5)
    Sum(first, second)(7, 7).dense().sum().backward()
    assert first.weight.grad.sum() == second.weight.grad.sum() == 2 * 49


def test_parameters_of_the_terms_are_in_the_state_dict():
    assert set(Sum(Alibi(2), RelativeBuckets(2)).state_dict()) == {"terms.1.weight"}


def test_tables_that_are_read_differently_are_refused():
    window = WindowBias(2, (2, 3))()
    with pytest.raises(ValueError, match="different codes"):
        _ = window + RelativeBuckets(2)(6, 6)


def test_bad_terms():
    with pytest.raises(ValueError, match=r"one number of heads, got \[2, 3\]"):
        Sum(Alibi(2), Alibi(3))
    with pytest.raises(ValueError, match=r"got \[\]"):
        Sum()
    with pytest.raises(TypeError, match="terms must be biases, got Linear"):
        Sum(Alibi(2), torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
