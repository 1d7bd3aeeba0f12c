"""`python -m flashbias.bench`: the benchmarks without any package beyond the library's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flashbias.bench.providers import FAMILIES, registry
from flashbias.bench.report import Row, write_tables
from flashbias.bench.rows import DTYPES, PASSES
from flashbias.bench.suites import SUITES, Suite, find_suite


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks, or make tables of what was measured; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        suite = find_suite(options.suite)
        if options.list:
            _list(suite)
        elif options.render:
            print(suite.render(options.render))
        elif options.write_tables:
            results, *files = options.write_tables
            for path in write_tables(results, files, suite.name, suite.render):
                print(f"updated {path}")
        else:
            paths = _run(suite, options)
            print(f"\n{suite.render(paths[0])}\nwrote {' '.join(map(str, paths))}")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(suite: Suite, options: argparse.Namespace) -> list[Path]:
    return suite.run(
        options.cases,
        options.passes,
        options.providers or suite.providers,
        options.dtypes,
        options.out,
        _print_row,
        options.time_limit,
        options.isolate,
        name=options.name,
        resume=options.resume,
        small=options.small,
        device=options.device,
        seed=options.seed,
        budget_s=options.budget,
        min_repetitions=options.min_repetitions,
        row_limit_s=options.row_limit,
        commit=options.commit,
        first=options.first,
        warm=options.warm,
        say=_say,
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _print_row(done: int, total: int, row: Row) -> None:
    time = f"{float(row.median_ms):10.4f} ms" if row.median_ms else f"{'–':>13}"
    error = f"error {row.max_rel_error}" if row.max_rel_error else ""
    where = f"{row.case:16s} {row.pass_name:7s} {row.dtype:9s} {row.provider:28s}"
    print(f"[{done:4d}/{total}] {where} {time}  {row.status} {error}", flush=True)


def _list(suite: Suite) -> None:
    print("cases")
    for case in suite.cases.values():
        print(f"  {case.name:15s} {case.shape}  ({', '.join(case.tags)})")
    print("providers")
    for name in registry():
        print(f"  {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flashbias.bench",
        description="Time flashbias and its peers on frozen cases. Every result is compared with float64 "
        "first; a wrong one has no number. Writes NAME.csv and NAME.json.",
    )
    add = parser.add_argument
    add(
        "suite",
        nargs="?",
        default="bench",
        metavar="SUITE",
        help=f"{' or '.join(SUITES)}; default bench, the frozen cases. paper: the shapes of the paper's Tables 3 to 7, "
        "and a page NAME.md with its figures beside ours",
    )
    add("--cases", nargs="+", metavar="CASE", help="default: all (see --list)")
    add("--passes", nargs="+", default=list(PASSES), metavar="PASS", help="fwd, fwdbwd; default both")
    add(
        "--providers",
        nargs="+",
        metavar="WHO",
        help=f"names, patterns such as '*/flex', or families: {', '.join(FAMILIES)}; default: those of the suite",
    )
    add(
        "--dtypes",
        nargs="+",
        default=["bfloat16"],
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)}; default bfloat16",
    )
    add(
        "--out",
        type=Path,
        default=Path("benchmark"),
        metavar="DIR",
        help="folder for the files; default benchmark/",
    )
    add("--name", help="name of the files; default that of the suite")
    add(
        "--time-limit",
        type=float,
        metavar="S",
        help="seconds for the whole run; what does not fit is skipped",
    )
    add("--row-limit", type=float, default=90.0, metavar="S", help="seconds for one row, compilation included")
    add("--budget", type=float, default=0.4, metavar="S", help="seconds of repetitions for one row")
    add("--min-repetitions", type=int, default=10, metavar="N", help="repetitions at least")
    add("--isolate", action="store_true", help="measure in a child process: a crash costs one row")
    add("--warm", type=int, default=0, metavar="N", help="compile with N processes at once before anything is timed")
    add("--first", nargs="+", default=[], metavar="WHO", help="providers to measure on all cases before the others")
    add("--resume", action="store_true", help="keep what an earlier run in --out has finished")
    add("--small", action="store_true", help="small versions of the cases, for a CPU")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--commit", help="commit to write down where git cannot be asked")
    other = parser.add_argument_group("instead of running")
    other.add_argument("--list", action="store_true", help="list cases and providers")
    other.add_argument("--render", type=Path, metavar="CSV", help="print the tables of a run")
    other.add_argument(
        "--write-tables",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="results folder, then Markdown files to update from the suite's runs",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
