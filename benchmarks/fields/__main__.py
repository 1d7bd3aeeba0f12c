"""Evidence from whole models: a small one trained for each field, and the time and memory of full-size ones.

    python -m benchmarks.fields language    a GPT with ALiBi: trained dense and factored; time at long lengths
    python -m benchmarks.fields vision      a Swin on Fashion-MNIST, its tables compressed; SwinV2-B at full size
    python -m benchmarks.fields mesh        a transformer on real meshes; car-sized meshes at full size
    python -m benchmarks.fields protein     a contact predictor on real chains, distilled; a Pairformer block
    python -m benchmarks.fields weather     winds of the next month, with an earth-specific bias

Each writes `<field>.csv` and `<field>.json` into `--out`, and its picture where `--picture` says. `--small` runs the
same code at sizes for a CPU; `--merge FOLDER` joins what two runs have measured. Data are fetched once from Debian
packages into `$FLASHBIAS_CACHE`, by default `~/.cache/flashbias`; `--fetch` does only that, and a machine without a
network takes a copy of the folder.
"""

from __future__ import annotations

import argparse
import importlib
import os
from datetime import UTC, datetime
from pathlib import Path

import torch
from benchmarks.fields.record import merge
from benchmarks.record import ROOT

FIELDS = ("language", "vision", "mesh", "protein", "weather")


def main() -> None:
    """Read the command line and run one field."""
    arguments = parser().parse_args()
    arguments.load = os.getloadavg()[0]
    arguments.started = datetime.now(UTC).isoformat(timespec="seconds")
    torch.set_num_threads(arguments.threads)
    if arguments.merge is not None:
        merge(arguments.out, arguments.merge, arguments.subcommand)
        return
    arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    """The command line: options of all fields, then those of each."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = whole.add_subparsers(dest="subcommand", required=True)
    for name in FIELDS:
        field = importlib.import_module(f"benchmarks.fields.{name}")
        part = subcommands.add_parser(name, help=(field.__doc__ or "").splitlines()[0])
        part.set_defaults(run=field.run)
        part.add_argument("--out", type=Path, required=True, help="folder of the results")
        part.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / f"{name}.png")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--small", action="store_true", help="at sizes for a CPU")
        part.add_argument("--fetch", action="store_true", help="only fetch the data")
        part.add_argument("--merge", type=Path, help="only take the parts that this folder has results of into --out")
        part.add_argument("--commit", help="of the source, where it is no repository")
        field.add_arguments(part)
    return whole


if __name__ == "__main__":
    main()
