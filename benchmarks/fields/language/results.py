"""The rows of this field, written after each part; what fails is a row, and the others go on."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.record import Row, say, write

__all__ = ["COLUMNS", "Results"]

COLUMNS = (
    "part",
    "case",
    "pass",
    "provider",
    "attention",
    "seqlen",
    "step",
    "loss",
    "ms",
    "p10_ms",
    "p90_ms",
    "peak_mib",
    "error",
    "agreement",
    "status",
)


class Results:
    """Rows and summary of a run.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.rows: list[Row] = []
        self.summary: dict[str, object] = {}
        self.began = time.perf_counter()

    def say(self, text: str) -> None:
        """Tell the user how far things are, and after how many seconds."""
        say(f"[{time.perf_counter() - self.began:6.1f} s] {text}")

    def add(self, part: str, *, quiet: bool = False, **values: Any) -> None:
        """Add a row; columns that are not given stay empty."""
        row: Row = {**dict.fromkeys(COLUMNS, ""), "part": part, "status": "ok", **values}
        unknown = set(row) - set(COLUMNS)
        assert not unknown, f"no columns: {unknown}"
        self.rows.append(row)
        if not quiet:
            self.say(" ".join(f"{name}={value}" for name, value in row.items() if value != ""))

    def write(self) -> None:
        """Write everything so far."""
        if self.rows:
            write(self.arguments, self.rows, self.summary)

    def guarded(self, part: str, work: Callable[[Results], None], **values: Any) -> None:
        """Do a part of the work and write its rows; an exception becomes a row.

        Args:
            part: of which the row is.
            work: is given these results.
            values: columns of that row.
        """
        try:
            work(self)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.add(part, **values, status=f"error: {type(error).__name__}: {lines[0][:200]}")
        self.write()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
