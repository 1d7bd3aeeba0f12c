"""`flashbias analyze`: what form a bias should have, as a table and as a page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import flashbias
from flashbias.cli import source
from flashbias.cli.progress import progress_bar
from flashbias.decompose import NotLowRankError, compress
from flashbias.decompose.figures import Analysis, analyse
from flashbias.decompose.page import pixels_for, render
from flashbias.decompose.read import Layer
from flashbias.decompose.verdict import advice_for_all, bound, energy, reasons, times_dense
from flashbias.files import whole_file

__all__ = ["analyze"]

USUAL = {"head-dim": 64, "batch": 1, "training": "none", "dtype": "bfloat16", "device": "h200"}
"""Values of options that a command need not name."""


def analyze(
    file: source.FileArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page. Default: the file's name with .html, here.")
    ] = None,
    key: source.KeyOption = None,
    window: source.WindowOption = None,
    seqlen: source.SeqlenOption = None,
    layer: source.LayerOption = None,
    tol: source.TolOption = 1e-3,
    mask: source.MaskOption = None,
    head_dim: source.HeadDimOption = 64,
    batch: source.BatchOption = 1,
    training: source.TrainingOption = "none",
    dtype: source.DtypeOption = "bfloat16",
    device: source.DeviceOption = "h200",
) -> None:
    """Say what form a bias should have, and why.

    Each head gets a line: its form, rank, certificate (the most that an output can move), and predicted time against
    a dense bias. A page shows the bias, its spectrum, the certificate at each rank and the error of the chosen form;
    it is one file that needs nothing else. A bias that should stay dense is a result, with its reasons.

    A file holds `[N, M]`, `[H, N, M]` or `[L, H, N, M]`, or a relative table with `--window` or `--seqlen`.

    **Examples**

        flashbias analyze bias.npy

        flashbias analyze model.safetensors --key blocks.0.attn.bias --tol 0.01 --mask causal

        flashbias analyze swin.pt --key 'layers.*.relative_position_bias_table' --window 24x24 --batch 64 --head-dim 32
    """
    attention = source.Attention(tol, mask, head_dim, batch, training, dtype, device)
    out = Path(f"{file.stem}.html") if out is None else out
    source.check_out(out, file)
    layers = source.layers_of(file, key, window, seqlen, layer)
    pixels = pixels_for(sum(each.shape[0] for each in layers))
    with progress_bar() as progress:
        analyses = [_analysis(each, attention, pixels, source.forward_progress(progress, each)) for each in layers]
    title = file.name + (f" · {key}" if key else "")
    command = _command(file, key, window, seqlen, layer, attention, analyses)
    html = render(title, [_shape(layers), *attention.facts()], analyses, command, f"flashbias {flashbias.__version__}")
    with whole_file(out) as part:
        part.write_text(html, encoding="utf-8")
    _print(analyses)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"wrote {out}")


def _analysis(layer: Layer, attention: source.Attention, pixels: int, progress: source.Progress) -> Analysis:
    bias, mask, workload = layer.dense(), attention.mask_of(layer), attention.workload(layer)
    try:
        with source.about(layer):
            found = compress(
                bias, attention.tol, mask=mask, workload=workload, device=attention.device, progress=progress
            )
    except NotLowRankError as refusal:
        found = refusal
    return analyse(layer.name, bias, found, mask=mask, pixels=pixels, progress=progress)


def _shape(layers: tuple[Layer, ...]) -> str:
    shapes = {layer.shape for layer in layers}
    heads = sum(layer.shape[0] for layer in layers)
    if len(shapes) == 1:
        count, seqlen_q, seqlen_k = shapes.pop()
        before = f"{len(layers)} layers × " if len(layers) > 1 else ""
        return f"{before}{count} {'heads' if count > 1 else 'head'} × {seqlen_q} × {seqlen_k}"
    return f"{len(layers)} layers, {heads} heads"


def _command(
    file: Path,
    key: str | None,
    window: str | None,
    seqlen: int | None,
    layer: int | None,
    attention: source.Attention,
    analyses: list[Analysis],
) -> list[str]:
    """What factors the same bias for the same attention; nothing if no head would pay."""
    if not any(h.report.form != "dense" and h.report.cost_ms < h.report.dense_ms for a in analyses for h in a.heads):
        return []
    given = {"key": key, "window": window, "seqlen": seqlen, "layer": layer, "mask": attention.mask}
    given |= {"head-dim": attention.head_dim, "batch": attention.batch, "training": attention.training}
    given |= {"dtype": attention.dtype, "device": attention.device}
    words = ["flashbias", "factor", str(file), "--tol", f"{attention.tol:g}"]
    for name, value in given.items():
        if value is not None and value != USUAL.get(name):
            words += [f"--{name}", str(value)]
    if any(a.refusal for a in analyses):
        words.append("--allow-dense")
    return [shlex.join([*words, "-o", "factors-{layer}.safetensors" if len(analyses) > 1 else "factors.safetensors"])]


# -------------------------------------------------------------------- on the terminal


def _print(analyses: list[Analysis]) -> None:
    console = Console(highlight=False, markup=False)
    names = [a.name for a in analyses]
    for analysis in analyses:
        console.print(_table(analysis))
    text = Console(soft_wrap=True, highlight=False, markup=False)
    text.print(advice_for_all(analyses))
    for reason in reasons(analyses, names):
        text.print(f"- {reason}")


def _table(analysis: Analysis) -> Table:
    right = {"justify": "right"}
    table = Table(title=analysis.name or None, title_justify="left")
    for name, options in {
        "head": right,
        "form": {},
        "rank": right,
        "certificate": right,
        "energy": right,
        "extent": right,
        "time/dense": right,
    }.items():
        table.add_column(name, **options)
    for h in analysis.report.heads:
        numbers = [str(h.rank), bound(h.certificate), energy(h), f"{h.extent:.3g}", times_dense(h)]
        table.add_row(str(h.head), h.form, *numbers)
    return table
