import csv
import functools
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import flashbias.bench as bench
from flashbias.bench import environment, rows, runner
from flashbias.bench.peers import Unsupported
from flashbias.bench.providers import Prepared, Provider, registry
from flashbias.bench.report import COLUMNS, read_rows
from flashbias.bench.rows import Job, RowTimer, Settings

SETTINGS = Settings("cpu", seed=0, budget_s=0.001, min_repetitions=2, row_limit_s=30)
right = registry()["ours/sdpa"].prepare


def run(tmp_path, providers, **options):
    options = {"cases": ["swin-49"], "passes": ["fwd"], "dtypes": ["float32"], "device": "cpu"} | options
    return bench.run(
        providers=providers,
        out_dir=tmp_path,
        small=True,
        budget_s=0.001,
        min_repetitions=2,
        **options,
    )


def statuses(path):
    return {row.provider: row.status for row in read_rows(path)}


def failing(name, error):
    def prepare(inputs, grads):
        raise error

    return Provider(name, prepare)


@pytest.fixture
def endless(monkeypatch):
    """A provider that takes what time the run has left, without anybody having to wait: the clock goes on by itself."""
    skipped = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped[0])
    for module in (runner, rows):
        monkeypatch.setattr(module, "time", clock)

    def prepare(inputs, grads):
        skipped[0] += 3600
        raise rows.OverTime

    return Provider("mine/slow", prepare)


# -------------------------------------------------------------------- files


def test_csv_has_the_columns_and_numbers(tmp_path):
    path = run(tmp_path, ["ours/sdpa", "dense/sdpa"], passes=["fwd", "fwdbwd"], dtypes=["float32", "bfloat16"])
    assert path == tmp_path / "bench.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    header = "case,pass,provider,dtype,median_ms,p10_ms,p90_ms,peak_mib,max_rel_error,status"
    assert path.read_text().splitlines()[0] == header == ",".join(COLUMNS)
    assert [(line["dtype"], line["pass"], line["provider"]) for line in lines] == [
        (dtype, pass_name, provider)
        for dtype in ("float32", "bfloat16")
        for pass_name in ("fwd", "fwdbwd")
        for provider in ("ours/sdpa", "dense/sdpa")
    ]
    for line in lines:
        assert line["case"] == "swin-49@small"
        assert line["status"] == "ok"
        assert 0 < float(line["p10_ms"]) <= float(line["median_ms"]) <= float(line["p90_ms"])
        assert 0 < float(line["max_rel_error"]) < 2e-2
        assert line["peak_mib"] == ""  # a CPU has no allocator to ask
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.tmp"))


def test_json_says_where_and_how(tmp_path):
    path = run(tmp_path, ["ours/sdpa"], commit="0123abc")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["commit"] == "0123abc"
    assert facts["finished"] is True
    assert facts["seconds"] > 0
    assert facts["settings"] == {
        "device": "cpu",
        "seed": 0,
        "budget_s": 0.001,
        "min_repetitions": 2,
        "row_limit_s": 90.0,
    }
    assert set(facts) >= {"device", "driver", "cuda", "cudnn", "python", "started", "system"}


def test_commit_is_none_outside_a_repository(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda command: None)
    assert environment.describe_environment(torch.device("cpu"))["commit"] is None


def test_progress_sees_every_row(tmp_path):
    seen = []
    run(
        tmp_path,
        ["ours/sdpa", "ours/reference"],
        progress=lambda done, total, row: seen.append((done, total, row.provider)),
    )
    assert seen == [(1, 2, "ours/sdpa"), (2, 2, "ours/reference")]


# -------------------------------------------------------------------- agreement and failures are results


def test_a_wrong_result_has_no_number(tmp_path):
    def wrong(inputs, grads):
        prepared = right(inputs, grads)
        return Prepared(lambda: prepared.forward() * 1.01, prepared.leaves, prepared.dout)

    path = run(tmp_path, [Provider("mine/wrong", wrong), "ours/sdpa"])
    row, good = read_rows(path)
    assert row.status == "wrong"
    assert row.median_ms == row.p10_ms == row.p90_ms == row.peak_mib == ""
    assert float(row.max_rel_error) == pytest.approx(0.01, rel=0.01)
    assert good.status == "ok"


