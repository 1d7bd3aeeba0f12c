r"""Times for the planner's coefficients, measured after everything has been compiled by many processes at once.

    python3 benchmarks/calibration.py --out benchmarks/results/h200/planner --name calibration-hopper \
        --providers 'ours*/hopper' 'table*/hopper'

Kernels are compiled for each width, rank and form of the bias, which takes longer than to time them. So all rows run
once, many at a time, and then one after the other, from compiled kernels.
`flashbias bench --calibrate --from …` fits coefficients to the rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.record import say

from flashbias.bench import Row, run
from flashbias.bench.calibrate import calibration_providers
from flashbias.bench.cases import find_cases
from flashbias.bench.probes import CALIBRATION


def main() -> None:
    """Compile, then measure."""
    options = parser().parse_args()
    known = {case.name: case for case in CALIBRATION[options.device]}
    cases = find_cases(options.cases or known, small=options.small, known=known)
    began = time.perf_counter()
    path = run(
        cases,
        providers=calibration_providers(options.device, options.providers),
        out_dir=options.out,
        name=options.name,
        device=options.device,
        dtypes=("bfloat16" if options.device == "cuda" else "float32",),
        time_limit_s=options.time_limit,
        budget_s=options.budget,
        min_repetitions=5,
        commit=options.commit,
        progress=show,
        warm=options.processes,
        say=say,
    )
    say(f"written: {path} after {time.perf_counter() - began:.0f} s")


def show(done: int, total: int, row: Row) -> None:
    """A line for each row."""
    say(f"[{done}/{total}] {row.case} {row.pass_name} {row.provider}: {row.median_ms or row.status}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--name", default="calibration", help="of the CSV and the JSON")
    add("--providers", nargs="+", help="default: all that a plan can use")
    add("--cases", nargs="+", help="default: all of the device")
    add("--device", choices=tuple(CALIBRATION), default="cuda")
    add("--processes", type=int, default=16, help="that compile at once; 0: none")
    add("--budget", type=float, default=0.1, help="seconds of repetitions for one row")
    add("--time-limit", type=float, help="seconds for all of it; what does not fit is skipped")
    add("--small", action="store_true", help="small versions of the cases")
    add("--commit", help="of the source, where it is no repository")
    return found


if __name__ == "__main__":
    main()
