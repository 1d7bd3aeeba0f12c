"""`compress`: what it promises is true, the cheapest form is taken, and what cannot be used is said."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.decompose.fixed_prices import FixedPrices
from tests.decompose.problems import (
    attend,
    causal,
    diameter,
    gaussian,
    generator,
    noise,
    places,
    row_diameters,
    spiked,
    swin_v2_layer,
    toeplitz,
    window,
)
from torch import Tensor

import flashbias as fb
from flashbias.attention.workload import Workload
from flashbias.decompose import NotLowRankError, Report, compress
from flashbias.decompose.bound import certificate, row_spread

pytestmark = pytest.mark.usefixtures("fixed_prices")

SetPrices = Callable[[type[FixedPrices]], None]


def certified(found: fb.FactoredBias | fb.MixedBias, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Certificate of each head, worked out from the dense matrices alone."""
    error = found.dense(torch.float64) - b.double()
    mask = None if mask is None else mask.expand(error.shape)
    return certificate(row_spread(error, mask)).amax(-1).flatten()


def holds(found: fb.FactoredBias | fb.MixedBias, b: Tensor, tol: float, mask: Tensor | None = None) -> Report:
    """Assert that the promise is kept and the report true; return the report."""
    report = found.report
    truth = certified(found, b if b.dim() > 2 else b[None], mask).tolist()
    assert max(truth) <= tol
    assert [head.certificate for head in report.heads] == pytest.approx(truth, rel=1e-5, abs=1e-11)
    assert report.certificate == max(head.certificate for head in report.heads)
    assert report.tol == tol and [head.head for head in report.heads] == list(range(len(truth)))
    assert report.cost_ms < report.dense_ms
    return report


def as_factors(found: fb.FactoredBias | fb.MixedBias) -> fb.FactoredBias:
    assert isinstance(found, fb.FactoredBias)
    return found


# -------------------------------------------------------------------- the promise


def random_problem(seed: int) -> tuple[Tensor, float, dict[str, Any], Tensor, Tensor]:
    """A bias somewhere between smooth and rough, a tolerance, options, scores and values."""
    g = generator(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=g))

    n, m = (int(uniform(6, 25)) for _ in range(2))
    kind = seed % 24
    b = 10 ** uniform(-1, 1) * gaussian(n, m, sharpness=10 ** uniform(0, 3))
    if kind % 3 == 1:
        b = b + 10 ** uniform(-4, -1) * torch.randn(n, m, generator=g)
    if kind % 3 == 2:
        b = b + spiked(max(n, m), seed=seed)[:n, :m]
    dtype, table = (None, torch.float32, torch.bfloat16, torch.float32)[seed % 4], None if seed % 9 else "auto"
    options: dict[str, Any] = {"factor_dtype": dtype, "table": table, "seed": seed}
    if kind == 23:
        options["mask"] = torch.rand(n, m, generator=g) > 0.3
    scores = 10 ** uniform(-1, 1) * torch.randn(n, m, generator=g, dtype=torch.float64)
    return b, 10 ** uniform(-3, -0.5), options, scores, torch.randn(m, 3, generator=g, dtype=torch.float64)


class FreeFactors(FixedPrices):
    """Factors cost next to nothing, whatever their rank."""

    def factored(self, rank: int) -> float:
        return 1e-9 * (1 + rank)


def test_thousand_attentions_never_move_further_than_certified(
    set_prices: SetPrices, record_property: Callable[[str, object], None]
):
    set_prices(FreeFactors)
    looseness, refused = [], 0
    for seed in range(1000):
        b, tol, options, scores, value = random_problem(seed)
        try:
            found = compress(b, tol, **options)
        except NotLowRankError:  # bfloat16 alone does not do
            refused += 1
            continue
        mask = options.get("mask")
        truth = attend(scores, b.double(), value, mask)
        moved = (attend(scores, found.dense(torch.float64)[0], value, mask) - truth).norm(dim=-1)
        seen = diameter(value) if mask is None else row_diameters(value, mask)
        assert bool((moved <= found.report.certificate * seen + 1e-12).all())
        assert found.report.certificate <= tol
        if float(moved.max()) > 1e-9:
            looseness.append(found.report.certificate * diameter(value) / float(moved.max()))
    assert refused < 50 and len(looseness) > 900
    median = float(torch.tensor(looseness).median())
    record_property("median looseness", median)
    # Random queries are not the worst ones; a bound a hundred times too high would promise nothing.
    assert min(looseness) >= 1.0 and 1.0 < median < 30.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (24, 50), (50, 24)])
