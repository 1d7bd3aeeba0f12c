"""One sequence over several GPUs: time, memory and bytes against one GPU with all of it.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.distributed --out DIR     measure; any number of ranks
    python -m benchmarks.distributed --write DIR                                     docs/distributed.md and its picture

A run writes `distributed.csv` and `distributed.json` into `--out` after every row. Outputs and gradients are compared
with one GPU's before a time counts. A problem whose rows all stand there already is not run again; one that takes
longer than `--seconds` leave is left out, and the JSON says so. `--small` runs the same code at sizes for a CPU.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from benchmarks.distributed.page import PAGE, PICTURE, write_page
from benchmarks.distributed.problem import points
from benchmarks.distributed.run import NAME, Run

PATIENCE = timedelta(minutes=10)
"""Of the process group: ranks wait while rank 0 computes alone."""


def main() -> None:
    """Read the command line; measure, or write the page."""
    arguments = parser().parse_args()
    if arguments.write is not None:
        write_page(arguments.write, arguments.page, arguments.picture)
        return
    if arguments.out is None:
        raise SystemExit("--out DIR: where results go (or --write DIR: where they are)")
    arguments.subcommand, arguments.threads = NAME, torch.get_num_threads()
    arguments.load, arguments.started = os.getloadavg()[0], datetime.now(UTC).isoformat(timespec="seconds")
    device = _join()
    arguments.device = str(device)
    try:
        run = Run(arguments, device)
        run.say(f"{run.size} ranks on {device.type}")
        run.link()
        for case in points(arguments.small):
            if not arguments.cases or case.bias in arguments.cases:
                run.point(case)
        run.say("done")
    finally:
        dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="benchmarks.distributed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--out", type=Path, help="folder of the results")
    whole.add_argument("--cases", nargs="*", default=[], choices=["alibi", "distance"], help="default: all")
    whole.add_argument("--small", action="store_true", help="at sizes for a CPU")
    whole.add_argument("--seconds", type=float, default=200.0, help="leave out what would not end within these")
    whole.add_argument("--repeat", type=float, default=0.3, help="seconds of repeating each pass")
    whole.add_argument("--commit", help="of the source, where it is no repository")
    whole.add_argument("--write", type=Path, help="folder of a run: write the page and the picture, measure nothing")
    whole.add_argument("--page", type=Path, default=PAGE)
    whole.add_argument("--picture", type=Path, default=PICTURE)
    return whole


def _join() -> torch.device:
    """Become a rank of the default group; messages overtake what is computed, where streams have priorities."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=PATIENCE)
        return torch.device("cpu")
    torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    dist.init_process_group("nccl", timeout=PATIENCE, pg_options=options, device_id=device)
    return device


if __name__ == "__main__":
    main()
