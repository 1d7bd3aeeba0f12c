r"""Times for the planner's coefficients, measured after everything has been compiled by many processes at once.

    python3 benchmarks/calibration.py --out benchmarks/results/h200/planner --name calibration-hopper \
        --providers 'ours*/hopper' 'table*/hopper'

Kernels are compiled for each width, rank and form of the bias, which takes longer than to time them. So each case runs
once in a process of its own, whose times are dropped, and then all run one after the other, from compiled kernels.
`flashbias bench --calibrate --from …` fits coefficients to the rows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.record import say

from flashbias.bench import Row, run
from flashbias.bench.calibrate import calibration_providers
from flashbias.bench.cases import Case, find_cases
from flashbias.bench.probes import CALIBRATION


def main() -> None:
    """Compile, then measure."""
    options = parser().parse_args()
    known = {case.name: case for case in CALIBRATION[options.device]}
    cases = find_cases(options.cases or known, small=options.small, known=known)
    began = time.perf_counter()
    if options.processes > 1:
        compile_all(cases, options)
        say(f"{len(cases)} cases have run once after {time.perf_counter() - began:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
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
    )
    say(f"written: {path} after {time.perf_counter() - began:.0f} s")


def compile_all(cases: list[Case], options: argparse.Namespace) -> None:
    """Run every case once, many at a time; one that fails is compiled when it is measured."""
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        runs = {case: pool.submit(measured, case, options.providers, options.device) for case in cases}
        for case, done in runs.items():
            if (error := done.exception()) is not None:
                say(f"{case.name} did not run beside the others: {error}")


def measured(case: Case, providers: list[str], device: str) -> None:
    """Run a case once, for what it leaves in the caches of the compilers."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    chosen = calibration_providers(device, providers)
    with tempfile.TemporaryDirectory() as folder:
        run([case], providers=chosen, dtypes=(dtype,), out_dir=folder, device=device, budget_s=1e-4, min_repetitions=1)


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
    add("--processes", type=int, default=16, help="that compile at once; 1: none")
    add("--budget", type=float, default=0.1, help="seconds of repetitions for one row")
    add("--time-limit", type=float, help="seconds for the rows; what does not fit is skipped")
    add("--small", action="store_true", help="small versions of the cases")
    add("--commit", help="of the source, where it is no repository")
    return found


if __name__ == "__main__":
    main()