def test_holds_for_what_was_given(shape: tuple[int, int], dtype: torch.dtype):
    """Of the rounded entries, not of some that were finer; every dtype and N != M."""
    b = torch.stack([gaussian(*shape), 4 * gaussian(*shape, sharpness=5), torch.zeros(shape)]).to(dtype)
    found = compress(b, 1e-2, table=None)
    report = holds(found, b, 1e-2)
    assert report.shape == (3, *shape) == tuple(found.shape)
    assert report.ranks[2] == 0 < report.ranks[0]


def test_what_attention_computes_from_it():
    b = torch.stack([gaussian(48), 3 * gaussian(48)])
    found = compress(b, 1e-2, table=None)
    q, k, v = (torch.randn(2, 2, 48, 16, generator=generator(s)) for s in range(3))
    moved = fb.attention(q, k, v, found) - torch.nn.functional.scaled_dot_product_attention(q, k, v, b)
    spread = torch.cdist(v, v).amax((-1, -2))[..., None]
    assert bool((moved.norm(dim=-1) <= found.report.certificate * spread + 1e-5).all())


# -------------------------------------------------------------------- forms


class TestFactors:
    def test_ranks_differ_by_head(self):
        b = torch.stack([gaussian(60), torch.ones(60, 60), 5 * gaussian(60, sharpness=200), gaussian(60, sharpness=2)])
        found = as_factors(compress(b, 1e-2, table=None))
        report = holds(found, b, 1e-2)
        assert report.ranks == found.ranks and found.rank == max(report.ranks)
        assert report.ranks[1] == 0 < report.ranks[3] < report.ranks[0] < report.ranks[2]
        assert {head.form for head in report.heads} == {"low rank"}
        padding = ~found.rank_mask()[:, None, :].expand(found.phi_q.shape)
        assert bool((found.phi_q[padding] == 0).all())

    def test_one_matrix_is_one_head(self):
        assert compress(gaussian(40), 1e-2).shape == (1, 40, 40)

    def test_head_dimension_of_a_batch_of_one_stays_out(self):
        assert compress(gaussian(40)[None, None], 1e-2).shape == (1, 40, 40)

    @pytest.mark.parametrize(
        "b", [torch.zeros(3, 9, 7), torch.full((9, 7), 5.0), torch.arange(9.0)[:, None].expand(9, 7)]
    )
    def test_constants_of_rows_need_nothing(self, b: Tensor):
        found = as_factors(compress(b, 1e-6))
        report = holds(found, b, 1e-6)
        assert set(report.ranks) == {0} and report.certificate == 0.0
        assert float(found.dense().abs().max()) == 0.0

    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
    def test_smallest_sizes(self, set_prices: SetPrices, shape: tuple[int, int]):
        set_prices(FreeFactors)
        b = noise(*shape)
        assert holds(compress(b, 1e-3, factor_dtype=torch.float32), b, 1e-3).ranks[0] <= 1

    def test_bfloat16_only_where_it_pays(self):
        """A column of bfloat16 costs half of one of float32."""
        b = gaussian(60)
        chosen, exact = compress(b, 1e-3, table=None), compress(b, 1e-3, table=None, factor_dtype=torch.float32)
        assert as_factors(chosen).phi_q.dtype == torch.bfloat16
        assert as_factors(exact).phi_q.dtype == torch.float32
        assert holds(chosen, b, 1e-3).cost_ms < holds(exact, b, 1e-3).cost_ms
        assert as_factors(chosen).rank > as_factors(exact).rank
        assert chosen.report.factor_dtype == "bfloat16"

    def test_float32_where_bfloat16_cannot(self):
        b = 300 * gaussian(60, sharpness=3)
        found = as_factors(compress(b, 1e-3, table=None))
        assert found.phi_q.dtype == torch.float32
        holds(found, b, 1e-3)

    def test_max_rank(self):
        b = gaussian(60, sharpness=50)
        needed = as_factors(compress(b, 1e-2, table=None, factor_dtype=torch.float32)).rank
        assert as_factors(compress(b, 1e-2, table=None, factor_dtype=torch.float32, max_rank=needed)).rank == needed
        with pytest.raises(NotLowRankError, match=f"up to rank {needed - 1} factors reach 0.0"):
            compress(b, 1e-2, table=None, factor_dtype=torch.float32, max_rank=needed - 1)

    def test_a_smaller_tolerance_needs_more(self):
        ranks = [as_factors(compress(gaussian(60), tol, table=None)).rank for tol in (0.1, 1e-2, 1e-3)]
        assert ranks == sorted(set(ranks))

    def test_batches_share_the_ranks_of_heads(self):
        heads = torch.stack([gaussian(40), 3 * gaussian(40, sharpness=100)])
        b = torch.stack([heads, 0 * heads, 2 * heads]).reshape(3, 1, 2, 40, 40)
        found = as_factors(compress(b, 1e-2))
        report = holds(found, b, 1e-2)
        assert found.shape == b.shape and len(report.heads) == 6
        assert found.ranks is not None and len(found.ranks) == 2
        assert found.ranks[0] == max(report.ranks[0::2]) and found.ranks[1] == max(report.ranks[1::2])
        alone = compress(heads, 1e-2, table=None).report
        assert report.dense_ms == pytest.approx(3 * alone.dense_ms)

    def test_a_large_extent_is_refused_or_certified(self):
        """A bias of 10^4 needs factors of relative accuracy 10^-7: float32 does where the rank is one."""
        line = torch.arange(50.0).expand(50, 50) * 200
        assert holds(compress(line, 1e-3, table=None), line, 1e-3).heads[0].extent == 9800.0
        with pytest.raises(NotLowRankError):
            compress(1e6 * gaussian(50), 1e-3, table=None)


