"""Predicted times: what is counted, what is compared, and what the shipped coefficients say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashbias as fb
from flashbias.attention import packing, sdpa
from flashbias.attention.coefficients import FEATURES, Coefficients, Model, NoCoefficientsError
from flashbias.attention.packing import SIX_UP_TO_RANK
from flashbias.attention.plan import HeadCosts, Plan, plan, predict_ms
from flashbias.attention.workload import TableSize, Workload

SHIPPED = ("cpu", "h200")
TRAININGS = ("none", "frozen", "bias")
LONG = Workload(num_heads=16, seqlen_q=8192, seqlen_k=8192, head_dim=64)
WINDOWS = Workload(num_heads=4, seqlen_q=576, seqlen_k=576, head_dim=32, batch=1024, shared_bias=True)


def on(device: str, workload: Workload, training: str = "none") -> Workload:
    """The workload in a dtype that was measured on the device."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return replace(workload, dtype=dtype, training=training)  # type: ignore[arg-type]


# -------------------------------------------------------------------- what is asked for


class TestWorkload:
    @pytest.mark.parametrize(
        ("field", "value", "error"),
        [
            ("num_heads", 0, ValueError),
            ("num_heads", 2.0, TypeError),
            ("seqlen_q", -1, ValueError),
            ("seqlen_k", True, TypeError),
            ("head_dim", 0, ValueError),
            ("head_dim_v", 0, ValueError),
            ("batch", None, TypeError),
            ("training", "full", ValueError),
            ("dtype", "bfloat16", TypeError),
            ("factor_dtype", torch.int32, TypeError),
            ("is_causal", 1, TypeError),
            ("causal_alignment", "left", ValueError),
            ("shared_bias", -1, ValueError),
            ("shared_bias", "yes", TypeError),
        ],
    )
    def test_a_field_that_cannot_be_is_named(self, field: str, value: object, error: type[Exception]) -> None:
        with pytest.raises(error, match=field):
            replace(LONG, **{field: value})

    def test_the_batch_is_a_multiple_of_the_biases(self) -> None:
        with pytest.raises(ValueError, match=r"multiple of the 3 biases.*got 4"):
            replace(LONG, batch=4, shared_bias=3)

    @pytest.mark.parametrize(("shared", "biases"), [(False, 8), (True, 1), (2, 2)])
    def test_sharing_counts_biases(self, shared: bool | int, biases: int) -> None:
        w = replace(LONG, batch=8, shared_bias=shared)
        assert w.biases == biases
        assert w.matrix_bytes == biases * 16 * 8192 * 8192 * 2

    @pytest.mark.parametrize("entries", [0, 4, 2.0])
    def test_a_table_has_an_odd_number_of_entries(self, entries: int) -> None:
        with pytest.raises((ValueError, TypeError), match="entries"):
            TableSize(entries)

    def test_a_half_width_is_no_negative_number(self) -> None:
        with pytest.raises(ValueError, match="half_width"):
            TableSize(5, half_width=-1)


@settings(max_examples=40, deadline=None)
@given(
    seqlen_q=st.integers(1, 30),
    seqlen_k=st.integers(1, 30),
    tile=st.sampled_from([1, 4, 8]),
    steps=st.sampled_from([1, 2]),
    causal=st.booleans(),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    half_width=st.none() | st.integers(0, 12),
)
def test_pairs_are_those_of_the_tiles_that_are_touched(
    seqlen_q: int, seqlen_k: int, tile: int, steps: int, causal: bool, alignment: Any, half_width: int | None
) -> None:
    w = Workload(1, seqlen_q, seqlen_k, 8, is_causal=causal, causal_alignment=alignment)
    shift = seqlen_k - seqlen_q if alignment == "bottom_right" else 0
    count = 0
    for first_q in range(0, seqlen_q, tile):
        rows = range(first_q, first_q + tile)
        for first_k in range(0, seqlen_k, tile):
            keys = range(first_k, first_k + tile)
            group = first_k // (tile * steps) * tile * steps  # keys that are skipped together
            seen = not causal or group <= rows[-1] + shift
            # As the kernels decide it: a tile is in a tail if all its differences are at one end of the table.
            differences = [j - i for i in rows for j in keys]
            near = half_width is None or (max(differences) > -half_width and min(differences) < half_width)
            count += tile * tile * (seen and near)
    assert w.pairs(tile, step=tile * steps, half_width=half_width) == count


