"""`flashbias bench`: time this library and its peers on cases taken from real models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashbias.cli.progress import progress_bar

__all__ = ["bench"]


def bench(
    suite: Annotated[
        str, typer.Argument(help="bench: the frozen cases. paper: the shapes of the paper's Tables 3 to 7.")
    ] = "bench",
    cases: Annotated[list[str] | None, typer.Option("--case", help="A case; repeat for more. Default: all.")] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", help="fwd or fwdbwd. Default: both.")] = None,
    providers: Annotated[
        list[str] | None,
        typer.Option("--provider", help="A name, a family such as ours, or a pattern such as '*/flex'."),
    ] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="Default: bfloat16.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the files, default results/SUITE; with --calibrate a file may be named."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the files. Default: the suite's.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Small versions of the cases, for a CPU.")] = False,
    isolate: Annotated[bool, typer.Option("--isolate", help="Measure in a child: a crash costs one row.")] = False,
    warm: Annotated[int, typer.Option(help="Processes that compile at once before anything is timed.")] = 0,
    first: Annotated[
        list[str] | None, typer.Option(help="A provider to measure on all cases before the others.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an interrupted run.")] = False,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for the whole run.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List cases and providers, and leave.")] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="Print the tables of an earlier run's CSV, and leave.", exists=True, dir_okay=False),
    ] = None,
    calibration: Annotated[
        bool, typer.Option("--calibrate", help="Fit the planner's coefficients for this device, and leave.")
    ] = False,
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="With --calibrate: an earlier run's CSV. Alone, nothing is measured.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Time this library and its peers; a wrong result has no number.

    Every provider's output, and its gradients in fwdbwd, are compared with float64 before it is timed. Out of
    memory and "unsupported" are results. An interrupted run leaves its rows in a file that ends in `.part`;
    `--resume` goes on from there.

    `flashbias bench paper` runs the shapes of the paper's Tables 3 to 7 and writes, beside the CSV, a page with
    the paper's figures next to ours and what differs.

    **Examples**

        flashbias bench --list

        flashbias bench --small --case swin-49 --dtype float32 --provider ours

        flashbias bench --case full-128 --case swin-576 --pass fwd --out results/h200 --isolate

        flashbias bench --table results/bench/bench.csv

        flashbias bench paper --out results/paper --isolate

        flashbias bench --calibrate --out coefficients.json

        flashbias bench --calibrate --from results/h200/bench.csv --out h200.json
    """
    from flashbias.bench import Row, provider_names
    from flashbias.bench.rows import PASSES
    from flashbias.bench.runner import check_device
    from flashbias.bench.suites import find_suite

    console = Console(soft_wrap=True, highlight=False, markup=False)
    chosen = find_suite(suite)
    if show:
        shapes = [f"  {case.name:15} {case.shape}" for case in chosen.cases.values()]
        console.print("\n".join(["cases", *shapes, "providers", *(f"  {p}" for p in provider_names())]))
        return
    if table is not None:
        console.print(chosen.render(table))
        return
    if device is not None:
        check_device(device)
    if rows and not calibration:
        raise ValueError("--from goes with --calibrate")
    if calibration and (warm or first):
        raise ValueError("--warm and --first do not go with --calibrate")
    if calibration and suite != "bench":
        raise ValueError(f"--calibrate has cases of its own and does not go with {suite!r}")
    out = out or Path("results") / suite
    if not calibration and out.is_file():
        raise ValueError(f"--out must be a folder, got the file {str(out)!r}")
    with progress_bar() as progress:

        def report(done: int, total: int, row: Row) -> None:
            time = f"{row.median_ms} ms" if row.median_ms else row.status
            progress(done, total, f"{row.case} {row.pass_name} {row.provider}: {time}")

        if calibration:
            from flashbias.bench.calibrate import calibrate

            found = calibrate(
                out if out.suffix == ".json" else out / "coefficients.json",
                rows=rows or (),
                device=device,
                cases=cases,
                providers=providers,
                dtypes=dtypes,
                passes=passes or PASSES,
                small=small,
                resume=resume,
                isolate=isolate,
                time_limit_s=time_limit,
                progress=report,
            )
            console.print(f"{found}\nwrote {found.path}, for flashbias.plan(workload, device={str(found.path)!r})")
            return
        paths = chosen.run(
            cases,
            passes or PASSES,
            providers or chosen.providers,
            dtypes or ["bfloat16"],
            out,
            name=name,
            device=device,
            small=small,
            isolate=isolate,
            resume=resume,
            time_limit_s=time_limit,
            progress=report,
            first=first or (),
            warm=warm,
            say=console.print,
        )
    console.print(f"{chosen.render(paths[0])}\nwrote {' '.join(map(str, paths))}")