class TestTables:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 45), (45, 20)])
    def test_of_a_line(self, n: int, m: int, dtype: torch.dtype):
        b = torch.stack([toeplitz(n, m, seed=s) for s in range(3)]).to(dtype)
        found = as_factors(compress(b, 1e-4))
        report = holds(found, b, 1e-4)
        assert found.rank == 0 and found.table is not None and found.code_q is None
        assert report.codes == "position" and report.table_entries == found.table.shape[1]
        assert {head.form for head in report.heads} == {"table"}
        assert report.certificate < 1e-6

    def test_tails_are_cut_off(self):
        difference = torch.arange(60) - torch.arange(60)[:, None]
        b = toeplitz(60)[5][difference.clamp(-7, 7) + 7]
        found = as_factors(compress(torch.stack([b, 2 * b]), 1e-4))
        assert found.table is not None and found.table.shape == (2, 15)
        holds(found, torch.stack([b, 2 * b]), 1e-4)

    def test_tails_stay_where_cutting_would_break_the_promise(self):
        """Entries of a million hide differences that a softmax sees."""
        b = toeplitz(40)
        b = b.round() + 1e6 * (b == b[0, 0])
        holds(compress(b, 0.2), b, 0.2)

    @pytest.mark.parametrize("axes", [(5, 6), (4, 4), (2, 3, 4)])
    @pytest.mark.parametrize("class_token", [False, True])
    def test_of_a_window(self, axes: tuple[int, ...], class_token: bool):
        b = torch.stack([window(axes, seed=s, class_token=class_token) for s in range(2)])
        found = as_factors(compress(b, 1e-4))
        report = holds(found, b, 1e-4)
        assert found.rank == 0 and found.table is not None
        assert "×".join(map(str, axes)) in report.codes and ("class token" in report.codes) == class_token

    def test_places_may_be_given(self):
        """In any order, for which nothing could be found from the values."""
        where = places((5, 6))[torch.randperm(30, generator=generator())]
        b = window((5, 6))
        b = b[where[:, 0] * 6 + where[:, 1]][:, where[:, 0] * 6 + where[:, 1]]
        assert holds(compress(b, 1e-4, positions=where), b, 1e-4).codes == "place in a 5×6 window"
        with pytest.raises(NotLowRankError):
            compress(b, 1e-4)

    def test_places_of_queries_and_keys_may_differ(self):
        where = places((5, 6))
        b = window((5, 6))[10:20]
        holds(compress(b, 1e-4, positions=(where[10:20], where)), b, 1e-4)

    def test_places_far_apart_make_no_table_longer_than_the_matrix(self):
        where = torch.randint(0, 10**9, (20,), generator=generator())
        with pytest.raises(NotLowRankError, match="no table fits"):
            compress(noise(20), 1e-4, positions=where)

    @pytest.mark.parametrize("first", [torch.zeros(30, 30), torch.ones(30, 30)])
    def test_a_constant_head_tells_nothing_of_the_others(self, first: Tensor):
        b = torch.stack([first, window((5, 6))])
        assert holds(compress(b, 1e-4), b, 1e-4).codes == "place in a 5×6 window"

    @pytest.mark.parametrize("b", [toeplitz(30), window((5, 6))], ids=["line", "window"])
    @pytest.mark.parametrize("hidden", [None, math.nan])
    def test_under_a_mask(self, b: Tensor, hidden: float | None):
        mask = causal(30)
        b = b if hidden is None else b.masked_fill(~mask, hidden)
        options = {} if b[0, 0] == b[1, 1] == b[6, 6] and hidden is None else {"positions": places((5, 6))}
        found = compress(b, 1e-4, mask=mask, **options)
        assert {head.form for head in holds(found, b, 1e-4, mask).heads} == {"table"}

    def test_under_a_mask_where_heads_may_differ(self):
        b = torch.stack([noise(60), toeplitz(60)]).masked_fill(~causal(60), math.nan)
        report = holds(
            compress(b, 1e-3, mask=causal(60), allow_dense=True, max_rank=4), b.nan_to_num(), 1e-3, causal(60)
        )
        assert [head.form for head in report.heads] == ["dense", "table"]

    @pytest.mark.parametrize("lead", [(), (3,), (2, 1)], ids=["matrix", "heads", "batch"])
    def test_exact_refuses_what_no_table_gives(self, lead: tuple[int, ...]):
        b = (toeplitz(40) + 0.1 * noise(40)).expand(*lead, 40, 40)
        with pytest.raises(
            NotLowRankError, match=r"table='exact' needs a bias that is relative to tol=0\.001"
        ) as caught:
            compress(b, 1e-3, table="exact")
        assert {head.form for head in caught.value.report.heads} == {"dense"}

    def test_are_taken_only_where_they_cost_less(self):
        b = -(torch.arange(40.0) - torch.arange(40.0)[:, None]).square() / 1e4  # rank 1, and relative
        assert {head.form for head in holds(compress(b, 1e-3), b, 1e-3).heads} == {"low rank"}

    def test_none_forbids_them(self):
        with pytest.raises(NotLowRankError, match="tables were not allowed"):
            compress(toeplitz(40), 1e-3, table=None)

    def test_a_batch_has_no_common_table(self):
        with pytest.raises(NotLowRankError, match="no table fits"):
            compress(torch.stack([toeplitz(40), noise(40)])[:, None], 1e-3)


