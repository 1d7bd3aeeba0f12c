"""Coefficients from measured rows: the fit, the files, and predicted against measured times."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashbias.attention import coefficients as shipped
from flashbias.attention.coefficients import Coefficients, NoCoefficientsError
from flashbias.attention.hopper.configs import ready_columns
from flashbias.attention.plan import plan, predict_ms
from flashbias.attention.workload import TableSize, Workload
from flashbias.bench.calibrate import MIN_POINTS, calibrate, calibration_providers, compare, errors_by_form, fit
from flashbias.bench.cases import CASES, Case
from flashbias.bench.points import Point, points_of, read_points
from flashbias.bench.probes import CALIBRATION, probes
from flashbias.bench.report import Row, write_rows
from flashbias.bench.rows import Job, RowTimer, Settings

SHIPPED = sorted(Path(shipped.__file__).parent.glob("*.json"))
SMALL = CASES["swin-49"].small()


def row(case: str, provider: str, ms: float = 1.0, pass_name: str = "fwd", status: str = "ok") -> Row:
    return Row(case, pass_name, provider, "bfloat16", f"{ms:.4f}" if status == "ok" else "", status=status)


# -------------------------------------------------------------------- points


class TestPoints:
    def test_a_row_becomes_a_point(self) -> None:
        (point,) = points_of([row("swin-576", "ours/triton", 0.7)])
        assert (point.case, point.family, point.provider, point.rank, point.ms) == (
            "swin-576", "ours", "ours/triton", 16, 0.7,
        )  # fmt: skip
        w = point.workload
        assert (w.num_heads, w.seqlen_q, w.seqlen_k, w.head_dim, w.batch) == (4, 576, 576, 32, 1024)
        assert (w.biases, w.training, w.dtype, w.factor_dtype) == (1, "none", torch.bfloat16, torch.bfloat16)

    @pytest.mark.parametrize(
        ("provider", "case", "expected"),
        [
            ("ours/triton", "full-64", ["bias"]),
            ("ours/triton", "alibi-64-8k", ["frozen"]),  # its factors take no gradient
            ("ours-frozen/triton", "full-64", ["frozen"]),
            ("ours-bias-free/triton", "full-64", ["frozen", "bias"]),
            ("bias-free/fa4", "full-64", ["frozen", "bias"]),
            ("dense/flex", "full-64", ["frozen"]),
            ("dense+grad/flex", "full-64", ["bias"]),
            ("table-full/triton", "full-64", ["bias"]),
            ("table-local-frozen/triton", "full-64", ["frozen"]),
        ],
    )
    def test_forward_and_backward_is_a_kind_of_training(self, provider: str, case: str, expected: list[str]) -> None:
        found = points_of([row(case, provider, pass_name="fwdbwd")])
        assert [point.workload.training for point in found] == expected

    def test_tables_and_factors_of_one_kernel_are_fitted_together(self) -> None:
        rows = [
            row("full-64", f"{family}/triton") for family in ("ours", "ours-bias-free", "table-local", "table-full")
        ]
        found = points_of(rows)
        assert {point.provider for point in found} == {"ours/triton"}
        assert [point.rank for point in found] == [16, 0, 0, 0]
        assert [point.table for point in found] == [None, None, TableSize(33), TableSize(2 * 8192 - 1, local=False)]
        assert [point.form for point in found] == ["factored", "factored", "table", "table"]

    def test_what_no_plan_can_use_is_left_out(self) -> None:
        others = ["ours/reference", "ours-deterministic/triton", "concat/fa4", "alibi/flex", "dense/trifast"]
        assert points_of([row("full-64", provider) for provider in others]) == []
        assert points_of([row("full-64", "dense/flex", status="oom")]) == []

    def test_float32_factors_are_told_from_half_precision_ones(self) -> None:
        (point,) = points_of([row("mesh-32k", "ours/triton")])
        assert point.workload.factor_dtype == torch.float32

    def test_an_unknown_case_is_named(self) -> None:
        with pytest.raises(ValueError, match="unknown case 'mine'"):
            points_of([row("mine", "dense/flex")])
        assert len(points_of([row("mine", "dense/flex")], [replace(SMALL, name="mine")])) == 1

    def test_a_point_survives_json(self) -> None:
        rows = [row("mesh-32k", "ours/triton"), row("full-64", "table-local/triton"), row("alibi-64-8k", "dense/flex")]
        for point in points_of(rows):
            assert Point.from_dict(json.loads(json.dumps(point.to_dict()))) == point


# -------------------------------------------------------------------- the fit


def synthetic(training: str = "none") -> list[Point]:
    """Times that the shipped coefficients predict, on cases that differ in everything."""
    known = Coefficients.of("h200")
    generator = np.random.default_rng(0)
    points = []
    for index in range(40):
        w = Workload(
            num_heads=int(generator.integers(1, 33)),
            seqlen_q=(n := int(2 ** generator.uniform(5, 13))),
            seqlen_k=n,
            head_dim=int(generator.choice([16, 32, 64, 128])),
            batch=int(generator.choice([1, 4, 64])),
            is_causal=bool(generator.integers(2)),
            shared_bias=bool(generator.integers(2)),
            training=training,  # type: ignore[arg-type]
        )
        rank = int(generator.integers(0, 100))
        table = [None, TableSize(65), TableSize(2 * n - 1, local=False)][index % 3]
        for family, provider, r, t in (("ours", "ours/triton", rank, table), ("dense", "dense/flex", 0, None)):
            model = next(m for m in known.models if (m.provider, m.training) == (provider, training))
            ms = model.ms(w, (r,) * w.num_heads, t)
            points.append(Point(f"case-{index}", w, family, provider, r, t, ms))
    return points


@pytest.mark.parametrize("training", ["none", "frozen"])
def test_a_fit_recovers_what_made_the_times(training: str) -> None:
    fitted = fit(synthetic(training), "cuda")
    assert [(model.provider, model.training) for model, _ in fitted] == [
        ("ours/triton", training), ("dense/flex", training),
    ]  # fmt: skip
    known = Coefficients.of("h200")
    made = Coefficients("made", tuple(model for model, _ in fitted), {})
    fresh = Workload(num_heads=12, seqlen_q=3000, seqlen_k=3000, head_dim=96, batch=2, training=training)  # type: ignore[arg-type]
    ranks = (7,) * 12
    for form, table in (("factored", None), ("table", TableSize(9)), ("table+factored", TableSize(9))):
        true = known.fastest(form, fresh, ranks, table)[1]
        assert made.fastest(form, fresh, ranks, table)[1] == pytest.approx(true, rel=1e-3)
    for model, errors in fitted:
        assert errors["points"] == 40
        assert errors["max_error"] < 1e-3
        assert errors["held_out_median_error"] < 1e-3
        assert model.dtypes == ("bfloat16", "float16")


def test_noise_is_seen_in_the_errors() -> None:
    generator = np.random.default_rng(1)
    noisy = [replace(point, ms=point.ms * generator.uniform(0.7, 1.3)) for point in synthetic()]
    for _, errors in fit(noisy, "cuda"):
        assert 0.05 < errors["median_error"] <= errors["max_error"] < 0.5


def test_coefficients_are_never_negative() -> None:
    generator = np.random.default_rng(2)
    nonsense = [replace(point, ms=float(10 ** generator.uniform(-3, 3))) for point in synthetic()]
    for model, _ in fit(nonsense, "cuda"):
        assert min(model.coefficients.values()) >= 0


def test_too_few_points_give_no_coefficients() -> None:
    points = [point for point in synthetic() if point.family == "ours"]
    assert fit(points[: MIN_POINTS - 1], "cuda") == []
    assert len(fit(points[:MIN_POINTS], "cuda")) == 1


def test_features_that_no_point_has_get_no_coefficient() -> None:
    points = [point for point in synthetic() if point.family == "ours" and point.table is None]
    ((model, _),) = fit(points, "cuda")
    assert "lookups" not in model.coefficients
    with pytest.raises(NoCoefficientsError, match="lookups"):
        model.head_ms(points[0].workload, 0, TableSize(5))


class TestKernelsWithLimits:
    """`ours/hopper` takes factors up to a width, so it stands beside an implementation that takes all."""

    @staticmethod
    def made() -> Coefficients:
        """The portable kernels, and others at half their time."""
        points = [point for point in synthetic() if point.family == "ours"]
        faster = [replace(p, provider="ours/hopper", ms=p.ms / 2) for p in points]
        return Coefficients("made", tuple(model for model, _ in fit([*points, *faster], "cuda")), {})

    def test_their_limits_are_known(self) -> None:
        portable, hopper = self.made().models
        assert (portable.operands, portable.max_columns) == ("packed", None)
        assert (hopper.operands, hopper.max_columns) == ("ready", 256)

    @pytest.mark.parametrize(
        ("form", "rank", "table", "expected"),
        [
            ("factored", 16, None, "ours/hopper"),
            ("factored", 256, None, "ours/hopper"),
            ("factored", 257, None, "ours/triton"),
            ("table", 0, TableSize(65), "ours/hopper"),
            ("table+factored", 257, TableSize(65), "ours/triton"),
        ],
        ids=str,
    )
    def test_the_fastest_that_can(self, form: str, rank: int, table: TableSize | None, expected: str) -> None:
        w = Workload(num_heads=8, seqlen_q=4096, seqlen_k=4096, head_dim=64, factor_dtype=torch.bfloat16)
        model, _ = self.made().fastest(form, w, (rank,) * 8, table)
        assert model is not None
        assert model.provider == expected

    def test_all_heads_have_the_columns_of_the_largest(self) -> None:
        portable, hopper = self.made().models
        w = Workload(num_heads=2, seqlen_q=4096, seqlen_k=4096, head_dim=64, factor_dtype=torch.bfloat16)
        assert hopper.ms(w, (4, 100)) == hopper.ms(w, (100, 100)) > hopper.ms(w, (4, 4))
        assert portable.ms(w, (4, 100)) < portable.ms(w, (100, 100))

    @pytest.mark.parametrize(
        ("factor_dtype", "head_dim", "rank", "columns"),
        [
            (torch.bfloat16, 64, 32, 32),  # 1/8 is a power of two
            (torch.bfloat16, 32, 32, 64),  # two parts
            (torch.bfloat16, 64, 96, 128),
            (torch.float32, 64, 5, 32),  # six products
        ],
    )
    def test_columns_are_those_that_the_kernels_hold(
        self, factor_dtype: torch.dtype, head_dim: int, rank: int, columns: int
    ) -> None:
        _, hopper = self.made().models
        w = Workload(num_heads=1, seqlen_q=512, seqlen_k=512, head_dim=head_dim, factor_dtype=factor_dtype)
        assert hopper.features(w, rank)["columns"] == 512 * 512 * columns
        assert ready_columns(rank, factor_dtype, factor_dtype, head_dim**-0.5, w.dtype) == columns


def test_the_rows_that_ship_can_be_fitted(tmp_path: Path) -> None:
    """Those of the kernels for Hopper have no tables everywhere; tables then are those of the portable kernels."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "h200"
    rows = [results / "bench.csv", *sorted((results / "planner").glob("calibration*.csv"))]
    found = calibrate(tmp_path / "h200.json", rows=rows)
    forms = {comparison.form for comparison in found.comparisons}
    assert {"factored", "table", "dense", "bias-free"} <= forms
    assert {"ours/triton", "ours/hopper"} <= {model.provider for model in found.coefficients.models}