# -------------------------------------------------------------------- what is counted


def our_columns(w: Workload, rank: int, operands: Any) -> float:
    model = Model("ours", "ours/x", "none", ("float32",), {}, operands=operands, tile=1)
    found = model.features(w, rank)
    return found.get("columns", 0.0) / found["pairs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "head_dim_v"), [(0, 24), (3, 24), (5, 24), (9, 24), (9, 64)])
def test_concatenated_columns_are_those_that_sdpa_multiplies(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rank: int, head_dim_v: int
) -> None:
    widths: list[int] = []
    original = sdpa.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        widths.append(q.shape[-1] + v.shape[-1])
        return original(q, k, v, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    q, k, v = (torch.randn(1, 2, 6, d, dtype=dtype) for d in (24, 24, head_dim_v))
    bias = fb.FactoredBias(torch.randn(2, 6, rank), torch.randn(2, 6, rank)) if rank else None
    fb.attention(q, k, v, bias, impl="sdpa")
    w = Workload(2, 6, 6, 24, head_dim_v, dtype=dtype)
    assert our_columns(w, rank, "concatenated") + 24 + head_dim_v == widths[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 2, 5, 6, 16, 17, 40, 96, 200])
def test_packed_columns_are_those_of_the_kernels(dtype: torch.dtype, rank: int) -> None:
    terms = {torch.float32: 1, torch.bfloat16: 6 if rank <= SIX_UP_TO_RANK else 3}[dtype]
    widest = packing.WIDEST_CHUNK if dtype == torch.bfloat16 else packing.WIDEST_CHUNK // 2
    block = packing.chunk_of(terms * rank, widest)
    w = Workload(1, 8, 8, 64, dtype=dtype)
    assert our_columns(w, rank, "packed") == math.ceil(terms * rank / block) * block
    half = replace(w, dtype=torch.bfloat16, factor_dtype=torch.bfloat16)
    block = packing.chunk_of(rank)
    assert our_columns(half, rank, "packed") == math.ceil(rank / block) * block


def test_what_a_dense_bias_is_read_from_depends_on_sharing() -> None:
    model = Model("dense", "dense/x", "none", ("bfloat16",), {})
    w = replace(LONG, batch=8)
    own, shared = model.features(w), model.features(replace(w, shared_bias=True))
    assert own["dense_bytes"] == 8 * shared["dense_bytes"]
    assert own["pairs"] == shared["pairs"]
    masked = replace(model, causal="computed")
    causal = replace(w, is_causal=True)
    assert masked.features(causal)["pairs"] == own["pairs"] > 1.9 * model.features(causal)["pairs"]


def test_only_tiles_near_the_diagonal_look_a_local_table_up() -> None:
    model = Model("ours", "ours/x", "none", ("bfloat16",), {}, operands="packed")
    found = {
        name: model.features(LONG, 0, table)["lookups"]
        for name, table in {
            "near": TableSize(257),
            "nearer": TableSize(257, half_width=8),
            "everywhere": TableSize(257, local=False),
            "whole": TableSize(2 * 8192 - 1),
        }.items()
    }
    assert found["nearer"] < found["near"] < 0.1 * found["everywhere"]
    assert found["whole"] == found["everywhere"] == 8192**2


def test_features_have_the_names_of_the_table() -> None:
    ours = Model("ours", "ours/x", "none", ("bfloat16",), {}, operands="packed").features(
        replace(LONG, head_dim=128), 3, TableSize(9)
    )
    dense = Model("dense", "dense/x", "none", ("bfloat16",), {}).features(LONG)
    assert {"launch", *ours, *dense} == set(FEATURES)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [({"flops": 1.0}, "unknown feature 'flops'"), ({"pairs": -1.0}, "pairs"), ({"pairs": math.nan}, "pairs")],
)
def test_coefficients_are_checked(coefficients: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model("ours", "ours/x", "none", ("float32",), coefficients)


# -------------------------------------------------------------------- predictions


@pytest.mark.parametrize("device", SHIPPED)
@pytest.mark.parametrize("training", TRAININGS)
class TestShipped:
    """What must hold whatever the coefficients are."""

    def test_more_rank_costs_more(self, device: str, training: str) -> None:
        costs = HeadCosts(on(device, LONG, training), device)
        times = [costs.factored(rank) for rank in range(1, 200)]
        assert times == sorted(times)
        assert costs.factored(0) < times[0]
        assert times[-1] > 1.2 * times[0]

    def test_ranks_add_head_by_head(self, device: str, training: str) -> None:
        w = replace(on(device, LONG, training), num_heads=4)
        ranks = (4, 100, 4, 16)
        costs = HeadCosts(w, device)
        launch = predict_ms(w, "factored", ranks=0, device=device) - 4 * costs.factored(0)
        total = predict_ms(w, "factored", ranks=ranks, device=device)
        assert total == pytest.approx(launch + sum(costs.factored(rank) for rank in ranks))
        assert total < predict_ms(w, "factored", ranks=100, device=device)
        assert costs.factored(4) < costs.factored(100)

    @pytest.mark.parametrize("shape", [LONG, WINDOWS, replace(LONG, num_heads=2, seqlen_q=300, seqlen_k=300)])
    def test_factors_pay_up_to_the_break_even_rank(self, device: str, training: str, shape: Workload) -> None:
        w = on(device, shape, training)
        found = plan(w, device=device)
        rank, dense = found.break_even_rank, found.ms("dense")
        assert rank is not None
        if rank > 0:
            assert predict_ms(w, "factored", ranks=rank, device=device) <= dense
        if rank < min(w.seqlen_q, w.seqlen_k):
            assert predict_ms(w, "factored", ranks=rank + 1, device=device) > dense

    def test_a_table_adds_to_a_head(self, device: str, training: str) -> None:
        costs = HeadCosts(on(device, LONG, training), device)
        near, everywhere = costs.table(257), costs.table(257, local=False)
        assert costs.factored(0) < near <= everywhere
        assert costs.table(257, True, 8) <= near
        assert costs.table(257, rank=16) - near == pytest.approx(costs.factored(16) - costs.factored(0))

    def test_head_costs_are_what_one_more_head_adds(self, device: str, training: str) -> None:
        w = on(device, LONG, training)
        more = replace(w, num_heads=17)
        costs = HeadCosts(w, device)
        table = TableSize(129)
        for form, options, cost in (
            ("factored", {"ranks": 16}, costs.factored(16)),
            ("table", {"table": table}, costs.table(129)),
            ("table+factored", {"table": table, "ranks": 8}, costs.table(129, rank=8)),
            ("dense", {}, costs.dense()),
        ):
            added = predict_ms(more, form, **options, device=device) - predict_ms(w, form, **options, device=device)
            assert added == pytest.approx(cost), form

    def test_no_bias_is_the_floor(self, device: str, training: str) -> None:
        found = plan(on(device, LONG, training), ranks=16, device=device)
        for form in ("dense", "factored"):
            assert found.ms("bias-free") < 1.1 * found.ms(form)  # both are known to a few per cent


def test_half_precision_factors_cost_less_than_those_that_are_split() -> None:
    split = HeadCosts(LONG, "h200").factored(32)
    assert HeadCosts(replace(LONG, factor_dtype=torch.bfloat16), "h200").factored(32) < split


def test_gradients_cost_more() -> None:
    times = [predict_ms(on("h200", LONG, t), "factored", ranks=16, device="h200") for t in TRAININGS]
    assert times[0] < times[1] <= times[2]


def test_one_bias_for_the_batch_makes_dense_cheaper() -> None:
    w = replace(LONG, num_heads=1, batch=16)
    assert HeadCosts(replace(w, shared_bias=True), "h200").dense() < HeadCosts(w, "h200").dense()


@settings(max_examples=30, deadline=None)
@given(
    seqlen=st.integers(1, 20_000),
    heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    causal=st.booleans(),
    rank=st.integers(0, 300),
)
def test_every_prediction_is_a_positive_number(seqlen: int, heads: int, head_dim: int, causal: bool, rank: int) -> None:
    w = Workload(heads, seqlen, seqlen, head_dim, is_causal=causal)
    found = plan(w, ranks=rank, table=33, device="h200")
    assert all(0 < p.ms < math.inf for p in found.predictions)
    assert str(found).count("\n") == len(found.predictions) + 1


def test_a_matrix_beyond_memory_is_out_of_reach() -> None:
    w = Workload(num_heads=8, seqlen_q=1 << 20, seqlen_k=1 << 20, head_dim=16)
    found = plan(w, ranks=5, device="h200")
    assert found.best == "factored"
    assert found.ms("dense") == HeadCosts(w, "h200").dense() == math.inf
    assert found.break_even_rank == 1 << 20
    assert "out of reach" in str(found)


# -------------------------------------------------------------------- the plan


def test_forms_are_those_that_ranks_and_table_allow() -> None:
    def forms(**options: Any) -> list[str]:
        return [p.form for p in plan(LONG, device="h200", **options).predictions]

    assert forms() == ["dense", "bias-free"]
    assert forms(ranks=4) == ["factored", "dense", "bias-free"]
    assert forms(table=9) == ["table", "dense", "bias-free"]
    assert forms(ranks=4, table=9) == ["factored", "table", "table+factored", "dense", "bias-free"]
    assert forms(ranks=4, forms=["dense", "factored"]) == ["dense", "factored"]


def test_a_plan_reads_as_a_table_with_a_sentence() -> None:
    found = plan(LONG, ranks=[4] * 15 + [64], table=257, device="h200")
    lines = str(found).splitlines()
    assert "1×16×8192×8192, head_dim 64, bfloat16, forward, on NVIDIA H200" in lines[0]
    assert [line for line in lines if line.startswith("->")] == [lines[1 + FORM_ORDER.index(found.best)]]
    assert "ranks 4…64" in lines[1]
    assert "257 entries" in lines[2]
    assert "2048 MiB" in lines[4]
    assert lines[-1].startswith(f"{found.best.capitalize()} is best, ")
    assert lines[-1].endswith(f"up to rank {found.break_even_rank} in every head.")


FORM_ORDER = ["factored", "table", "table+factored", "dense", "bias-free"]


def test_dense_is_said_to_be_right_where_it_is() -> None:
    w = replace(WINDOWS, seqlen_q=256, seqlen_k=256)
    found = plan(w, ranks=256, device="h200")
    assert found.best == "dense"
    assert str(found).splitlines()[-1].startswith("Dense is best, ")
    assert "times as fast as factored" in str(found)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("sparse", {}, "form must be one of"),
        ("factored", {}, "needs ranks"),
        ("table+factored", {"ranks": 3}, "needs a table"),
        ("factored", {"ranks": [1, 2]}, r"ranks must be one integer or 16.*got 2"),
        ("factored", {"ranks": -1}, "ranks must be integers >= 0"),
        ("factored", {"ranks": [2.0]}, "ranks must be integers >= 0"),
        ("table", {"table": 4}, "entries must be odd"),
    ],
)
def test_bad_requests_are_named(form: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_ms(LONG, form, device="h200", **options)
    with pytest.raises(ValueError, match=message):
        plan(LONG, forms=[form], device="h200", **options)


@pytest.mark.parametrize("forms", [[], ["bias-free"]])
def test_a_plan_is_for_a_bias(forms: list[str]) -> None:
    with pytest.raises(ValueError, match="forms must name a form that a bias can have"):
        plan(LONG, forms=forms, device="h200")


def test_a_head_has_no_negative_rank() -> None:
    with pytest.raises(ValueError, match="rank must be an integer >= 0, got -1"):
        HeadCosts(LONG, "h200").factored(-1)


# -------------------------------------------------------------------- coefficients of a device


@pytest.mark.parametrize("device", ["h200", "NVIDIA H200", "NVIDIA H200 NVL"])
def test_a_device_goes_by_its_name(device: str) -> None:
    assert plan(LONG, device=device).device == "NVIDIA H200"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_the_cpu_has_coefficients(device: str | torch.device) -> None:
    assert plan(on("cpu", LONG), device=device).device.startswith("CPU")


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "h100", "tpu"])
def test_a_device_without_coefficients_is_said_to_have_none(device: str) -> None:
    with pytest.raises(NoCoefficientsError, match=rf"no coefficients for device '{device}'.*cpu, h200.*--calibrate"):
        plan(LONG, device=device)