class TestNearField:
    def test_beside_factors_where_nothing_else_does(self):
        b = spiked(80) + 0.2 * torch.cos(7 * torch.linspace(0, 1, 80)[:, None] * torch.linspace(0, 1, 80) ** 2)
        found = as_factors(compress(b, 0.02))
        report = holds(found, b, 0.02)
        assert report.heads[0].form == "table + low rank"
        assert found.table is not None and 0 < found.rank < 20

    def test_of_a_width_that_is_asked_for(self):
        b = torch.stack([spiked(80), spiked(80, seed=1)])
        found = as_factors(compress(b, 0.02, table=3))
        assert found.table is not None and found.table.shape == (2, 7)
        holds(found, b, 0.02)

    def test_under_a_mask(self):
        b, mask = spiked(60) + 0.1 * torch.outer(torch.linspace(0, 1, 60), torch.linspace(0, 1, 60)), causal(60)
        holds(compress(b, 0.05, table=3, mask=mask), b, 0.05, mask)

    def test_none_where_it_does_not_do(self):
        with pytest.raises(NotLowRankError, match="no table fits"):
            compress(noise(40), 1e-3, table=2)


class TestMask:
    def test_lowers_the_rank(self):
        b = -(torch.arange(60.0) - torch.arange(60.0)[:, None]).abs() / 5
        found = as_factors(compress(b, 1e-2, mask=causal(60), table=None))
        holds(found, b, 1e-2, causal(60))
        assert found.rank <= 2
        q, k, v = (torch.randn(1, 1, 60, 8, generator=generator(s)) for s in range(3))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, b.masked_fill(~causal(60), -math.inf))
        assert float((fb.attention(q, k, v, found, is_causal=True) - dense).abs().max()) < 1e-2 * diameter(v[0, 0])

    @pytest.mark.parametrize(
        "mask",
        [
            torch.arange(40) < 30,  # padding
            (torch.arange(40) < 30)[None],
            causal(40),
            causal(40)[None],
            torch.stack([causal(40), causal(40).mT]),
            torch.ones(40, 40, dtype=torch.bool),
        ],
        ids=["keys", "row", "matrix", "one head", "heads", "open"],
    )
    def test_broadcasts(self, mask: Tensor):
        b = torch.stack([gaussian(40), 2 * gaussian(40)])
        holds(compress(b, 1e-2, mask=mask), b, 1e-2, mask)

    def test_one_head_may_be_hidden(self):
        b, mask = torch.stack([gaussian(40), noise(40)]), torch.ones(2, 40, 40, dtype=torch.bool)
        mask[1] = False
        assert holds(compress(b, 1e-2, mask=mask), b, 1e-2, mask).ranks[1] == 0

    def test_not_a_number_may_hide_behind_it(self):
        b = gaussian(40).masked_fill(~causal(40), math.nan)
        holds(compress(b, 1e-2, mask=causal(40), table=None), b, 1e-2, causal(40))

    def test_a_batch_with_its_own_masks(self):
        b = gaussian(30).expand(2, 2, 30, 30)
        mask = torch.rand(2, 1, 1, 30, generator=generator()) > 0.3
        holds(compress(b, 1e-2, mask=mask), b, 1e-2, mask)


