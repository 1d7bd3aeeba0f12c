"""What a run leaves behind: a CSV, and a JSON with its summary and the machine."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flashbias.bench.environment import describe_environment
from flashbias.files import whole_file

__all__ = ["CPU_RESULTS", "ROOT", "Row", "read", "say", "store", "write"]

ROOT = Path(__file__).resolve().parents[1]
CPU_RESULTS = ROOT / "benchmarks" / "results" / "cpu"

NO_SETTING = ("run", "load", "started", "out", "picture", "obj", "commit")
"""Arguments that say nothing of what was measured, but where files of this machine are."""

Row = dict[str, object]


def say(text: str) -> None:
    """Tell the user how far things are."""
    print(text, file=sys.stderr, flush=True)


def read(folder: Path, name: str) -> tuple[list[Row], dict[str, Any]]:
    """What a run has left behind: rows, and what its JSON says; nothing where there was none."""
    table, about = (folder / f"{name}.{kind}" for kind in ("csv", "json"))
    if not (table.exists() and about.exists()):
        return [], {}
    with table.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)], json.loads(about.read_text())


def write(arguments: argparse.Namespace, rows: Sequence[Row], summary: Mapping[str, object]) -> None:
    """`<subcommand>.csv` and `<subcommand>.json`, each written whole.

    Args:
        arguments: of the command line: `subcommand`, `out`, `threads`, and what is said of the run: `load`, `started`;
            where there are, `device` (default: the CPU) and `commit`.
        rows: of the CSV; all have the keys of the first.
        summary: what the run found, in a few numbers.
    """
    settings = {name: str(value) for name, value in vars(arguments).items() if _is_setting(name, value)}
    device = torch.device(getattr(arguments, "device", "cpu"))
    about = {
        **describe_environment(device, getattr(arguments, "commit", None)),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "load_average_at_start": round(arguments.load, 2),
        "started": arguments.started,
        "settings": settings,
        "summary": dict(summary),
    }
    store(arguments.out, arguments.subcommand, rows, about)
    say(json.dumps(dict(summary)))
    say(f"written: {arguments.out.name}/{arguments.subcommand}.csv and .json")


def _is_setting(name: str, value: object) -> bool:
    """Whether an argument says what was measured; a whole path says where files of this machine are."""
    return name not in NO_SETTING and not (isinstance(value, Path) and value.is_absolute())


def store(folder: Path, name: str, rows: Sequence[Row], about: Mapping[str, object]) -> None:
    """Write `<name>.csv` and `<name>.json`."""
    with whole_file(folder / f"{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(folder / f"{name}.json") as part:
        part.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
