"""A run over two ranks leaves its rows and its page; committed ones are what the page shows."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.distributed.page import PAGE, rewritten, write_page
from benchmarks.distributed.problem import ALONE, Part, Way, points, relative_error, sample, theory
from benchmarks.distributed.run import Run

from flashbias.distributed import RankError

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "h200x2"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    run(folder)
    return folder


def run(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(str(path) for path in (ROOT / "src", ROOT))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    measure = ["-m", "benchmarks.distributed", "--small", "--repeat", "0.01", "--out", str(folder), *options]
    done = subprocess.run([*command, *measure], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "distributed.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_way_agrees_and_sends_what_it_must(results: Path) -> None:
    rows = rows_of(results)
    assert len(rows) == 2 * (2 * 4 + 2 * 3)
    assert all(row["status"] == "ok" and float(row["ms"]) > 0 for row in rows)
    for row in rows:
        if row["strategy"] == "alone":
            assert not row["efficiency"] and row["impl"] == "sdpa"
            continue
        assert float(row["error"]) < 1e-5 and float(row["efficiency"]) > 0 and row["impl"] == "reference"
        assert float(row["sent_mb"]) == pytest.approx(float(row["theory_mb"]), rel=1e-3)  # tensors begin at 16 bytes
    causal = next(r for r in rows if (r["case"], r["strategy"], r["pass"]) == ("alibi-128", "ring", "fwd"))
    assert float(causal["bias_share"]) == pytest.approx(2 * 2 / (2 * 32) / 4 / 2, abs=2e-3)


def test_a_second_run_keeps_what_is_there_and_one_without_time_leaves_out(results: Path, tmp_path: Path) -> None:
    before = (results / "distributed.csv").read_text()
    assert "stands there already" in run(results) and (results / "distributed.csv").read_text() == before
    assert "left out: alibi-128" in run(tmp_path, "--seconds", "1", "--cases", "alibi")
    assert not (tmp_path / "distributed.csv").exists()


def test_the_page_of_a_run(results: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "page.png"
    page.write_text(PAGE.read_text())
    write_page(results, page, picture)
    text = page.read_text()
    assert "| alibi-128 | 256 | ring, zigzag |" in text and "# measured: 256 tokens" in text
    assert picture.stat().st_size > 10_000
    assert rewritten(text, results) == text
    with pytest.raises(ValueError, match="the page must have one <!-- distributed:begin -->"):
        rewritten("nothing", results)
    with pytest.raises(FileNotFoundError, match=r"no distributed\.csv"):
        write_page(tmp_path, page, picture)


def test_the_documentation_shows_the_committed_run() -> None:
    if (COMMITTED / "distributed.csv").exists():
        assert rewritten(PAGE.read_text(), COMMITTED) == PAGE.read_text()
    else:
        assert "No run on GPUs is recorded here yet." in PAGE.read_text()


def test_a_run_goes_on_without_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run = SimpleNamespace(
        size=2, summary={}, arguments=SimpleNamespace(small=True), device=torch.device("cpu"), say=said.append
    )

    def fails(error: Exception) -> None:
        def measure(**_: object) -> None:
            raise error

        monkeypatch.setattr("benchmarks.distributed.run.measure_link", measure)
        Run.link(run)  # type: ignore[arg-type]

    fails(RuntimeError("times do not grow with sizes"))
    assert said == ["no link: times do not grow with sizes"] and run.summary == {}
    with pytest.raises(RankError):
        fails(RankError("gone", 0, (1,), "a measurement"))


def test_rows_of_all_ranks_make_the_sample() -> None:
    case, device = points(is_small=True)[0], torch.device("cpu")
    way = Way("ring", "zigzag")
    parts = [Part(case, way, 3, rank, device, torch.float32) for rank in range(3)]
    whole, chosen = Part(case, ALONE, 1, 0, device, torch.float32), sample(case.seqlen, 17, device)
    found = sum(part.rows(part.leaves["query"], chosen) for part in parts)
    assert torch.equal(found, whole.rows(whole.leaves["query"], chosen))
    assert chosen[0] == 0 and chosen[-1] == case.seqlen - 1


def test_theory_and_errors() -> None:
    alibi = points(is_small=False)[-1]
    assert alibi.name == "mesh" and alibi.seqlen == 1_048_576
    sent, of_bias = theory(alibi, Way("ring"), 2, 2, is_backward=False)
    assert of_bias / (sent - of_bias) == 5 * 4 / (8 * 2 * 16 * 2)
    x = torch.ones(3, 4)
    assert relative_error([x, 2 * x], [x, x]) == 1.0 and relative_error([x], [x]) == 0.0
    assert relative_error([x * float("nan")], [x]) != relative_error([x], [x])
