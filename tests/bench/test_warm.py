"""Compiling before anything is timed: every job once, a failure costs its own, the time is kept."""

import json
import time

import pytest

import flashbias.bench as bench
from flashbias.bench import warm as module
from flashbias.bench.providers import Provider, registry
from flashbias.bench.report import read_rows
from flashbias.bench.rows import Job, Reference, RowTimer, Settings
from flashbias.bench.warm import warm

SETTINGS = Settings("cpu", seed=0, budget_s=0.001, min_repetitions=2, row_limit_s=30)
CASES = [bench.CASES[name].small() for name in ("swin-49", "full-32")]


def jobs(*providers, passes=("fwd", "fwdbwd")):
    return [Job(case, pass_name, p, "float32") for case in CASES for pass_name in passes for p in providers]


@pytest.mark.usefixtures("forked")
def test_every_job_runs_once_and_passes_share_a_process(mine, logged):
    assert warm(jobs(mine["log"]), SETTINGS, 2) == {}
    lines = logged()
    assert sorted(line[:2] for line in lines) == sorted(
        [case.name, grads] for case in CASES for grads in ("False", "True")
    )
    assert len({(case, pid) for case, _, pid in lines}) == len(CASES)


def test_what_cannot_run_here_is_passed_over(monkeypatch):
    monkeypatch.setattr(module, "Worker", None)  # no process is started at all
    absent = Provider("mine/absent", registry()["ours/sdpa"].prepare, module="no_such_package")
    elsewhere = Provider("mine/gpu", registry()["ours/sdpa"].prepare, devices=("cuda",))
    assert warm(jobs(absent, elsewhere), SETTINGS, 4) == {}


@pytest.mark.usefixtures("forked")
def test_what_a_provider_does_not_support_is_no_failure():
    assert (
        warm(jobs(registry()["dense/sdpa-cudnn"], registry()["ours/sdpa"], registry()["ours/triton"]), SETTINGS, 1)
        == {}
    )


@pytest.mark.usefixtures("forked")
def test_a_crash_costs_its_own_unit(mine, logged):
    failures = warm(jobs(mine["crash"], mine["log"], passes=("fwd",)), SETTINGS, 1)
    assert list(failures) == [f"{case.name} fwd mine/crash float32" for case in CASES]
    assert all(reason.startswith("error: process died (signal 9") for reason in failures.values())
    assert [line[0] for line in logged()] == [case.name for case in CASES]


@pytest.mark.usefixtures("forked")
def test_the_time_is_kept_and_nobody_stays(mine):
    began = time.monotonic()
    failures = warm(jobs(mine["slow"], mine["log"], passes=("fwd",)), SETTINGS, 1, ends=began + 4)
    assert time.monotonic() - began < 6
    assert len(failures) == 4
    assert set(failures.values()) == {"not reached"}


@pytest.mark.usefixtures("forked")
def test_a_worker_that_hangs_is_replaced(mine, monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", -29.0)  # of a limit of 30 s, which the child keeps for itself
    failures = warm(jobs(mine["slow"], registry()["ours/sdpa"], passes=("fwd",)), SETTINGS, 1)
    assert failures == {f"{case.name} fwd mine/slow float32": "hung" for case in CASES}


def test_compiling_needs_no_reference(monkeypatch):
    monkeypatch.setattr(Reference, "compute", None)
    row = RowTimer(SETTINGS).compile(jobs(registry()["ours/sdpa"])[0], 30)
    assert row.status == "ok"
    assert row.median_ms == row.max_rel_error == ""


def test_a_run_is_warmed_before_it_is_timed(mine, tmp_path, logged):
    seen, said = [], []
    path = bench.run(
        CASES,
        ["fwd"],
        [mine["crash"], mine["log"]],
        ["float32"],
        tmp_path / "out",
        device="cpu",
        budget_s=0.001,
        warm=2,
        isolate=True,
        first=[mine["log"]],
        progress=lambda done, total, row: seen.append((done, total, row.case, row.provider)),
        say=said.append,
    )
    names = [case.name for case in CASES]
    order = [*((name, "mine/log") for name in names), *((name, "mine/crash") for name in names)]
    assert seen == [(done, 4, *who) for done, who in enumerate(order, 1)]
    # The file has its usual order, whoever came first.
    assert [(row.case, row.provider) for row in read_rows(path)] == [
        (name, provider) for name in names for provider in ("mine/crash", "mine/log")
    ]
    assert len(logged()) == 4  # each case once to compile, once to measure
    facts = json.loads(path.with_suffix(".json").read_text())["warm"]
    assert facts["processes"] == 2
    assert sorted(facts["failures"]) == sorted(f"{name} fwd mine/crash float32" for name in names)
    assert said[0].startswith("rows have run once, 2 at a time, after ")
    assert said[0].endswith(" s; 2 did not")
    assert len(said) == 3


def test_what_is_on_disk_is_not_compiled_again(mine, tmp_path, logged):
    options = {"small": True, "device": "cpu", "budget_s": 0.001}
    where = (["swin-49"], ["fwd"], [mine["log"]], ["float32"], tmp_path / "out")
    bench.run(*where, **options)
    bench.run(*where, **options, warm=2, resume=True)
    assert len(logged()) == 1
