from __future__ import annotations

import pytest

from flashbias.demo import measure as measuring
from flashbias.demo.measure import STAGES, Job, OutOfMemory, free_memory, measure


def job(method: str, copies: int = 1, dtype: str = "float32") -> Job:
    return Job(method, copies, num_heads=2, head_dim=16, device="cpu", dtype=dtype, seed=0)


def test_a_process_of_its_own_measures_every_stage() -> None:
    rows = measure(job("dense", copies=2))
    assert [row.stage for row in rows] == list(STAGES)
    for row in rows:
        assert row.residues == 1572
        assert row.status == "ok"
        assert row.median_ms is not None and row.median_ms > 0
        assert row.error is not None and 0 < row.error < 1e-3


def test_a_dense_bias_shows_in_peak_memory_and_factors_do_not() -> None:
    peaks = {method: measure(job(method, copies=4))[1].peak_mib for method in ("dense", "factored")}
    one_matrix = 2 * 3144**2 * 4 / 2**20
    assert peaks["dense"] is not None and peaks["dense"] > one_matrix
    assert peaks["factored"] is not None and peaks["factored"] < one_matrix


def test_running_out_of_memory_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_memory", lambda device: 50 * 2**20)
    with pytest.raises(OutOfMemory):
        measure(job("dense", copies=4))


def test_another_failure_is_an_error_that_says_what_happened() -> None:
    with pytest.raises(RuntimeError, match="no_such_dtype"):
        measure(job("dense", dtype="no_such_dtype"))


def test_some_memory_is_free() -> None:
    assert 2**20 < free_memory("cpu") < 2**50
