"""`flashbias demo`: the first experiment, on a real protein."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashbias.cli.progress import progress_bar
from flashbias.files import check_target

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.csv and demo.png.", file_okay=False)] = Path(
        "results/demo"
    ),
    copies: Annotated[int, typer.Option(help="Largest number of copies of the protein; sizes double.")] = 32,
    heads: Annotated[int, typer.Option(help="Attention heads, each with a learned weight.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Begin nothing that is expected to end later.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the random queries, keys and values.")] = 0,
) -> None:
    """Compare a dense and a factored bias on a real protein.

    The 786 residues of PDB entry 2XHE, and their neighbours in its crystal, attend to each other with a
    penalty on squared distance whose weight is learned. Each size runs twice: with the bias as a matrix,
    given to torch as a mask, and as factors. Time, peak memory and error against float64 are printed, and
    written to a folder with a plot. A size that does not fit into memory is a result, not a failure.

    **Examples**

        flashbias demo

        flashbias demo --copies 8 --out results/small

        flashbias demo --device cuda --dtype bfloat16 --copies 256 --seconds 300
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the plot needs matplotlib: pip install 'flashbias[demo]'")
    from flashbias.demo import Settings, conclusion, markdown, run, write

    check_target(out / "demo.csv")
    settings = Settings(copies, heads, head_dim, device, dtype, seconds, seed)
    with progress_bar() as progress:
        rows = run(settings, progress)
    paths = write(rows, out, settings.describe())
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{settings.describe()}\n\n{markdown(rows)}\n\n{conclusion(rows)}\n")
    for path in paths:
        console.print(f"wrote {path}")
