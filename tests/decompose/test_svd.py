"""Factors of one matrix: as good as the best, the smallest rank that does, and fits of what is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.decompose.problems import causal, gaussian, generator, noise
from torch import Tensor

from flashbias.decompose.svd import (
    Factors,
    NestedSvd,
    centre_rows,
    smallest_rank,
    truncated_svd,
    weighted_low_rank,
)


def low_rank(n: int, m: int, rank: int, seed: int = 0) -> Tensor:
    g = generator(seed)
    left, right = (torch.randn(size, rank, generator=g, dtype=torch.float64) for size in (n, m))
    return left @ right.mT


def best_error(b: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(b)[rank:].square().sum().sqrt())


class TestFactors:
    def test_of_any_two_matrices_are_brought_to_the_form_of_an_svd(self):
        b = low_rank(9, 7, 3)
        left = torch.randn(9, 5, generator=generator(), dtype=torch.float64)
        factors = Factors.balanced(left, (torch.linalg.pinv(left) @ b).mT)
        left_gram, right_gram = factors.left.mT @ factors.left, factors.right.mT @ factors.right
        torch.testing.assert_close(left_gram, right_gram)
        torch.testing.assert_close(left_gram, left_gram.diag().diag(), rtol=0, atol=1e-10)
        assert bool((left_gram.diag().diff() <= 1e-12).all())

    def test_balancing_keeps_the_product(self):
        left, right = (torch.randn(n, 4, generator=generator(n), dtype=torch.float64) for n in (9, 7))
        torch.testing.assert_close(Factors.balanced(left, right).dense(), left @ right.mT)

    def test_balancing_takes_more_columns_than_rows(self):
        left, right = (torch.randn(3, 5, generator=generator(n), dtype=torch.float64) for n in (1, 2))
        factors = Factors.balanced(left, right)
        assert factors.rank == 3
        torch.testing.assert_close(factors.dense(), left @ right.mT)

    def test_beside_adds_products(self):
        a, b = (Factors(torch.randn(4, r), torch.randn(5, r)) for r in (2, 3))
        torch.testing.assert_close(a.beside(b).dense(), a.dense() + b.dense())

    def test_energies_are_squared_singular_values(self):
        b = noise(12, 9).double()
        expected = torch.linalg.svdvals(b)[:4].square()
        torch.testing.assert_close(truncated_svd(b, 4, generator()).energies(), expected)

    def test_rounding_is_per_factor(self):
        factors = truncated_svd(noise(6).double(), 2, generator()).to(torch.bfloat16)
        assert factors.left.dtype == factors.right.dtype == torch.bfloat16
        assert factors.rank == 2


class TestCentring:
    def test_rows_have_mean_zero(self):
        assert float(centre_rows(noise(5, 8).double()).mean(-1).abs().max()) < 1e-15

    def test_weighted_mean(self):
        b, weights = noise(5, 8).double(), noise(5, 8, seed=1).double().abs()
        assert float((weights * centre_rows(b, weights)).sum(-1).abs().max()) < 1e-14

    def test_a_row_without_weight_stays(self):
        b, weights = noise(2, 3).double(), torch.tensor([[0.0] * 3, [1.0] * 3]).double()
        assert torch.equal(centre_rows(b, weights)[0], b[0])


class TestTruncatedSvd:
    @pytest.mark.parametrize(("n", "m", "rank"), [(12, 9, 4), (9, 12, 12), (1, 5, 1), (5, 1, 3), (30, 30, 30)])
    def test_is_the_best(self, n: int, m: int, rank: int):
        b = noise(n, m).double()
        factors = truncated_svd(b, rank, generator())
        assert factors.rank == min(rank, n, m)
        assert float((factors.dense() - b).norm()) == pytest.approx(best_error(b, rank), abs=1e-12)

    @pytest.mark.parametrize("b", [noise(200, 150).double(), gaussian(200, 150).double()], ids=["flat", "steep"])
    def test_randomised_is_nearly_the_best(self, b: Tensor):
        factors = truncated_svd(b, 10, generator())
        assert float((factors.dense() - b).norm()) <= 1.05 * best_error(b, 10) + 1e-12 * float(b.norm())
        energies, values = factors.energies(), torch.linalg.svdvals(b)[:10].square()
        assert bool((energies <= values * (1 + 1e-9)).all())
        assert bool((energies >= 0.67 * values).all())

    def test_same_seed_same_factors_and_no_other_source_of_chance(self):
        b = noise(200).double()
        before = torch.get_rng_state()
        first, again, other = (truncated_svd(b, 8, generator(seed)).left for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_of_nothing_is_nothing(self):
        assert float(truncated_svd(torch.zeros(50, 60), 3, generator()).dense().abs().max()) == 0.0

    def test_widest_serves_all_smaller_ranks(self):
        svd = NestedSvd(noise(200).double(), generator())
        wide = svd(12)
        assert torch.equal(svd(5).left, wide.left[:, :5])
        assert svd(300).rank == 200


class TestSmallestRank:
    @staticmethod
    def factors_of(rank: int) -> Factors:
        return Factors(torch.zeros(2000, rank), torch.zeros(2000, rank))

    @given(st.integers(1, 600), st.integers(1, 600), st.booleans(), st.booleans())
    def test_finds_it(self, needed: int, max_rank: int, nested: bool, is_told: bool):
        tried: list[int] = []

        def accepts(factors: Factors) -> bool:
            tried.append(factors.rank)
            return factors.rank >= needed

        at_least = (lambda factors: (factors.rank + needed + 1) // 2) if is_told else None
        found = smallest_rank(self.factors_of, accepts, max_rank, nested=nested, at_least=at_least)
        assert (found is None) == (needed > max_rank)
        assert found is None or found.rank == needed
        assert max(tried) <= max_rank
        assert len(tried) == len(set(tried)) <= 16

    def test_does_not_try_what_cannot_be(self):
        tried: list[int] = []

        def accepts(factors: Factors) -> bool:
            tried.append(factors.rank)
            return False

        assert smallest_rank(self.factors_of, accepts, 100, at_least=lambda factors: 101) is None
        assert tried == [16]

    @given(st.sets(st.integers(1, 100)))
    def test_what_comes_back_was_accepted(self, accepted: set[int]):
        found = smallest_rank(self.factors_of, lambda f: f.rank in accepted, 100)
        assert found is None or found.rank in accepted

    def test_a_matrix_without_so_many_ranks_ends_the_search(self):
        svd = NestedSvd(low_rank(40, 3, 3), generator())
        found = smallest_rank(svd, lambda f: f.rank >= 3, 40)
        assert found is not None and found.rank == 3


class TestWeighted:
    @pytest.mark.parametrize("rank", [1, 3])
    def test_fills_in_what_is_hidden(self, rank: int):
        b = low_rank(40, 36, rank)
        mask = torch.rand(40, 36, generator=generator(1)) > 0.4
        start = truncated_svd(b * mask, rank, generator())
        found = weighted_low_rank(b * mask, mask.double(), start, max_sweeps=200, patience=1e-9)
        # Constants of rows are free on top.
        assert float(centre_rows(found.dense() - b, mask.double())[mask].abs().max()) < 1e-5

    def test_under_a_causal_mask_distance_along_a_line_has_rank_one(self):
        b = -(torch.arange(64.0) - torch.arange(64.0)[:, None]).abs().double() * causal(64)
        start = truncated_svd(centre_rows(b), 1, generator())
        found = weighted_low_rank(b, causal(64).double(), start)
        error = centre_rows(found.dense() - b, causal(64).double())[causal(64)]
        assert float(error.abs().max()) < 1e-2 * float(b.abs().max())

    @pytest.mark.parametrize("rank", [1, 4, 9])
    def test_is_never_worse_than_its_start(self, rank: int):
        b, weights = noise(30, 26).double(), noise(30, 26, seed=1).double().square()
        start = truncated_svd(centre_rows(b, weights), rank, generator())

        def error(factors: Factors) -> float:
            return float((weights * centre_rows(factors.dense() - b, weights).square()).sum())

        found = weighted_low_rank(b, weights, start)
        assert found.rank == rank
        assert error(found) < error(start)

    def test_more_sweeps_are_never_worse(self):
        b, mask = gaussian(48, sharpness=100).double(), causal(48)
        start = truncated_svd(b * mask, 4, generator())
        errors = []
        for sweeps in (1, 2, 5, 20, 60):
            found = weighted_low_rank(b * mask, mask.double(), start, max_sweeps=sweeps, patience=0.0)
            errors.append(float(centre_rows(found.dense() - b, mask.double())[mask].square().sum()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.1 * errors[0]

    def test_weights_count_by_their_ratio(self):
        b, weights = noise(20).double(), noise(20, seed=1).double().square()
        start = truncated_svd(b, 3, generator())
        one, other = (weighted_low_rank(b, scale * weights, start).dense() for scale in (1.0, 1e6))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_rows_and_columns_that_weigh_nothing_stay_finite(self):
        b, weights = noise(20).double(), torch.ones(20, 20).double()
        weights[3], weights[:, 5] = 0.0, 0.0
        found = weighted_low_rank(b, weights, truncated_svd(b, 2, generator()))
        assert bool(torch.isfinite(found.dense()).all())

    def test_in_chunks_it_is_the_same(self, monkeypatch: pytest.MonkeyPatch):
        b, mask = noise(20).double(), causal(20).double()
        start = truncated_svd(b, 3, generator())
        whole = weighted_low_rank(b, mask, start, max_sweeps=1).dense()
        monkeypatch.setattr("flashbias.decompose.svd.CHUNK_ENTRIES", 50)
        torch.testing.assert_close(weighted_low_rank(b, mask, start, max_sweeps=1).dense(), whole, rtol=0, atol=1e-9)
