"""The rows of this field, written after each part; what fails is a row, and the others go on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from benchmarks.record import Row, say, write

from flashbias.bench.measure import measure

__all__ = ["COLUMNS", "Record"]

COLUMNS = (
    "part",
    "provider",
    "weights",
    "epoch",
    "tol",
    "rank",
    "smallest_rank",
    "certificate",
    "energy",
    "rmse",
    "rmse_u",
    "rmse_v",
    "spread_over_months",
    "loss",
    "difference",
    "ms",
    "p10_ms",
    "p90_ms",
    "peak_mib",
    "seconds",
    "status",
    "note",
)
"""`rmse` and `spread_over_months` are in m/s; what `difference` is compared with, a row's part says."""


class Record:
    """Rows and summary of a run.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rows: list[Row] = []
        self.summary: dict[str, object] = {}
        self.began = time.perf_counter()

    def say(self, text: str) -> None:
        """Tell the user how far things are, and after how many seconds."""
        say(f"[{time.perf_counter() - self.began:6.1f} s] {text}")

    def write(self) -> None:
        """Write everything so far."""
        if self.rows:
            write(self.arguments, self.rows, self.summary)

    @contextmanager
    def row(self, part: str, **about: object) -> Iterator[Row]:
        """Give a row to be filled in; an exception inside becomes its status.

        Args:
            part: what it belongs to.
            about: columns that are known beforehand.

        Yields:
            The row, whose status is "ok" unless the block sets another.
        """
        row: Row = {**dict.fromkeys(COLUMNS, ""), "part": part, "status": "ok", **about}
        try:
            yield row
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row["status"] = f"error: {type(error).__name__}: {lines[0][:200]}"
        finally:
            unknown = set(row) - set(COLUMNS)
            assert not unknown, f"no columns: {unknown}"
            self.rows.append(row)
            self.say(" ".join(f"{name}={value}" for name, value in row.items() if value != ""))

    def time(self, row: Row, call: Callable[[], object], seconds: float = 0.2) -> None:
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