def test_what_peers_cannot_do_is_known() -> None:
    providers = ("dense/flex", "dense/sdpa-cudnn", "dense/cuequivariance")
    rows = [row(case, provider, pass_name="fwd") for case in list(CASES)[:7] for provider in providers]
    flex, cudnn, cuequivariance = (model for model, _ in fit(points_of(rows), "cuda"))
    assert (flex.max_elements, flex.causal) == (2**31, "skipped")
    assert (cudnn.max_elements, cudnn.causal) == (None, "computed")
    assert cuequivariance.causal == "unsupported"
    made = Coefficients("made", (flex, cudnn, cuequivariance), {})
    wide = Workload(num_heads=8, seqlen_q=32768, seqlen_k=32768, head_dim=16, is_causal=True)
    assert [model.provider for model in made.candidates("dense", wide)] == ["dense/sdpa-cudnn"]


# -------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShipped:
    def test_stated_errors_are_those_of_the_points(self, path: Path) -> None:
        coefficients, points = Coefficients.load(path), read_points(path)
        assert coefficients.provenance["points"] == len(points)
        assert errors_by_form(compare(points, coefficients)) == coefficients.provenance["errors"]

    def test_every_model_states_the_error_of_its_own_points(self, path: Path) -> None:
        content = json.loads(path.read_text())
        points = read_points(path)
        for entry, model in zip(content["models"], Coefficients.load(path).models, strict=True):
            own = [
                point
                for point in points
                if (point.provider, point.workload.training) == (model.provider, model.training)
                and str(point.workload.dtype).removeprefix("torch.") in model.dtypes
            ]
            errors = [abs(model.ms(p.workload, (p.rank,) * p.workload.num_heads, p.table) / p.ms - 1) for p in own]
            assert entry["fit"]["points"] == len(own) > 0
            assert entry["fit"]["median_error"] == pytest.approx(np.median(errors), abs=2e-4)
            assert entry["fit"]["max_error"] == pytest.approx(max(errors), abs=2e-4)

    def test_predictions_are_near_the_measured_times(self, path: Path) -> None:
        found = Coefficients.load(path).provenance["errors"]
        assert found["all"]["cases"] >= 20
        assert found["all"]["median_error"] < 0.15
        for form, errors in found.items():
            assert errors["median_error"] < 0.15, form


