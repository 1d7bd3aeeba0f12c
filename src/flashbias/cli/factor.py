"""`flashbias factor`: a bias in a file to factors in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flashbias.cli import source
from flashbias.cli.progress import progress_bar
from flashbias.decompose import NotLowRankError, Report, compress
from flashbias.decompose.read import Layer
from flashbias.decompose.verdict import refusal_of, size
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias
from flashbias.store import save

__all__ = ["factor"]

FACTOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def factor(
    file: source.FileArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .safetensors file; for several layers with {layer} in its name.")
    ],
    key: source.KeyOption = None,
    window: source.WindowOption = None,
    seqlen: source.SeqlenOption = None,
    layer: source.LayerOption = None,
    tol: source.TolOption = 1e-3,
    mask: source.MaskOption = None,
    allow_dense: Annotated[bool, typer.Option("--allow-dense", help="Keep heads that do not pay as a matrix.")] = False,
    max_rank: Annotated[int | None, typer.Option(help="Largest rank. Default: the largest that pays.")] = None,
    table: Annotated[bool, typer.Option("--table/--no-table", help="Whether a relative table may be used.")] = True,
    exact_table: Annotated[
        bool, typer.Option("--exact-table", help="Store the relative table that the bias is, whatever it costs.")
    ] = False,
    factor_dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: what is faster and keeps the promise.")
    ] = None,
    head_dim: source.HeadDimOption = 64,
    batch: source.BatchOption = 1,
    training: source.TrainingOption = "none",
    dtype: source.DtypeOption = "bfloat16",
    device: source.DeviceOption = "h200",
) -> None:
    """Store a bias as factors, a table or both, certified.

    The file can be read with `flashbias.load`; it also holds the report. Where no form keeps the tolerance at less
    than the predicted time of a dense bias, nothing is written and the exit code is 1; `flashbias analyze` says why.

    **Examples**

        flashbias factor bias.npy -o factors.safetensors

        flashbias factor model.pt --key encoder.bias --tol 0.01 --allow-dense -o factors.safetensors

        flashbias factor swin.pt --key 'layers.*.bias_table' --window 7x7 -o 'layer{layer}.safetensors'
    """
    attention = source.Attention(tol, mask, head_dim, batch, training, dtype, device)
    if factor_dtype not in (None, *FACTOR_DTYPES):
        raise ValueError(f"--factor-dtype must be float32 or bfloat16, got {factor_dtype!r}")
    if exact_table and not table:
        raise ValueError("--exact-table does not go with --no-table")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"--max-rank must be at least 1, got {max_rank}")
    layers = source.layers_of(file, key, window, seqlen, layer)
    targets = _targets(out, file, len(layers), layer or 0)
    found: list[FactoredBias | MixedBias] = []
    with progress_bar() as progress:
        for each in layers:
            with source.about(each), _refused(each, allow_dense):
                bias = compress(
                    each.dense(),
                    tol,
                    mask=attention.mask_of(each),
                    max_rank=max_rank,
                    table="exact" if exact_table else "auto" if table else None,
                    allow_dense=allow_dense,
                    workload=attention.workload(each),
                    device=device,
                    factor_dtype=None if factor_dtype is None else FACTOR_DTYPES[factor_dtype],
                    progress=source.forward_progress(progress, each),
                )
                found.append(bias)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for each, bias, target in zip(layers, found, targets, strict=True):
        save(bias, target, metadata=_metadata(file, each, attention, key))
        console.print(_summary(each, bias, target))


@contextmanager
def _refused(layer: Layer, allow_dense: bool) -> Iterator[None]:
    """Say in one line why nothing is written."""
    try:
        yield
    except NotLowRankError as refusal:
        name = f"{layer.name}: " if layer.name else ""
        ways = ["a larger --tol"] + ([] if allow_dense else ["--allow-dense"])
        if all(head.form == "table" for head in refusal.report.heads):
            ways.append("--exact-table")
        advice = f"try {', or '.join(ways)}"
        raise NotLowRankError(f"{name}{refusal_of(refusal.report)}; {advice}", refusal.report) from None


def _targets(out: Path, file: Path, count: int, first: int) -> list[Path]:
    """A file for each layer."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    if count > 1 and "{layer}" not in out.name:
        raise ValueError(
            f"{file} holds {count} layers: put {{layer}} into --out, as in {out.stem}-{{layer}}.safetensors, "
            "or take one with --layer"
        )
    targets = [out.with_name(out.name.replace("{layer}", str(first + n))) for n in range(count)]
    for target in targets:
        source.check_out(target, file)
    return targets


def _metadata(file: Path, layer: Layer, attention: source.Attention, key: str | None) -> dict[str, str]:
    """What the factors are of; without the mask they mean nothing where it hides entries."""
    found = {"source": file.name, "key": key, "layer": layer.name, "mask": attention.mask}
    return {name: value for name, value in found.items() if value}


def _summary(layer: Layer, bias: FactoredBias | MixedBias, target: Path) -> str:
    report: Report = bias.report
    heads, seqlen_q, seqlen_k = layer.shape
    dense = 2 * heads * seqlen_q * seqlen_k
    before = f"{layer.name}: " if layer.name else ""
    return f"{before}{report}\nwrote {target}, {size(bias.nbytes)} in place of {size(dense)}"