def test_a_dtype_that_was_not_measured_is_named() -> None:
    with pytest.raises(NoCoefficientsError, match=r"float64 on NVIDIA H200; there are .*none/bfloat16"):
        plan(replace(LONG, dtype=torch.float64), ranks=2, device="h200")


def test_what_was_never_timed_is_not_predicted(tmp_path: Path) -> None:
    content = json.loads((Path(sdpa.__file__).parent / "coefficients" / "cpu.json").read_text())
    for model in content["models"]:
        model["coefficients"].pop("lookups", None)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    w = on("cpu", LONG)
    assert plan(w, ranks=4, device=path).ms("factored") == plan(w, ranks=4, device="cpu").ms("factored")
    with pytest.raises(NoCoefficientsError, match="ours/sdpa was not measured with lookups"):
        plan(w, table=9, device=str(path))
    # Another implementation that was timed stands for both, however slow it is.
    slower = [dict(model, provider="ours/slow") for model in content["models"] if model["provider"] == "ours/sdpa"]
    for model in slower:
        model["coefficients"] = {name: 9 * value for name, value in model["coefficients"].items()} | {"lookups": 1.0}
    path.write_text(json.dumps({**content, "models": [*content["models"], *slower]}))
    providers = {p.form: p.provider for p in plan(w, ranks=4, table=9, device=path).predictions}
    assert (providers["table"], providers["factored"]) == ("ours/slow", "ours/sdpa")
    assert HeadCosts(w, path).table(9) > HeadCosts(w, path).factored(4)


@pytest.mark.parametrize(
    "text", ["not json", "[]", "{}", '{"device": "x", "provenance": {}, "memory_bytes": null, "models": [{}]}']
)
def test_a_file_without_coefficients_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json holds no coefficients"):
        plan(LONG, device=path)


@pytest.mark.parametrize("device", SHIPPED)
def test_shipped_coefficients_say_where_they_come_from(device: str) -> None:
    found = Coefficients.of(device)
    assert {"source", "date", "packages", "points", "errors"} <= set(found.provenance)
    for model in found.models:
        assert model.provider.startswith(("ours/", "dense", "bias-free/"))
        assert any(model.coefficients.values())
    covered = {(model.family, model.training) for model in found.models}
    assert covered == {(family, training) for family in ("ours", "dense", "bias-free") for training in TRAININGS}


def test_a_plan_is_made_of_plain_values() -> None:
    found = plan(LONG, ranks=4, device="h200")
    assert isinstance(found, Plan)
    assert found.ranks == (4,) * 16
    with pytest.raises(KeyError):
        found.ms("table")
