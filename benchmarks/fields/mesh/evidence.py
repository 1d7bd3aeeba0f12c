"""Rows of the run, written after each part."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from benchmarks.record import Row, say, write

__all__ = ["Evidence", "failure"]

COLUMNS = (
    "part",
    "who",
    "pass",
    "body",
    "points",
    "layers",
    "seed",
    "step",
    "relative_error",
    "difference",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "peak_mib",
    "repetitions",
    "status",
)


class Evidence:
    """What is found, row by row, and its summary.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.rows: list[Row] = []
        self.summary: dict[str, object] = {}
        self._began = time.perf_counter()

    def add(self, **fields: object) -> None:
        """Add a row, with empty columns where nothing is given."""
        if unknown := set(fields) - set(COLUMNS):
            raise ValueError(f"rows have no columns {sorted(unknown)}")
        row = {name: _short(fields.get(name, "")) for name in COLUMNS} | {"status": fields.get("status", "ok")}
        self.rows.append(row)
        self.say(", ".join(f"{name} {value}" for name, value in row.items() if value != ""))

    def save(self) -> None:
        """Write everything found so far."""
        write(self.arguments, self.rows, self.summary)

    def attempt(self, part: str, run: Callable[[Evidence], None]) -> None:
        """Run a part; if it fails as a whole, a row says why, and the next part goes on."""
        try:
            run(self)
        except Exception as error:
            self.add(part=part, status=failure(error))
            self.save()

    def say(self, text: str) -> None:
        """Say it, after the seconds since the start."""
        say(f"{time.perf_counter() - self._began:6.1f} s  {text}")


def failure(error: Exception) -> str:
    """The status of a row that could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"error: {type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