class TestWeights:
    def setup_method(self) -> None:
        self.b = gaussian(40, sharpness=200)[None] * 2
        self.weights = torch.softmax(4 * noise(40) + self.b, -1)

    def test_do_not_weaken_the_promise(self):
        holds(compress(self.b, 0.02, weights=self.weights, table=None), self.b, 0.02)

    def test_calibrated_promises_less_and_says_so(self, set_prices: SetPrices):
        set_prices(FreeFactors)
        found = as_factors(compress(self.b, 0.02, weights=self.weights, calibrated=True, table=None))
        assert found.report.certified_for == "probabilities like the calibration's"
        moved = torch.softmax(self.weights.double().log() + found.dense(torch.float64) - self.b, -1)
        truth = float((moved - self.weights.double()).abs().sum(-1).max()) / 2
        assert found.report.certificate == pytest.approx(truth, rel=1e-3) and truth <= 0.02
        assert found.rank < as_factors(compress(self.b, 0.02, table=None, factor_dtype=torch.float32)).rank


# -------------------------------------------------------------------- the choice


class TestChoice:
    def test_dense_heads_beside_factored_ones(self):
        b = torch.stack([noise(60), gaussian(60), noise(60, seed=1), 2 * gaussian(60)])
        found = compress(b, 1e-2, allow_dense=True)
        report = holds(found, b, 1e-2)
        assert isinstance(found, fb.MixedBias)
        assert found.heads == ((1, 3), (0, 2))
        assert [head.form for head in report.heads] == ["dense", "low rank", "dense", "low rank"]
        assert torch.equal(found.dense()[0::2], b[0::2])
        assert report.heads[0].cost_ms == report.heads[0].dense_ms > report.heads[1].cost_ms

    def test_tables_beside_factors(self):
        b = torch.stack([toeplitz(60), gaussian(60) + 0.1 * gaussian(60, sharpness=3).cumsum(0), noise(60)])
        found = compress(b, 1e-2, allow_dense=True)
        report = holds(found, b, 1e-2)
        assert [head.form for head in report.heads] == ["table", "low rank", "dense"]
        q, k, v = (torch.randn(1, 3, 60, 8, generator=generator(s)) for s in range(3))
        truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, found.dense(torch.float32))
        torch.testing.assert_close(fb.attention(q, k, v, found), truth, rtol=0, atol=2e-6)

    def test_is_one_bias_where_one_form_does(self):
        b = torch.stack([gaussian(60), 2 * gaussian(60)])
        assert isinstance(compress(b, 1e-2, allow_dense=True), fb.FactoredBias)

    def test_a_group_for_a_little_is_not_made(self):
        """One head in twenty that would be cheaper by a third saves less than a further group costs."""
        b = torch.cat([torch.stack([noise(40, seed=s) for s in range(19)]), gaussian(40)[None]])
        found = compress(b, 1e-2, table=None, allow_dense=True)
        assert isinstance(found, fb.MixedBias) and found.heads == (tuple(range(20)),)

    def test_hidden_entries_of_dense_heads_are_finite(self):
        b = noise(40).masked_fill(~causal(40), math.nan)
        found = compress(b, 1e-2, mask=causal(40), table=None, allow_dense=True)
        assert bool(torch.isfinite(found.dense()).all())

    def test_workload_decides(self):
        """A matrix that a large batch shares is cheap."""
        b = 3 * gaussian(60, sharpness=300)
        rank = as_factors(compress(b, 1e-2, table=None)).rank
        assert rank > 4
        shared = Workload(1, 60, 60, 64, batch=128)
        with pytest.raises(NotLowRankError, match=r"up to rank|not even one column pays"):
            compress(b, 1e-2, table=None, workload=shared)

    def test_the_largest_rank_that_pays_is_found_where_small_ranks_cost_more(self, set_prices: SetPrices):
        """Up to rank 5 factors take six products each."""

        class Bumpy(FixedPrices):
            def factored(self, rank: int) -> float:
                return self.pairs * (128 + rank * (60 if rank <= 5 else self.column))

        set_prices(Bumpy)
        found = as_factors(compress(gaussian(60), 1e-3, table=None, factor_dtype=torch.float32))
        assert found.rank > 5 and found.report.break_even_rank == 14

    def test_a_dense_bias_out_of_reach_costs_more_than_anything(self, set_prices: SetPrices):
        class Far(FixedPrices):
            def dense(self) -> float:
                return math.inf

        set_prices(Far)
        assert as_factors(compress(noise(30), 1e-3)).report.dense_ms == math.inf


