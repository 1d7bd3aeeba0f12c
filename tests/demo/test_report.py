from __future__ import annotations

import csv
from pathlib import Path

import pytest

from flashbias.demo import report
from flashbias.demo.measure import STAGES, Measurement
from flashbias.demo.report import conclusion, markdown, write

OOM = "out of memory: would need 35.5 GiB, 22.6 GiB are free"


def row(residues: int, method: str, stage: str, ms: float, mib: float, error: float = 1e-6) -> Measurement:
    return Measurement(residues, method, stage, ms, mib, error)


@pytest.fixture
def rows() -> list[Measurement]:
    return [
        row(786, "dense", "forward", 10, 100),
        row(786, "dense", "training step", 40, 300, 3e-5),
        row(786, "factored", "forward", 20, 5),
        row(786, "factored", "training step", 10, 10, 4e-5),
        *(Measurement(1572, "dense", stage, None, None, None, OOM) for stage in STAGES),
        row(1572, "factored", "forward", 80, 10),
        row(1572, "factored", "training step", 2400, 20, 1.0),
    ]


def test_conclusion_says_what_the_numbers_say(rows: list[Measurement]) -> None:
    assert conclusion(rows) == (
        "At 786 residues the factored bias is 2.0x slower in a forward pass with 20x less memory and 4.0x "
        "faster in a training step with 30x less memory; its largest error against float64 is 4e-05 "
        "(dense: 3e-05); at 1,572 "
        f"only the factored bias ran (dense {OOM})."
    )


def test_conclusion_claims_nothing_where_nothing_is_gained() -> None:
    same = [row(786, method, stage, 10, 10) for method in ("dense", "factored") for stage in STAGES]
    assert "as fast in a forward pass with no less memory" in conclusion(same)
    assert "faster" not in conclusion(same)


def test_conclusion_needs_both_methods(rows: list[Measurement]) -> None:
    assert "nothing can be compared" in conclusion([r for r in rows if r.method == "dense"])


def test_table_has_a_line_for_every_row(rows: list[Measurement]) -> None:
    lines = markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| 1,572    | training step | factored | 2.40 s  | 20 MiB" in markdown(rows)
    assert sum(OOM in line for line in lines) == 2


def test_files_are_whole_and_hold_every_row(rows: list[Measurement], tmp_path: Path) -> None:
    paths = write(rows, tmp_path / "new" / "folder", "a machine")
    assert [path.name for path in paths] == ["demo.csv", "demo.png"]
    with paths[0].open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["status"] for r in read] == [r.status for r in rows]
    assert float(read[0]["median_ms"]) == 10
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["demo.csv", "demo.png"]


def test_an_interruption_leaves_what_was_there(
    rows: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.csv").write_text("of an earlier run")

    def interrupted(path: Path, content: bytes) -> int:
        path.open("wb").write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(report.Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(rows, tmp_path, "a machine")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["demo.csv"]
    assert (tmp_path / "demo.csv").read_text() == "of an earlier run"
