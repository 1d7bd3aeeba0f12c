"""What several runs of a field have measured stands in one file, each part from one run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from benchmarks.fields.record import joined, merge
from benchmarks.record import read, store, write


def rows(part: str, *times: float) -> list[dict[str, object]]:
    return [{"part": part, "ms": ms, "status": "ok"} for ms in times]


def test_a_later_run_replaces_its_parts_alone():
    about = {"commit": "a", "summary": {"x": 1, "y": 1}}
    found, summary = joined(rows("speed", 1.0) + rows("train", 2.0), about, rows("speed", 3.0, 4.0), {"y": 2})
    assert [(row["part"], row["ms"]) for row in found] == [("train", 2.0), ("speed", 3.0), ("speed", 4.0)]
    assert summary == {"x": 1, "y": 2, "kept": {"train": "a"}}


def test_the_first_commit_of_a_part_is_kept():
    about = {"commit": "b", "summary": {"kept": {"train": "a"}}}
    _, summary = joined(rows("train", 1.0) + rows("speed", 1.0), about, rows("layer", 1.0), {})
    assert summary == {"kept": {"train": "a", "speed": "b"}}
    _, summary = joined(rows("train", 1.0), about, rows("train", 1.0), {})
    assert summary == {}


def test_what_the_later_run_had_kept_itself_stays():
    later = {"kept": {"train": "a"}}
    _, summary = joined(rows("train", 1.0), {"commit": "z"}, rows("train", 1.0) + rows("speed", 1.0), later)
    assert summary == {"kept": {"train": "a"}}


def test_a_later_run_of_some_cases_leaves_the_others():
    def timed(case: str, ms: float) -> dict[str, object]:
        return {"part": "attention", "case": case, "ms": ms}

    first = [timed("narrow", 1.0), timed("wide", 2.0), {"part": "train", "case": "", "ms": 3.0}]
    about = {"commit": "b", "summary": {"kept": {"attention": "a"}}}
    found, summary = joined(first, about, [timed("narrow", 4.0)], {})
    assert [(row["case"], row["ms"]) for row in found] == [("wide", 2.0), ("", 3.0), ("narrow", 4.0)]
    assert summary == {"kept": {"attention wide": "a", "train": "b"}}
    _, summary = joined(found, {"commit": "c", "summary": summary}, [{"part": "train", "case": "", "ms": 5.0}], {})
    assert summary == {"kept": {"attention wide": "a", "attention": "c"}}


def test_columns_of_both_stay():
    found, _ = joined([{"part": "a", "old": 1}], {}, [{"part": "b", "new": 2}], {})
    assert found == [{"part": "a", "new": "", "old": 1}, {"part": "b", "new": 2, "old": ""}]


def test_merging_two_folders(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, part, commit in ((first, "train", "a"), (second, "speed", "b")):
        folder.mkdir()
        store(folder, "mesh", rows(part, 1.0), {"commit": commit, "summary": {part: 1}})
    merge(first, second, "mesh")
    found, about = read(first, "mesh")
    assert [row["part"] for row in found] == ["train", "speed"]
    assert about == {"commit": "b", "summary": {"train": 1, "speed": 1, "kept": {"train": "a"}}}
    with pytest.raises(FileNotFoundError, match="weather"):
        merge(first, second, "weather")


def test_no_path_of_this_machine_is_a_setting(tmp_path: Path):
    arguments = Namespace(
        subcommand="mesh", out=tmp_path, threads=1, load=0.0, started="now", page=tmp_path / "page.md",
        weights=Path("vision.pt"), steps=3,
    )  # fmt: skip
    write(arguments, rows("speed", 1.0), {})
    assert read(tmp_path, "mesh")[1]["settings"] == {
        "subcommand": "mesh", "threads": "1", "weights": "vision.pt", "steps": "3"
    }  # fmt: skip