class TestRefusal:
    @pytest.fixture
    def refusal(self) -> NotLowRankError:
        with pytest.raises(NotLowRankError) as caught:
            compress(torch.stack([gaussian(100), noise(100)]), 1e-3)
        return caught.value

    def test_says_why(self, refusal: NotLowRankError):
        message = str(refusal)
        assert "tol=0.001" in message and "a made-up device" in message
        assert "up to rank 49 factors reach 0." in message and "in 1 of 2 heads" in message
        assert "no table fits" in message and "allow_dense=True" in message

    def test_carries_the_report(self, refusal: NotLowRankError):
        low, high = refusal.report.heads
        assert low.form == "low rank" and low.certificate <= 1e-3 and low.cost_ms < low.dense_ms
        assert high.form == "dense" and high.rank == 49 and high.cost_ms == high.dense_ms
        assert list(high.certificates) == sorted(high.certificates) and max(high.certificates) == 49
        # Certificates that get better with the rank, and never good enough; and how little energy says.
        reached = list(high.certificates.values())
        assert reached == sorted(reached, reverse=True) and reached[-1] == high.certificate > 1e-3
        assert 0.5 < high.energy < 1.0
        assert refusal.report.break_even_rank == 49

    def test_report_is_plain_and_readable(self, refusal: NotLowRankError):
        plain = json.loads(json.dumps(refusal.report.to_dict()))
        assert plain["heads"][1]["form"] == "dense"
        lines = str(refusal.report).splitlines()
        assert len(lines) == 5 and "dense" in lines[-1]

    def test_of_what_would_do_but_costs_more(self):
        with pytest.raises(NotLowRankError, match="1 of 1 heads need rank 16, which costs more") as caught:
            compress(30 * gaussian(60, sharpness=50), 1e-3, table=None)
        (head,) = caught.value.report.heads
        assert head.form == "low rank" and head.rank == 16 and head.certificate <= 1e-3
        assert head.cost_ms > head.dense_ms

    def test_when_not_one_column_pays(self, set_prices: SetPrices):
        class Cheap(FixedPrices):
            def dense(self) -> float:
                return self.factored(0)

        set_prices(Cheap)
        with pytest.raises(NotLowRankError, match=r"not even one column pays; a table costs 1\.\d+ times as much"):
            compress(toeplitz(30), 1e-3)
        for given in ({"mask": causal(30)}, {"weights": torch.rand(30, 30)}):
            with pytest.raises(NotLowRankError, match="not even one column pays") as caught:
                compress(noise(30), 1e-3, table=None, **given)
            (head,) = caught.value.report.heads
            assert (head.rank, head.energy) == (0, 0.0)

    def test_names_a_table_that_would_do_at_a_higher_cost(self, set_prices: SetPrices):
        class DearTables(FixedPrices):
            def table(self, entries: int, local: bool = True, half_width: int | None = None, rank: int = 0) -> float:
                return 1.5 * self.dense()

        set_prices(DearTables)
        match = r"up to rank 29 factors reach 0\.\d+ in 1 of 1 heads; a table costs 1\.5 times as much"
        with pytest.raises(NotLowRankError, match=match) as caught:
            compress(toeplitz(60), 1e-3)
        (head,) = caught.value.report.heads
        assert head.form == "table" and head.cost_ms == 1.5 * head.dense_ms

    def test_when_heads_want_different_forms(self):
        """One head pays in float32 alone, its rounding being too coarse, the other in bfloat16 alone."""
        b = torch.stack([300 * gaussian(60, sharpness=30), gaussian(60, sharpness=200)])
        with pytest.raises(NotLowRankError, match="each head has factors that pay, but not all of one dtype"):
            compress(b, 1e-3, table=None)
        found = compress(b, 1e-3, table=None, allow_dense=True)
        holds(found, b, 1e-3)
        assert isinstance(found, fb.MixedBias) and found.heads == ((0,), (1,))


