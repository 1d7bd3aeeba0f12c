"""Children that measure: what a row may do to them, and what is left to the rows that follow."""

import os
import signal
import time

import pytest

import flashbias.bench as bench
from flashbias.bench import isolation
from flashbias.bench.isolation import IsolatedTimer
from flashbias.bench.providers import registry
from flashbias.bench.report import read_rows
from flashbias.bench.rows import Job, Settings

SETTINGS = Settings("cpu", seed=0, budget_s=0.001, min_repetitions=2, row_limit_s=30)
CASE = bench.CASES["swin-49"].small()


@pytest.fixture
def started(monkeypatch):
    """The workers in the order in which they were started."""
    workers = []

    class Recorded(isolation.Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            workers.append(self)

    monkeypatch.setattr(isolation, "Worker", Recorded)
    return workers


@pytest.fixture
def timer():
    timer = IsolatedTimer(SETTINGS)
    yield timer
    timer.close()


def job(provider):
    return Job(CASE, "fwd", provider, "float32")


@pytest.mark.usefixtures("forked")
def test_one_process_serves_many_rows_and_one_waits(timer, mine, started, logged):
    for _ in range(3):
        assert timer.measure(job(mine["log"]), 30).status == "ok"
    assert len({pid for *_, pid in logged()}) == 1
    assert len(started) == 2
    timer.close()
    assert not any(worker.is_alive() for worker in started)


def test_the_spare_takes_over_after_a_crash(timer, mine, started):
    assert timer.measure(job(mine["crash"]), 30).status == f"error: process died (signal {int(signal.SIGKILL)})"
    spare = started[1]
    assert timer.measure(job(registry()["ours/sdpa"]), 30).status == "ok"
    assert timer._worker is spare
    assert len(started) == 3  # and the next one waits


@pytest.mark.usefixtures("forked")
def test_a_hang_costs_one_row(timer, mine, monkeypatch):
    monkeypatch.setattr(isolation, "GRACE_S", 0.5)
    began = time.monotonic()
    assert timer.measure(job(mine["hang"]), 0.5).status == "error: hung, stopped after 1 s"
    assert timer.measure(job(registry()["ours/sdpa"]), 30).status == "ok"
    assert time.monotonic() - began < 40


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_between_rows_costs_none(timer, mine, logged):
    assert timer.measure(job(mine["log"]), 30).status == "ok"
    os.kill(int(logged()[0][-1]), signal.SIGKILL)
    timer._worker._process.join()
    assert timer.measure(job(mine["log"]), 30).status == "ok"


@pytest.mark.usefixtures("forked")
def test_a_spare_that_died_while_it_waited_costs_none(timer, mine, started):
    assert timer.measure(job(mine["log"]), 30).status == "ok"
    started[1]._process.kill()
    started[1]._process.join()
    assert timer.measure(job(mine["crash"]), 30).status.startswith("error: process died")
    assert timer.measure(job(registry()["ours/sdpa"]), 30).status == "ok"


@pytest.mark.usefixtures("forked")
def test_a_hang_does_not_outlast_the_run(tmp_path, mine):
    began = time.monotonic()
    path = bench.run(
        ["swin-49"],
        ["fwd"],
        [mine["hang"], "ours/sdpa"],
        ["float32"],
        tmp_path / "out",
        small=True,
        device="cpu",
        budget_s=0.001,
        isolate=True,
        time_limit_s=4,
    )
    assert time.monotonic() - began < 4 + isolation.LAST_GRACE_S + 3
    assert [row.status for row in read_rows(path)] == ["skipped: time limit"] * 2
