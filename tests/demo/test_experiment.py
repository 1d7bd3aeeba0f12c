from __future__ import annotations

import pytest

from flashbias.demo import experiment
from flashbias.demo.experiment import Settings, run
from flashbias.demo.measure import STAGES, Job, Measurement, OutOfMemory

GIB = 2**30


def fake(job: Job) -> list[Measurement]:
    """A dense bias takes 1 GiB times the square of the copies, factors a hundredth of it times the copies."""
    peak = 1024.0 * job.copies**2 if job.method == "dense" else 10.0 * job.copies
    seconds = 1e-3 * job.copies**2
    return [Measurement(786 * job.copies, job.method, stage, 1e3 * seconds, peak, 1e-6) for stage in STAGES]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(experiment, "measure", fake)
    monkeypatch.setattr(experiment, "free_memory", lambda device: 5 * GIB)
    return monkeypatch


@pytest.mark.usefixtures("machine")
def test_sizes_double_and_what_cannot_fit_is_a_result() -> None:
    steps: list[tuple[int, int]] = []
    rows = run(Settings(copies=8, device="cpu"), lambda done, total, what: steps.append((done, total)))
    assert steps == [(done, 8) for done in range(9)]
    assert len(rows) == 4 * 2 * len(STAGES)
    dense = {row.residues: row for row in rows if row.method == "dense"}
    assert [n for n, row in dense.items() if row.status == "ok"] == [786, 1572]
    assert dense[3144].status == "out of memory: would need 16.0 GiB, 5.0 GiB are free"
    assert dense[6288].median_ms is None
    assert all(row.status == "ok" for row in rows if row.method == "factored")


def test_what_runs_out_of_memory_all_the_same_is_a_result(machine: pytest.MonkeyPatch) -> None:
    def out_of_memory(job: Job) -> list[Measurement]:
        if job.method == "dense" and job.copies == 2:
            raise OutOfMemory("killed")
        return fake(job)

    machine.setattr(experiment, "measure", out_of_memory)
    rows = run(Settings(copies=2, device="cpu"))
    statuses = {(row.residues, row.method): row.status for row in rows}
    assert statuses[1572, "dense"] == "out of memory: needs 4.0 GiB or more"
    assert statuses[1572, "factored"] == "ok"


def test_another_failure_ends_the_experiment(machine: pytest.MonkeyPatch) -> None:
    def fail(job: Job) -> list[Measurement]:
        raise RuntimeError("a kernel could not be built")

    machine.setattr(experiment, "measure", fail)
    with pytest.raises(RuntimeError, match="a kernel could not be built"):
        run(Settings(copies=1, device="cpu"))


@pytest.mark.usefixtures("machine")
def test_nothing_is_begun_that_would_end_too_late() -> None:
    rows = run(Settings(copies=64, device="cpu", seconds=0.5))
    late = [row for row in rows if row.status.startswith("not begun: would take about")]
    assert {row.residues for row in late if row.method == "factored"} == {786 * 16, 786 * 32, 786 * 64}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("copies", 0),
        ("copies", 513),
        ("num_heads", 0),
        ("head_dim", 4),
        ("seconds", 0.0),
        ("seconds", float("nan")),
        ("device", "tpu"),
        ("dtype", "float64"),
    ],
)
def test_settings_name_what_cannot_be_used(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*, got {value!r}"):
        Settings(**{name: value})  # type: ignore[arg-type]
