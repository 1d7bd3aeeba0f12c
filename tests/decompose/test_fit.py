"""One head: the smallest rank that keeps the tolerance, what cannot be, and what is promised for a calibration."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.decompose.problems import causal, gaussian, noise, spiked, toeplitz
from torch import Tensor

from flashbias.decompose.bound import certificate, row_spread
from flashbias.decompose.fit import Fit, Head
from flashbias.decompose.relative import codes_of_positions, read_table

F32, BF16 = torch.float32, torch.bfloat16


def true_certificate(fit: Fit, b: Tensor, mask: Tensor | None = None) -> float:
    """Worked out from the fit alone."""
    approximation = fit.factors.left.double() @ fit.factors.right.double().mT
    if fit.table is not None:
        n, half = len(b), len(fit.table) // 2
        difference = torch.arange(b.shape[1]) - torch.arange(n)[:, None]
        approximation = approximation + fit.table.float().double()[difference.clamp(-half, half) + half]
    return float(certificate(row_spread(approximation - b.double(), mask)).max())


def exact(ranks: Sequence[int], b: Tensor) -> list[float]:
    """Certificates of the exact truncated SVD."""
    centred = b.double() - b.double().mean(-1, keepdim=True)
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    return [float(certificate(row_spread(u[:, :r] * s[:r] @ vh[:r] - centred)).max()) for r in ranks]


class TestLowRank:
    @pytest.mark.parametrize("tol", [1e-4, 1e-2, 0.2])
    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("b", [gaussian(40), gaussian(24, 50), noise(20), spiked(30)], ids=["a", "b", "c", "d"])
    def test_what_it_says_is_true(self, b: Tensor, dtype: torch.dtype, tol: float):
        fit = Head(b, tol).low_rank(min(b.shape), dtype)
        if fit is None:
            assert dtype == BF16 and tol < 0.2
            return
        assert fit.factors.left.dtype == fit.factors.right.dtype == dtype
        assert fit.certificate == pytest.approx(true_certificate(fit, b), rel=1e-6, abs=1e-12)
        assert fit.certificate <= tol

    @pytest.mark.parametrize("tol", [1e-3, 1e-2, 0.1])
    @pytest.mark.parametrize("b", [gaussian(40), gaussian(90, sharpness=300), spiked(30)], ids=["a", "b", "c"])
    def test_no_smaller_rank_of_the_svd_does(self, b: Tensor, tol: float):
        fit = Head(b, tol).low_rank(min(b.shape), F32)
        assert fit is not None and fit.rank > 0
        assert exact([fit.rank - 1], b)[0] > tol

    def test_a_constant_needs_no_column(self):
        fit = Head(torch.arange(5.0)[:, None].expand(5, 7), 1e-6).low_rank(5, F32)
        assert fit is not None and fit.rank == 0 and fit.certificate == 0.0 and fit.energy == 1.0

    def test_none_where_the_rank_is_too_small(self):
        head = Head(noise(60), 0.01)
        assert head.low_rank(20, F32) is None

    def test_energy_is_the_share_that_is_kept(self):
        b = spiked(40)
        fit = Head(b, 0.1).low_rank(40, F32)
        assert fit is not None
        centred = b.double() - b.double().mean(-1, keepdim=True)
        left = fit.factors.left.double() @ fit.factors.right.double().mT - centred
        expected = 1 - float(left.square().sum() / centred.square().sum())
        assert fit.energy == pytest.approx(expected, abs=1e-6)

    def test_float32_search_of_a_large_head_is_certified_in_float64(self):
        b = gaussian(300, sharpness=100)
        fit = Head(b, 1e-3).low_rank(100, F32)
        assert fit is not None
        assert fit.certificate == pytest.approx(true_certificate(fit, b), rel=1e-9)

    @settings(max_examples=20)
    @given(st.integers(0, 999), st.floats(0.3, 3.0), st.sampled_from([1e-3, 1e-2, 0.1]))
    def test_what_is_ruled_out_cannot_be(self, seed: int, decay: float, tol: float):
        """A lower bound on the rank is below that of exact factors, whatever the spectrum."""
        left, right = (torch.linalg.qr(noise(80, seed=seed + s).double()).Q for s in (0, 1000))
        b = left @ (50 * torch.arange(1, 81, dtype=torch.float64) ** -decay).diag() @ right
        head = Head(b, tol)
        needed = next(rank for rank, reached in enumerate(exact(range(81), b)) if reached <= tol)
        for rank in {4, 16, needed - 1}:
            if 0 < rank < needed:
                assert head._at_least(head._svd(rank)) <= needed

    def test_hopeless_ranks_are_not_tried(self):
        head = Head(noise(200), 1e-3)
        assert head.low_rank(40, F32) is None
        assert head._svd(1).left.shape == (200, 1)
        assert head._svd._widest is not None and head._svd._widest.rank == 16


class TestRounded:
    def test_further_columns_make_up_for_rounding(self):
        b = 5 * gaussian(60)
        head = Head(b, 1e-3)
        fit = head.low_rank(60, F32)
        assert fit is not None
        found = head.rounded(fit, BF16, 60)
        assert found is not None
        assert found.factors.left.dtype == BF16
        assert fit.rank < found.rank < 3 * fit.rank
        assert found.certificate == pytest.approx(true_certificate(found, b)) and found.certificate <= 1e-3

    def test_none_where_they_may_not(self):
        head = Head(5 * gaussian(60), 1e-3)
        fit = head.low_rank(60, F32)
        assert fit is not None
        assert head.rounded(fit, BF16, fit.rank) is None
        assert head.rounded(fit, BF16, fit.rank + 1) is None

    def test_of_nothing_is_nothing(self):
        head = Head(torch.ones(6, 6), 1e-3)
        fit = head.low_rank(6, F32)
        assert fit is not None
        found = head.rounded(fit, BF16, 6)
        assert found is not None and found.rank == 0

    @pytest.mark.parametrize("weights", [None, noise(60, seed=5).abs()])
    def test_under_a_mask(self, weights: Tensor | None):
        b, mask = 3 * gaussian(60), causal(60)
        head = Head(b, 2e-3, mask, weights)
        fit = head.low_rank(40, F32)
        assert fit is not None
        found = head.rounded(fit, BF16, 60)
        assert found is not None
        assert true_certificate(found, b, mask) <= 2e-3


class TestMask:
    def test_a_rank_that_the_whole_has_not(self):
        """Distance along a line has full rank; where keys come before queries it has rank one."""
        b = -(torch.arange(50.0) - torch.arange(50.0)[:, None]).abs() / 10
        whole, half = Head(b, 1e-2).low_rank(50, F32), Head(b, 1e-2, causal(50)).low_rank(50, F32)
        assert whole is not None and half is not None
        assert half.rank <= 2 < 5 < whole.rank
        assert true_certificate(half, b, causal(50)) <= 1e-2

    def test_hidden_entries_change_nothing(self):
        b, mask = gaussian(40), causal(40)
        wild = torch.where(mask, b, 1e4 * noise(40))
        fits = [Head(x, 1e-3, mask).low_rank(40, F32) for x in (b, wild)]
        assert fits[0] is not None and fits[1] is not None
        assert torch.equal(fits[0].factors.left, fits[1].factors.left)

    def test_a_head_that_is_not_read_needs_nothing(self):
        fit = Head(noise(9), 1e-3, torch.zeros(9, 9, dtype=torch.bool)).low_rank(9, F32)
        assert fit is not None and fit.rank == 0


class TestCalibration:
    def setup_method(self) -> None:
        scores = 4 * noise(40)
        self.b = gaussian(40, sharpness=200) * 3
        self.weights = torch.softmax(scores + self.b, -1)

    def test_promises_for_these_probabilities_what_happens_to_them(self):
        head = Head(self.b, 0.02, weights=self.weights, calibrated=True)
        fit = head.low_rank(40, F32)
        assert fit is not None
        error = fit.factors.left.double() @ fit.factors.right.double().mT - self.b
        moved = torch.softmax(self.weights.double().log() + error, -1)
        total_variation = (moved - self.weights.double()).abs().sum(-1) / 2
        assert fit.certificate == pytest.approx(float(total_variation.max()), rel=1e-4)

    def test_needs_a_smaller_rank(self):
        calibrated = Head(self.b, 0.02, weights=self.weights, calibrated=True).low_rank(40, F32)
        certified = Head(self.b, 0.02, weights=self.weights).low_rank(40, F32)
        assert calibrated is not None and certified is not None
        assert calibrated.rank < certified.rank
        assert true_certificate(certified, self.b) <= 0.02

    def test_what_has_no_probability_may_be_anything(self):
        weights = self.weights * causal(40)
        wild = torch.where(causal(40), self.b, 1e3)
        fits = [Head(b, 0.02, weights=weights, calibrated=True).low_rank(40, F32) for b in (self.b, wild)]
        assert fits[0] is not None and fits[1] is not None
        assert abs(fits[0].rank - fits[1].rank) <= 1


class TestTables:
    def test_a_table_is_taken_only_if_it_does(self):
        codes = codes_of_positions(torch.arange(20), torch.arange(20))
        good, bad = Head(toeplitz(20), 1e-3), Head(noise(20), 1e-3)
        assert good.with_table(read_table(good.b, codes), codes) is not None
        assert bad.with_table(read_table(bad.b, codes), codes) is None

    def test_certified_as_it_is_read_in_float32(self):
        """A float64 bias far from zero is not a float32 table."""
        codes = codes_of_positions(torch.arange(20), torch.arange(20))
        b = toeplitz(20).double() / 1000 + 1e6
        assert Head(b, 1e-4).with_table(read_table(b, codes), codes) is None
        assert Head(b - 1e6, 1e-4).with_table(read_table(b - 1e6, codes), codes) is not None

    def test_not_a_number_is_not_certified(self):
        codes = codes_of_positions(torch.arange(20), torch.arange(20))
        assert Head(noise(20), 0.9).with_table(torch.full((39,), float("nan")), codes) is None

    @pytest.mark.parametrize("mask", [None, causal(64)])
    def test_near_field(self, mask: Tensor | None):
        b = spiked(64)
        codes = codes_of_positions(torch.arange(64), torch.arange(64))
        head = Head(b, 0.05, mask)
        fit = head.near_field(codes, 4, 20, F32)
        assert fit is not None and fit.table is not None and len(fit.table) == 9
        assert fit.certificate == pytest.approx(true_certificate(fit, b, mask))
        assert fit.certificate <= 0.05 and fit.rank <= 6
        assert Head(noise(64), 0.05, mask).near_field(codes, 4, 20, F32) is None


def test_the_same_seed_is_the_same_fit():
    b = gaussian(300, sharpness=100)
    first, again, other = (Head(b, 1e-3, seed=seed).low_rank(100, F32) for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first.factors.left, again.factors.left)
    assert not torch.equal(first.factors.left, other.factors.left)


def test_input_is_left_alone():
    b, mask, weights = noise(20).double(), causal(20), noise(20).abs()
    copies = [x.clone() for x in (b, mask, weights)]
    head = Head(b, 0.1, mask, weights)
    head.low_rank(10, F32)
    head.explore(5, F32)
    assert all(torch.equal(x, copy) for x, copy in zip((b, mask, weights), copies, strict=True))


def test_exploring_certifies_some_ranks():
    head = Head(noise(40), 1e-3)
    energy = head.explore(16, F32)
    assert set(head.tried) == {1, 4, 16}
    assert head.tried[1] >= head.tried[4] >= head.tried[16] == pytest.approx(exact([16], noise(40))[0], rel=1e-6)
    assert 0 < energy < 1