# -------------------------------------------------------------------- around it


def test_the_same_seed_gives_the_same_factors_and_touches_no_other():
    b = torch.stack([gaussian(300, sharpness=50), 2 * gaussian(300)])
    before = torch.get_rng_state()
    first, again, other = (as_factors(compress(b, 1e-2, table=None, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.phi_q, again.phi_q) and torch.equal(first.phi_k, again.phi_k)
    assert not torch.equal(first.phi_q, other.phi_q)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"allow_dense": True}, {"table": 3}])
def test_arguments_are_left_alone(options: dict[str, Any]):
    b, mask, weights = spiked(40).double(), causal(40), noise(40).abs()
    b.requires_grad_()
    copies = [x.detach().clone() for x in (b, mask, weights)]
    found = compress(b, 0.3, mask=mask, weights=weights, **options)
    assert all(torch.equal(x, copy) for x, copy in zip((b, mask, weights), copies, strict=True))
    assert not found.dense().requires_grad


def test_progress_is_told():
    told: list[tuple[int, int, str]] = []
    compress(torch.stack([gaussian(40)] * 3), 1e-2, progress=lambda *args: told.append(args))
    assert told[0] == (0, 3, "head 0: table") and told[-1] == (3, 3, "factors found")
    assert all(0 <= done <= total == 3 for done, total, _ in told)


def test_an_interruption_passes_through():
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(gaussian(40), 1e-2, progress=stop)


def test_found_bias_can_be_sliced_and_keeps_its_report():
    found = as_factors(compress(gaussian(40), 1e-2))
    assert found[5:20, :].report is found.report


class TestMeasuredPrices:
    """With the coefficients that come with the package."""

    @pytest.fixture(autouse=True)
    def fixed_prices(self) -> None:
        """The measured ones."""

    def test_forms_that_pay_on_an_h200(self):
        report = compress(torch.stack([gaussian(200), 2 * gaussian(200)]), 1e-2).report
        assert "H200" in report.device and 16 < report.break_even_rank < 200
        assert report.cost_ms < report.dense_ms

    def test_a_table_costs_more_than_a_matrix_there_and_is_taken_on_request(self):
        b = torch.stack([toeplitz(300), toeplitz(300, seed=1)])
        with pytest.raises(NotLowRankError, match=r"a table costs \d\.?\d* times as much"):
            compress(b, 1e-3)
        found = compress(b, 1e-3, table="exact")
        assert found.report.certificate < 1e-6 and found.report.cost_ms > found.report.dense_ms
        assert {head.form for head in found.report.heads} == {"table"}
        torch.testing.assert_close(found.dense(), b)

    def test_swin_v2_b_in_ten_seconds_on_two_cores(self):
        """24 layers, 376 heads of 576×576."""
        g = generator()
        layers = [swin_v2_layer(h, 24, g) for h in [4] * 2 + [8] * 2 + [16] * 18 + [32] * 2]
        assert sum(map(len, layers)) == 376
        before = time.process_time()
        found = [compress(layer, 1e-3, allow_dense=True) for layer in layers]
        assert time.process_time() - before < 20.0
        for b, bias in zip(layers[::8], found[::8], strict=True):
            assert bias.report.certificate <= 1e-3 and bias.report.cost_ms <= bias.report.dense_ms
            assert certificate(row_spread(bias.dense(torch.float64) - b)).max() <= 1e-3


# -------------------------------------------------------------------- bad input

GOOD = gaussian(12)