def test_a_wrong_gradient_has_no_number(tmp_path):
    def wrong(inputs, grads):
        prepared = right(inputs, grads)
        leaves = dict(prepared.leaves)
        if grads:  # as if the kernel had mixed them up
            leaves["key"], leaves["value"] = leaves["value"], leaves["key"]
        return Prepared(prepared.forward, leaves, prepared.dout)

    path = run(tmp_path, [Provider("mine/wrong", wrong)], passes=["fwd", "fwdbwd"])
    assert [row.status for row in read_rows(path)] == ["ok", "wrong"]


def test_an_output_that_is_never_written_is_wrong(tmp_path):
    def empty(inputs, grads):
        prepared = right(inputs, grads)
        return Prepared(lambda: torch.empty_like(inputs.query), prepared.leaves, prepared.dout)

    assert statuses(run(tmp_path, ["ours/sdpa", Provider("mine/empty", empty)]))["mine/empty"] == "wrong"


def test_failures_are_results(tmp_path):
    wrapped = RuntimeError("Observed exception")
    wrapped.__cause__ = NotImplementedError("no backward here")
    path = run(
        tmp_path,
        [
            failing("mine/oom", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
            failing("mine/cpu-oom", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
            failing("mine/unsupported", Unsupported("index overflow beyond 2^31 elements")),
            failing("mine/not-implemented", NotImplementedError("impl='x' cannot do\nthis call")),
            failing("mine/no-kernel", RuntimeError("No available kernel. Aborting execution.")),
            failing("mine/wrapped", wrapped),
            failing("mine/error", KeyError("lost, and\nfound")),
            failing("mine/long", RuntimeError("x" * 1000)),
            Provider("mine/missing", right, module="no_such_package"),
            Provider("mine/gpu", right, devices=("cuda",)),
            "ours/sdpa",
        ],
    )
    found = statuses(path)
    assert found["mine/oom"] == found["mine/cpu-oom"] == "oom"
    assert found["mine/unsupported"] == "unsupported: index overflow beyond 2^31 elements"
    assert found["mine/not-implemented"] == "unsupported: impl='x' cannot do"
    assert found["mine/no-kernel"].startswith("unsupported: No available kernel")
    assert found["mine/wrapped"] == "unsupported: no backward here"
    assert found["mine/error"].startswith("error: KeyError: ")
    assert len(found["mine/long"]) < 200
    assert found["mine/missing"] == "not installed"
    assert found["mine/gpu"] == "unsupported: does not run on cpu"
    assert found["ours/sdpa"] == "ok"
    assert all(row.median_ms == "" for row in read_rows(path) if row.status != "ok")


def test_a_lost_device_is_said_in_every_row_that_follows():
    timer = RowTimer(SETTINGS)
    timer.lost = "dense/flex on mesh-32k: illegal memory access"
    case = bench.CASES["swin-49"].small()
    row = timer.measure(Job(case, "fwd", registry()["ours/sdpa"], "float32"), 30)
    assert row.status == "error: device lost earlier: dense/flex on mesh-32k: illegal memory access"


def test_inputs_and_references_are_made_once_for_a_case(monkeypatch):
    made = []
    compute = rows.Reference.compute
    monkeypatch.setattr(
        rows.Reference, "compute", lambda *args, **options: made.append(options) or compute(*args, **options)
    )
    timer = RowTimer(SETTINGS)
    case = bench.CASES["swin-49"].small()
    for pass_name in ("fwdbwd", "fwd"):
        for name in ("ours/sdpa", "dense/sdpa", "bias-free/sdpa", "ours/reference"):
            assert timer.measure(Job(case, pass_name, registry()[name], "float32"), 30).status == "ok"
    assert made == [{"biased": True, "grads": True}, {"biased": False, "grads": True}]


def test_one_reference_serves_both_passes(monkeypatch):
    made = []
    compute = rows.Reference.compute
    monkeypatch.setattr(
        rows.Reference, "compute", lambda *args, **options: made.append(options) or compute(*args, **options)
    )
    timer = RowTimer(SETTINGS, ("fwd", "fwdbwd"))
    case = bench.CASES["swin-49"].small()
    for pass_name in ("fwd", "fwdbwd"):
        for name in ("ours/sdpa", "dense/sdpa"):
            assert timer.measure(Job(case, pass_name, registry()[name], "float32"), 30).status == "ok"
    assert made == [{"biased": True, "grads": True}]


def test_a_device_with_room_keeps_earlier_cases(monkeypatch):
    drawn = []
    inputs = bench.Case.inputs
    monkeypatch.setattr(bench.Case, "inputs", lambda case, *args: drawn.append(case.name) or inputs(case, *args))
    timer = RowTimer(SETTINGS)
    first, second = (
        Job(bench.CASES[name].small(), "fwd", registry()["ours/sdpa"], "float32") for name in ("swin-49", "full-32")
    )
    share = 0.0
    monkeypatch.setattr(timer, "_kept_share", lambda: share)
    for job in (first, second, first, second):
        timer.measure(job, 30)
    assert drawn == ["swin-49@small", "full-32@small"]
    share = 1.0
    third = Job(bench.CASES["full-64"].small(), "fwd", registry()["ours/sdpa"], "float32")
    for job in (third, first):
        timer.measure(job, 30)
    assert drawn[2:] == ["full-64@small", "swin-49@small"]
    assert len(timer._kept) == 1


def test_memory_that_other_cases_keep_is_no_reason_to_run_out(monkeypatch):
    timer = RowTimer(SETTINGS)
    monkeypatch.setattr(timer, "_kept_share", lambda: 0.0)

    def greedy(inputs, grads):
        if len(timer._kept) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")
        return right(inputs, grads)

    first, second = (bench.CASES[name].small() for name in ("swin-49", "full-32"))
    assert timer.measure(Job(first, "fwd", registry()["ours/sdpa"], "float32"), 30).status == "ok"
    assert timer.measure(Job(second, "fwd", Provider("mine/greedy", greedy), "float32"), 30).status == "ok"
    always = failing("mine/always", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 900 GiB"))
    assert timer.measure(Job(first, "fwd", always, "float32"), 30).status == "oom"


# -------------------------------------------------------------------- time


def sleeping(inputs, grads, seconds=30.0):
    time.sleep(seconds)
    return right(inputs, grads)


def test_a_row_over_its_limit_ends(tmp_path):
    start = time.monotonic()
    path = run(tmp_path, [Provider("mine/slow", sleeping), "ours/sdpa"], row_limit_s=0.2)
    assert statuses(path) == {"mine/slow": "error: over the time limit of 0.2 s", "ours/sdpa": "ok"}
    assert time.monotonic() - start < 15


def test_a_limit_cannot_be_swallowed_by_a_peer():
    def stubborn(inputs, grads):
        try:
            time.sleep(30)
        except Exception:
            return right(inputs, grads)

    case = bench.CASES["swin-49"].small()
    row = RowTimer(SETTINGS).measure(Job(case, "fwd", Provider("mine/stubborn", stubborn), "float32"), 0.2)
    assert row.status.startswith("error: over the time limit")


def test_what_does_not_fit_the_run_is_skipped(tmp_path):
    slow = Provider("mine/slow", functools.partial(sleeping, seconds=0.5))
    path = run(tmp_path, [slow, "ours/sdpa", "ours/reference"], time_limit_s=0.4)
    assert set(statuses(path).values()) == {"skipped: time limit"}
    assert len(read_rows(path)) == 3
    assert json.loads(path.with_suffix(".json").read_text())["finished"] is True


# -------------------------------------------------------------------- resume


def test_resume_keeps_finished_rows_and_measures_the_rest(tmp_path, endless):
    quick = Provider("mine/quick", right)
    first = run(tmp_path, [quick, endless], time_limit_s=100)
    kept, skipped = read_rows(first)
    assert (kept.status, skipped.status) == ("ok", "skipped: time limit")
    seen = []
    slow = Provider("mine/slow", functools.partial(sleeping, seconds=0.0))
    second = run(tmp_path, [quick, slow], resume=True, progress=lambda done, total, row: seen.append(row))
    again, measured = read_rows(second)
    assert again == kept  # to the last digit: it was not measured again
    assert measured.status == "ok"
    assert seen == [kept, measured]


def test_interruption_leaves_the_rows_on_disk(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [failing("mine/stop", KeyboardInterrupt())])
    part = tmp_path / "bench.csv.part"
    assert part.exists()
    assert json.loads((tmp_path / "bench.json").read_text())["finished"] is False

    def stop_after_one(done, total, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["ours/sdpa", "ours/reference"], progress=stop_after_one)
    assert [row.provider for row in read_rows(part)] == ["ours/sdpa"]
    with part.open("a") as file:
        file.write("swin-49@small,fwd,ours/ref")  # cut short in the middle of a line
    (before,) = read_rows(part)
    path = run(tmp_path, ["ours/sdpa", "ours/reference"], resume=True)
    assert [row.provider for row in read_rows(path)] == ["ours/sdpa", "ours/reference"]
    assert read_rows(path)[0] == before


def test_without_resume_everything_is_measured_anew(tmp_path):
    run(tmp_path, ["ours/reference"])
    path = run(tmp_path, ["ours/sdpa"])
    assert [row.provider for row in read_rows(path)] == ["ours/sdpa"]


def test_rows_of_another_seed_are_not_mixed_in(tmp_path):
    run(tmp_path, ["ours/sdpa"], seed=1)
    with pytest.raises(ValueError, match="seed 1, now 2"):
        run(tmp_path, ["ours/sdpa"], seed=2, resume=True)
    (tmp_path / "bench.json").unlink()
    with pytest.raises(ValueError, match=r"cannot resume: .*bench\.json"):
        run(tmp_path, ["ours/sdpa"], seed=1, resume=True)


# -------------------------------------------------------------------- isolation


def test_rows_that_matter_come_first_and_resume_goes_on(tmp_path, endless):
    said, seen = [], []
    path = run(
        tmp_path,
        [endless, "ours/sdpa"],
        cases=["swin-49", "full-32"],
        first=["ours/sdpa"],
        time_limit_s=100,
        say=said.append,
    )
    assert [row.status for row in read_rows(path)] == ["skipped: time limit", "ok"] * 2
    assert said == ["2 of 4 rows did not fit 100 s; resume goes on with them"]
    quick = Provider("mine/slow", right)
    path = run(
        tmp_path,
        [quick, "ours/sdpa"],
        cases=["swin-49", "full-32"],
        resume=True,
        isolate=False,
        progress=lambda done, total, row: seen.append(row.status),
        say=said.append,
    )
    assert seen == ["ok"] * 4
    assert len(said) == 1  # nothing is missing any more


def test_a_crash_costs_one_row(tmp_path, mine):
    path = run(tmp_path / "out", [mine["crash"], "ours/sdpa", "ours/reference"], isolate=True)
    assert statuses(path) == {
        "mine/crash": f"error: process died (signal {int(signal.SIGKILL)})",
        "ours/sdpa": "ok",
        "ours/reference": "ok",
    }


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["swin"]}, "unknown case 'swin'"),
        ({"passes": ["bwd"]}, r"unknown pass 'bwd'; allowed are fwd, fwdbwd"),
        ({"dtypes": ["float8"]}, "unknown dtype 'float8'"),
        ({"time_limit_s": 0}, "time_limit_s must be positive, got 0"),
        ({"warm": -1}, "warm must be a number of processes, 0 for none, got -1"),
        ({"first": ["nobody"]}, "unknown provider 'nobody'"),
        ({"name": "mine/bench"}, "name must be that of a file, without a folder, got 'mine/bench'"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', but torch finds \d+ GPUs"),
        ({"row_limit_s": -1}, "row_limit_s must be positive, got -1"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, ["ours/sdpa"], **options)
    assert os.listdir(tmp_path) == []