# -------------------------------------------------------------------- the whole of it


def write_run(path: Path, device: str = "NVIDIA H200", memory_mib: int | None = 141_000) -> Path:
    """A CSV and its environment, with times that the shipped coefficients predict."""
    rows = []
    for name in ("full-128", "full-64", "full-32", "swin-576", "swin-49", "triangle-512", "triangle-1024"):
        for provider, form in (("ours/triton", "factored"), ("dense/flex", "dense"), ("bias-free/fa4", "bias-free")):
            (point,) = points_of([row(name, provider)])
            rows.append(row(name, provider, predict_ms(point.workload, form, ranks=point.rank, device="h200")))
    write_rows(path, rows)
    environment = {"device": device, "device_memory_mib": memory_mib, "started": "2026-01-02T03:04:05", "packages": {}}
    path.with_suffix(".json").write_text(json.dumps(environment))
    return path


class TestFromRows:
    def test_files_are_written_and_can_be_planned_with(self, tmp_path: Path) -> None:
        out = tmp_path / "made" / "mine.json"
        found = calibrate(out, rows=[write_run(tmp_path / "bench.csv")])
        assert sorted(file.name for file in out.parent.iterdir()) == ["mine-fit.csv", "mine-fit.png", "mine.json"]
        assert (out.parent / "mine-fit.png").read_bytes().startswith(b"\x89PNG")
        with (out.parent / "mine-fit.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(found.comparisons) == 21
        assert all(float(line["error"]) < 0.05 for line in lines)
        made = plan(Workload(16, 8192, 8192, 64, factor_dtype=torch.bfloat16), ranks=16, device=out)
        assert made.device == "NVIDIA H200"
        true = plan(made.workload, ranks=16, device="h200")
        assert made.ms("factored") == pytest.approx(true.ms("factored"), rel=0.05)
        provenance = Coefficients.load(out).provenance
        assert (provenance["date"], provenance["points"]) == ("2026-01-02", 21)
        assert "bench.csv" in provenance["source"]
        assert "factored" in str(found) and "median" in str(found)

    def test_an_environment_is_needed(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "bench.csv")
        path.with_suffix(".json").unlink()
        with pytest.raises(ValueError, match=r"bench\.json.*is missing"):
            calibrate(tmp_path / "mine.json", rows=[path])

    def test_rows_come_from_one_device(self, tmp_path: Path) -> None:
        paths = [write_run(tmp_path / "a.csv"), write_run(tmp_path / "b.csv", device="NVIDIA A100")]
        with pytest.raises(ValueError, match="one device, got NVIDIA A100, NVIDIA H200"):
            calibrate(tmp_path / "mine.json", rows=paths)

    def test_rows_of_another_device_are_refused_before_anything_is_measured(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "bench.csv")
        with pytest.raises(ValueError, match="rows must come from one device"):
            calibrate(tmp_path / "mine.json", rows=[path], device="cpu", progress=lambda *_: pytest.fail("measured"))
        assert not list(tmp_path.glob("mine*"))

    def test_too_few_points_leave_no_file(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "bench.csv")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
        with pytest.raises(ValueError, match="nothing to fit"):
            calibrate(tmp_path / "mine.json", rows=[path])
        assert not list(tmp_path.glob("mine*"))

    def test_the_result_is_a_json_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"ends in \.json"):
            calibrate(tmp_path / "mine.csv", rows=[write_run(tmp_path / "bench.csv")])


