from __future__ import annotations

from pathlib import Path

import pytest

from flashbias.bench import case_names, provider_names, read_rows
from flashbias.cli.app import run


def test_list_names_every_case_and_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--list"]) == 0
    words = capsys.readouterr().out.split()
    assert set(case_names()) <= set(words)
    assert set(provider_names()) <= set(words)


def test_a_small_run_writes_a_csv_that_can_be_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        "--small",
        "--case",
        "swin-49",
        "--pass",
        "fwd",
        "--provider",
        "ours/sdpa",
        "--dtype",
        "float32",
    ]
    assert run(["bench", *chosen, "--device", "cpu", "--out", str(tmp_path), "--name", "tiny"]) == 0
    first = capsys.readouterr().out
    (row,) = read_rows(tmp_path / "tiny.csv")
    assert (row.case, row.pass_name, row.provider, row.status) == ("swin-49@small", "fwd", "ours/sdpa", "ok")
    assert run(["bench", "--table", str(tmp_path / "tiny.csv")]) == 0
    assert capsys.readouterr().out.strip() in first
