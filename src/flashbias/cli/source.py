"""What `analyze` and `factor` are given: a bias in a file, and the attention that it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from flashbias.attention.workload import Workload
from flashbias.decompose import NotLowRankError
from flashbias.decompose.bound import check_tol
from flashbias.decompose.read import Layer, read_layers
from flashbias.demo.measure import free_memory
from flashbias.files import check_target

__all__ = [
    "Attention",
    "BatchOption",
    "DeviceOption",
    "DtypeOption",
    "FileArgument",
    "HeadDimOption",
    "KeyOption",
    "LayerOption",
    "MaskOption",
    "Progress",
    "SeqlenOption",
    "TolOption",
    "TrainingOption",
    "WindowOption",
    "about",
    "check_out",
    "forward_progress",
    "layers_of",
]

FileArgument = Annotated[
    Path, typer.Argument(help="A .npy, .pt, .pth, .bin or .safetensors file.", exists=True, dir_okay=False)
]
KeyOption = Annotated[
    str | None, typer.Option(help="Which tensor of the file; nested names joined by dots; with *, one layer each.")
]
WindowOption = Annotated[
    str | None, typer.Option(help="Read a relative table [T], [T, H] or [H, T] of this window: 24x24 or 2x6x12.")
]
SeqlenOption = Annotated[int | None, typer.Option(help="Read such a table along a line of so many tokens.")]
LayerOption = Annotated[int | None, typer.Option(help="Take this layer alone, counted from 0.")]
TolOption = Annotated[float, typer.Option(help="Most that an output may move, in diameters of its values; in (0, 1).")]
MaskOption = Annotated[
    str | None, typer.Option(help="causal; for N != M causal-top-left or causal-bottom-right. Hidden entries are free.")
]
HeadDimOption = Annotated[int, typer.Option(help="Width of queries, keys and values.")]
BatchOption = Annotated[int, typer.Option(help="Sequences, or windows, that share the bias.")]
TrainingOption = Annotated[str, typer.Option(help="none, frozen (backward without the bias) or bias.")]
DtypeOption = Annotated[str, typer.Option(help="Of queries, keys and values: bfloat16, float16 or float32.")]
DeviceOption = Annotated[str, typer.Option(help="Whose measured times decide: h200, cpu, or a file of coefficients.")]

Progress = Callable[[int, int, str], None]
"""Shows the number of steps done, the number of steps, and what is going on."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MASKS = ("causal", "causal-top-left", "causal-bottom-right")
PASSES = {"none": "forward", "frozen": "training, bias frozen", "bias": "training"}


@dataclass(frozen=True)
class Attention:
    """The attention that a bias is for, as the options say it.

    Args:
        tol: the promise.
        mask: one of `MASKS`, or None.
        head_dim: width of queries, keys and values.
        batch: sequences that share the bias.
        training: as in `Workload`.
        dtype: name of the queries' dtype.
        device: whose measured times decide.

    Raises:
        ValueError: a value that is not one of those.
    """

    tol: float
    mask: str | None
    head_dim: int
    batch: int
    training: str
    dtype: str
    device: str

    def __post_init__(self) -> None:
        """Check what needs no file."""
        check_tol(self.tol)
        for name, allowed in (("mask", (None, *MASKS)), ("training", tuple(PASSES)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in allowed:
                listed = ", ".join(value for value in allowed if value is not None)
                raise ValueError(f"--{name} must be one of {listed}, got {getattr(self, name)!r}")
        for name in ("head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")

    def workload(self, layer: Layer) -> Workload:
        """The attention of one layer, for the predicted times."""
        heads, seqlen_q, seqlen_k = layer.shape
        return Workload(
            heads,
            seqlen_q,
            seqlen_k,
            self.head_dim,
            batch=self.batch,
            is_causal=self.mask is not None,
            shared_bias=True,
            training=self.training,  # pyright: ignore[reportArgumentType]  checked above
            dtype=DTYPES[self.dtype],
            causal_alignment="top_left" if self.mask == "causal-top-left" else "bottom_right",
        )

    def mask_of(self, layer: Layer) -> Tensor | None:
        """Booleans `[N, M]`, True where an entry is read; None: everywhere."""
        if self.mask is None:
            return None
        _, seqlen_q, seqlen_k = layer.shape
        if self.mask == "causal" and seqlen_q != seqlen_k:
            raise ValueError(
                f"--mask causal is not clear for {seqlen_q} queries and {seqlen_k} keys: "
                "say causal-top-left or causal-bottom-right"
            )
        shift = seqlen_k - seqlen_q if self.mask == "causal-bottom-right" else 0
        return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(shift)

    def facts(self) -> list[str]:
        """What a reader should know of it."""
        batch = [f"batch {self.batch}"] if self.batch > 1 else []
        masked = [self.mask] if self.mask else []
        return [f"tol {self.tol:g}", *masked, *batch, f"head_dim {self.head_dim}", self.dtype, PASSES[self.training]]


def layers_of(
    file: Path, key: str | None, window: str | None, seqlen: int | None, layer: int | None
) -> tuple[Layer, ...]:
    """Read what the options name, and find out whether there is memory to work on it.

    Args:
        file: as in `read_layers`.
        key: as there.
        window: sides joined by x.
        seqlen: as in `read_layers`.
        layer: number of the only one that is wanted.

    Returns:
        The layers.

    Raises:
        MemoryError: a layer needs more memory than is free; the message says how much.
        ValueError: as `read_layers` says; a window of another form; a number that no layer has.
    """
    if window is not None and not re.fullmatch(r"\d+(x\d+){1,2}", window):
        raise ValueError(f"--window must be two or three sides like 24x24 or 2x6x12, got {window!r}")
    sides = None if window is None else [int(side) for side in window.split("x")]
    layers = read_layers(file, key, window=sides, seqlen=seqlen)
    if layer is not None:
        if not 0 <= layer < len(layers):
            raise ValueError(f"--layer must lie in 0 … {len(layers) - 1}, got {layer}")
        layers = (layers[layer],)
    free = free_memory("cpu")
    for each in layers:
        if each.bytes_needed > free:
            raise MemoryError(
                f"{file}: {each.name or 'the bias'} of {'×'.join(map(str, each.shape))} needs "
                f"{each.bytes_needed / 2**30:.1f} GiB to work on, one head at a time, and {free / 2**30:.1f} GiB are "
                "free; flashbias.compress_function factors a bias that never exists as a matrix"
            )
    return layers


def check_out(out: Path, file: Path) -> None:
    """Find out before the work is done whether `out` can be written, and is not the file that is read."""
    check_target(out)
    if out.exists() and out.samefile(file):
        raise ValueError(f"--out is {file}, the file to read")


@contextmanager
def about(layer: Layer) -> Iterator[None]:
    """Name the layer in what the library says of an argument."""
    try:
        yield
    except ValueError as error:
        if not layer.name or isinstance(error, NotLowRankError):
            raise
        raise ValueError(f"{layer.name}: {error}") from error


def forward_progress(show: Progress, layer: Layer) -> Progress:
    """The function that shows progress, with the layer's name before what is going on."""
    return lambda done, total, what: show(done, total, f"{layer.name} {what}".strip())
