"""Evidence for `flashbias.decompose`: what it costs to find factors, and that what it promises is true.

    python -m benchmarks.decomposition cross         kernels on the 132,871 vertices of a motorbike
    python -m benchmarks.decomposition swin          the biases of a SwinV2-B
    python -m benchmarks.decomposition certificates  certificates of 1,000 attentions and their true errors

Each writes `<name>.csv`, a line per kernel, layer or problem, and `<name>.json`, the summary with the machine's
description, into benchmarks/results/cpu. The committed files come from two cores.

The motorbike is in the Debian package `openfoam-examples`, which is fetched once with apt into the cache folder
(`$FLASHBIAS_CACHE`, by default `~/.cache/flashbias`) and not installed. Where there is no apt, `--obj` names the file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.decomposition.certificates import certificates
from benchmarks.decomposition.cross import KERNELS, cross
from benchmarks.decomposition.swin import swin
from benchmarks.record import CPU_RESULTS, ROOT

PICTURE = ROOT / "docs" / "images" / "certificates.png"


def main() -> None:
    """Read the command line and run one subcommand."""
    arguments = parser().parse_args()
    arguments.load = os.getloadavg()[0]
    arguments.started = datetime.now(UTC).isoformat(timespec="seconds")
    arguments.run(arguments)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = whole.add_subparsers(dest="subcommand", required=True)

    def add(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        part = subcommands.add_parser(run.__name__, help=(run.__doc__ or "").splitlines()[0])
        part.set_defaults(run=run)
        part.add_argument("--out", type=Path, default=CPU_RESULTS, help="folder of the results")
        part.add_argument("--threads", type=int, default=2, help="of torch")
        return part

    part = add(cross)
    part.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    part.add_argument("--obj", type=Path, help="a gzipped Wavefront file; default: the motorbike")
    part.add_argument("--points", type=int, help="the first so many vertices; default: all")
    part.add_argument("--tol", type=float, default=0.01, help="part of the kernel's range")
    part.add_argument("--entries", type=int, default=1_000_000, help="compared at random afterwards")
    part = add(swin)
    part.add_argument("--layers", type=int, default=24)
    part.add_argument("--window", type=int, default=24, help="side of the window")
    part.add_argument("--tol", type=float, default=1e-3, help="of the output")
    part.add_argument("--seed", type=int, default=0)
    part = add(certificates)
    part.add_argument("--problems", type=int, default=1000)
    part.add_argument("--seed", type=int, default=0, help="of the first problem")
    part.add_argument("--picture", type=Path, default=PICTURE)
    return whole


if __name__ == "__main__":
    main()
