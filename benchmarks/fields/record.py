"""The rows of a field, written after each part; what fails is a row, and the others go on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from benchmarks.record import Row, read, say, store, write

from flashbias.bench.measure import let_go, measure

__all__ = ["Record", "failure", "joined", "merge"]


class Record:
    """Rows and summary of a run; a field's own record names its columns.

    Rows that an earlier run left in the same place stay, unless this run has some of their part and case; the summary
    names their commit.

    Args:
        arguments: of the command line.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rows: list[Row] = []
        self.summary: dict[str, object] = {}
        self.began = time.perf_counter()
        self.earlier, self._about_earlier = read(arguments.out, arguments.subcommand)

    def say(self, text: str) -> None:
        """Tell the user how far things are, and after how many seconds."""
        say(f"[{time.perf_counter() - self.began:6.1f} s] {text}")

    def write(self) -> None:
        """Write everything so far."""
        if not self.rows:
            return
        rows, summary = joined(self.earlier, self._about_earlier, self.rows, self.summary)
        write(self.arguments, rows, summary)

    def add(self, part: str, *, quiet: bool = False, **values: object) -> None:
        """Add a row; columns that are not given stay empty, and the status is "ok" unless another is given."""
        self._append(self._empty(part) | values, quiet)

    @contextmanager
    def row(self, part: str, **about: object) -> Iterator[Row]:
        """Give a row to be filled in; an exception inside becomes its status.

        Args:
            part: what it belongs to.
            about: columns that are known beforehand.

        Yields:
            The row, whose status is "ok" unless the block sets another.
        """
        row = self._empty(part) | about
        try:
            yield row
        except Exception as error:
            row["status"] = failure(error)
        finally:
            self._append(row, quiet=False)
            self._free()

    def attempt(self, part: str, work: Callable[[Self], None], **values: Any) -> None:
        """Do a part of the work and write its rows; an exception becomes a row.

        Args:
            part: of which the row is.
            work: is given this record.
            values: columns of that row.
        """
        try:
            work(self)
        except Exception as error:
            self.add(part, **{**values, "status": failure(error)})
        self.write()
        let_go()
        self._free()

    def time(self, row: Row, call: Callable[[], object], seconds: float) -> None:
        """Fill in time and memory of a call that has run before.

        Args:
            row: to fill in.
            call: what to time.
            seconds: about how long to repeat it.
        """
        small = self.device.type == "cpu"
        found = measure(call, self.device, budget_s=0.02 if small else seconds, min_repetitions=2 if small else 5)
        row["ms"] = round(found.median_ms, 4)
        row["p10_ms"], row["p90_ms"] = round(found.p10_ms, 4), round(found.p90_ms, 4)
        row["peak_mib"] = "" if found.peak_mib is None else round(found.peak_mib, 1)

    def _empty(self, part: str) -> Row:
        return {**dict.fromkeys(self.columns, ""), "part": part, "status": "ok"}

    def _append(self, row: Row, quiet: bool) -> None:
        unknown = set(row) - set(self.columns)
        assert not unknown, f"no columns: {unknown}"
        self.rows.append(row)
        if not quiet:
            self.say(" ".join(f"{name}={value}" for name, value in row.items() if value != ""))

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def joined(
    earlier: Sequence[Row], about: Mapping[str, Any], rows: Sequence[Row], summary: Mapping[str, Any]
) -> tuple[list[Row], dict[str, object]]:
    """Rows of an earlier run and of a later one, which replaces every part that it has.

    Where a field has a column "case", a later run of some cases leaves the others of the same part.

    Args:
        earlier: rows of the earlier run.
        about: what its JSON says.
        rows: of the later run.
        summary: of the later run.

    Returns:
        The rows, all with the columns of both, and the summary; its "kept" has the commit of each part of earlier runs,
        and of each of its cases where both have some.
    """
    parts, groups = {row["part"] for row in rows}, {_group(row) for row in rows}
    kept = [row for row in earlier if _group(row) not in groups]
    empty: Row = dict.fromkeys([*rows[0], *(kept[0] if kept else ())], "")
    before = about.get("summary", {})
    commits = before.get("kept", {})
    found = {}
    for row in kept:
        part, whole = row["part"], " ".join(_group(row)).strip()
        commit = commits.get(whole, commits.get(part, about.get("commit")))
        found[whole if part in parts or whole in commits else part] = commit
    joint: dict[str, object] = {**before, **summary}
    found |= summary.get("kept", {})
    joint.pop("kept", None)
    return [empty | row for row in (*kept, *rows)], joint | ({"kept": found} if found else {})


def _group(row: Row) -> tuple[str, str]:
    """What is replaced as a whole: a part, or a case of it."""
    return str(row["part"]), str(row.get("case", ""))


def merge(out: Path, later: Path, field: str) -> None:
    """Take all that a later run has left in another folder into `out`, as `joined` does.

    Raises:
        FileNotFoundError: the other folder has no results of the field.
    """
    rows, about = read(later, field)
    if not rows:
        raise FileNotFoundError(f"{later} has no {field}.csv with rows and {field}.json")
    whole, summary = joined(*read(out, field), rows, about["summary"])
    store(out, field, whole, {**about, "summary": summary})


def failure(error: Exception) -> str:
    """The status of a row that could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first, *_ = str(error).strip().splitlines() or [""]
    return f"error: {type(error).__name__}: {first}"[:200]