def test_missing_rows_are_measured(tmp_path: Path) -> None:
    cases = [Case(f"tiny-{n}", (1,), 1, n, 8, 2) for n in (8, 16, 32)]
    seen: list[Row] = []
    out = tmp_path / "mine.json"
    found = calibrate(
        out,
        device="cpu",
        cases=cases,
        providers=["ours/sdpa", "table-local/sdpa"],
        dtypes=["float32"],
        passes=["fwd"],
        budget_s=0.001,
        progress=lambda done, total, row: seen.append(row),
    )
    assert len(seen) == 6
    assert {row.status for row in seen} == {"ok"}
    assert (tmp_path / "mine-rows.csv").exists()
    ours = ("factored", "table", "table+factored")
    made = plan(Workload(2, 32, 32, 16, dtype=torch.float32), ranks=4, table=33, device=out, forms=ours)
    assert made.break_even_rank is None  # no dense bias was timed
    assert 0 < made.ms("factored") <= made.ms("table+factored")
    assert {c.form for c in found.comparisons} == {"factored", "table"}
    with pytest.raises(NoCoefficientsError, match="no coefficients for form 'dense'"):
        plan(made.workload, ranks=4, device=out)


class TestProbes:
    @pytest.mark.parametrize("provider", [p for p in probes() if p.name.endswith("/sdpa")], ids=lambda p: p.name)
    @pytest.mark.parametrize("pass_name", ["fwd", "fwdbwd"])
    def test_what_a_probe_computes_is_checked(self, provider, pass_name: str) -> None:
        if not provider.applies(SMALL, pass_name):
            assert pass_name == "fwd"
            assert provider.name.split("/")[0].endswith("frozen")
            return
        timer = RowTimer(Settings("cpu", seed=0, budget_s=0.001, min_repetitions=2, row_limit_s=30))
        row = timer.measure(Job(SMALL, pass_name, provider, "float32"), 30)
        assert row.status == "ok"
        assert float(row.max_rel_error) < 1e-4

    def test_a_table_learns_or_does_not(self) -> None:
        inputs = SMALL.inputs(torch.float32, "cpu")
        known = {p.name: p for p in probes()}
        assert "table" in known["table-full/sdpa"].prepare(inputs, True).leaves
        assert "table" not in known["table-full-frozen/sdpa"].prepare(inputs, True).leaves
        assert set(known["ours-frozen/sdpa"].prepare(inputs, True).leaves) == {"query", "key", "value"}

    @pytest.mark.parametrize("device_type", ["cpu", "cuda"])
    def test_cases_tell_the_features_apart(self, device_type: str) -> None:
        impl = {"cpu": "sdpa", "cuda": "triton"}[device_type]
        names = [f"{family}/{impl}" for family in ("ours", "table-local", "table-full")]
        points = points_of([row(case.name, name) for case in CALIBRATION[device_type] for name in names])
        ((model, _),) = fit(points, device_type)
        heads = [model.features(p.workload, p.rank, p.table) for p in points]
        matrix = np.array([[h.get(name, 0.0) for name in model.coefficients if name != "launch"] for h in heads])
        assert np.linalg.matrix_rank(matrix / matrix.max(axis=0)) == matrix.shape[1]

    def test_providers_are_those_that_can_be_planned_with(self) -> None:
        names = [provider.name for provider in calibration_providers("cpu")]
        assert {"ours/sdpa", "ours-frozen/sdpa", "table-local/sdpa", "dense/sdpa", "bias-free/sdpa"} <= set(names)
        assert not [name for name in names if name.startswith(("concat", "alibi")) or name.endswith("reference")]
        assert [p.name for p in calibration_providers("cpu", ["table-full/s*"])] == ["table-full/sdpa"]
        with pytest.raises(ValueError, match="unknown provider 'fast'"):
            calibration_providers("cpu", ["fast"])