@pytest.mark.parametrize(
    ("error", "match", "bias", "options"),
    [
        (TypeError, "bias must be a tensor of float64, .*, got torch.int64", torch.ones(4, 4).long(), {}),
        (TypeError, "bias must be .*float16, got torch.float8_e5m2", torch.ones(4, 4).to(torch.float8_e5m2), {}),
        (TypeError, "bias must be a tensor of .*, got <class 'list'>", [[1.0]], {}),
        (ValueError, "bias must have values, got a tensor on the meta device", GOOD.to("meta"), {}),
        (ValueError, r"bias must be \[N, M\].*got shape \(4,\)", torch.ones(4), {}),
        (ValueError, r"without an empty side, got shape \(2, 0, 4\)", torch.ones(2, 0, 4), {}),
        (ValueError, r"tol must be a number in \(0, 1\), got 1.5", GOOD, {"tol": 1.5}),
        (ValueError, "tol must be a number", GOOD, {"tol": 0.0}),
        (TypeError, "mask must be a bool tensor, got torch.float32", GOOD, {"mask": torch.ones(12, 12)}),
        (ValueError, "mask has no open entry", GOOD, {"mask": torch.zeros(12, 12).bool()}),
        (ValueError, r"mask has shape \(12, 11\); it must broadcast", GOOD, {"mask": torch.ones(12, 11).bool()}),
        (ValueError, r"mask has shape \(2, 12, 12\)", GOOD, {"mask": torch.ones(2, 12, 12).bool()}),
        (TypeError, "weights must be a floating point tensor", GOOD, {"weights": torch.ones(12, 12).long()}),
        (ValueError, "weights must be finite and not negative", GOOD, {"weights": -torch.ones(12, 12)}),
        (ValueError, "weights must be finite", GOOD, {"weights": torch.full((12, 12), math.nan)}),
        (ValueError, "weights are zero everywhere", GOOD, {"weights": torch.zeros(12, 12)}),
        (ValueError, r"weights has shape \(3, 3\)", GOOD, {"weights": torch.ones(3, 3)}),
        (ValueError, "calibrated=True needs weights, got None", GOOD, {"calibrated": True}),
        (ValueError, "max_rank must be None or an integer >= 1, got 0", GOOD, {"max_rank": 0}),
        (ValueError, "max_rank must be None or an integer >= 1, got True", GOOD, {"max_rank": True}),
        (ValueError, "max_rank must be None or an integer >= 1, got 2.5", GOOD, {"max_rank": 2.5}),
        (ValueError, "table must be 'auto', 'exact', None or a half width >= 1, got 'yes'", GOOD, {"table": "yes"}),
        (ValueError, "table must be 'auto', 'exact', None or a half width >= 1, got 0", GOOD, {"table": 0}),
        (ValueError, "table=11 must be less than 11 for a bias of shape", GOOD, {"table": 11}),
        (ValueError, "table=2: one near field cannot serve the batch", GOOD.expand(2, 2, 12, 12), {"table": 2}),
        (ValueError, "table=2 is a near field along a line", GOOD, {"table": 2, "positions": places((3, 4))}),
        (ValueError, "factor_dtype must be None, torch.float32 or torch.bfloat16", GOOD, {"factor_dtype": torch.half}),
        (TypeError, "positions of queries must be an integer tensor", GOOD, {"positions": torch.rand(12)}),
        (ValueError, r"positions of queries must be \[12\] or", GOOD, {"positions": torch.arange(11)}),
        (
            ValueError,
            r"positions of queries must be .* got shape \(12, 4\)",
            GOOD,
            {"positions": torch.ones(12, 4).int()},
        ),
        (ValueError, "positions of keys", GOOD, {"positions": (torch.arange(12), torch.arange(3))}),
        (ValueError, "one number of dimensions", GOOD, {"positions": (torch.arange(12), places((3, 4)))}),
        (ValueError, "one tensor or two", GOOD, {"positions": (torch.arange(12),) * 3}),
        (ValueError, "workload is for 13 queries and 12 keys", GOOD, {"workload": Workload(1, 13, 12, 64)}),
        (
            ValueError,
            "multiple of the 2 biases",
            GOOD.expand(2, 1, 12, 12),
            {"workload": Workload(1, 12, 12, 64, batch=3)},
        ),
        (
            NotImplementedError,
            "allow_dense=True takes one bias per head",
            GOOD.expand(2, 1, 12, 12),
            {"allow_dense": True},
        ),
    ],
)
def test_bad_input(error: type[Exception], match: str, bias: Any, options: dict[str, Any]):
    with pytest.raises(error, match=match):
        compress(bias, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("options", [{}, {"table": None}, {"mask": causal(12)}])
def test_entries_that_are_not_finite(bad: float, options: dict[str, Any]):
    b = torch.stack([GOOD, GOOD]).double()
    b[1, 7, 3] = bad
    with pytest.raises(ValueError, match=r"bias has 1 entries of head 1 that are not finite.*first at \(7, 3\)"):
        compress(b, 1e-3, **options)
