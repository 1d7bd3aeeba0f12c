from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashbias.attention.plan import plan
from flashbias.attention.workload import Workload
from flashbias.bench import case_names, provider_names, read_rows
from flashbias.bench.paper import PAPER_CASES
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


def test_the_paper_writes_a_page_beside_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "paper", "--list"]) == 0
    assert set(PAPER_CASES) <= set(capsys.readouterr().out.split())

    monkeypatch.chdir(tmp_path)
    chosen = ["--small", "--pass", "fwd", "--dtype", "float32", "--device", "cpu"]
    chosen += ["--case", "gpt2-2k", "--case", "car-8k", "--provider", "ours/sdpa"]
    assert run(["bench", "paper", *chosen]) == 0
    first = capsys.readouterr().out
    folder = Path("results/paper")
    assert {file.name for file in folder.iterdir()} == {"paper.csv", "paper.json", "paper.md"}
    rows = read_rows(folder / "paper.csv")
    assert [(row.case, row.status) for row in rows] == [("gpt2-2k@small", "ok"), ("car-8k@small", "ok")]
    page = (folder / "paper.md").read_text()
    assert "Table 3, forward: GPT-2" in page and "Table 5, forward: PDE" in page and "39.26" in page

    assert run(["bench", "paper", "--table", str(folder / "paper.csv")]) == 0
    assert capsys.readouterr().out.strip() in first
    assert run(["bench", *chosen[:1], "paper", *chosen[1:], "--resume"]) == 0  # the word may stand anywhere
    assert read_rows(folder / "paper.csv") == rows


def test_a_calibration_measures_fits_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["swin-49", "swin-576", "triangle-512", "full-64", "full-32", "mesh-32k"]
    chosen = [part for case in cases for part in ("--case", case)]
    chosen += ["--small", "--pass", "fwd", "--dtype", "float32", "--provider", "ours/sdpa", "--device", "cpu"]
    out = tmp_path / "mine.json"
    assert run(["bench", "--calibrate", *chosen, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "factored" in said and "6 cases" in said and str(out) in said
    assert len(read_rows(tmp_path / "mine-rows.csv")) == 6
    w = Workload(2, 64, 64, 32, dtype=torch.float32)
    first = plan(w, ranks=4, device=out, forms=["factored"])
    # The rows are enough to fit again, into a folder and under another name.
    again = tmp_path / "again"
    assert run(["bench", "--calibrate", "--from", str(tmp_path / "mine-rows.csv"), "--out", str(again)]) == 0
    assert {file.name for file in again.iterdir()} == {
        "coefficients.json",
        "coefficients-fit.csv",
        "coefficients-fit.png",
    }
    assert plan(w, ranks=4, device=again / "coefficients.json", forms=["factored"]) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", __file__], "--from goes with --calibrate"),
        (["--calibrate", "--from", __file__], "is missing"),
        (["--calibrate", "--provider", "fast"], "unknown provider 'fast'"),
        (["--calibrate", "--case", "nothing"], "unknown case 'nothing'"),
        (["--calibrate", "--out", "mine.csv/x.csv.json", "--device", "tpu"], "device must be"),
        (["--out", __file__], "--out must be a folder"),
        (["--table", str(Path(__file__).parent)], "is a directory"),
        (["paper", "--calibrate"], "--calibrate has cases of its own and does not go with 'paper'"),
        (["papers"], "unknown suite 'papers'; there are bench, paper"),
        (["paper", "--case", "swin-49"], "unknown case 'swin-49'; cases are gpt2-2k"),
    ],
)
def test_a_calibration_that_cannot_be_is_answered_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))
