"""A Swin on Fashion-MNIST, its learned tables compressed; SwinV2-B at full size.

Parts, in this order; each is written when it is done, and what fails is a row that says so:

| part | what a row is |
|---|---|
| `step` | a training step of the small model: as it is, through SDPA, patched |
| `train` | an epoch |
| `compress` | the trained model, patched with one tolerance: accuracy, and how far the logits move |
| `layer` | one attention of it: rank and certificate |
| `speed` | its inference at one batch size |
| `full` | inference of a SwinV2-B |
| `kernels` | its time on the GPU, by kernel |
| `full-step` | a training step of it |
| `attention` | one attention of it alone |

`vision.pt` holds the trained weights and `vision.npz` some tables, for the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]

PARTS = ("small", "small-speed", "full", "full-step", "attention")
"""`small` is all of the small model, `small-speed` its part `speed` alone; `full` has `kernels` too."""

FULL = {"full", "full-step", "attention"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this field."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=55.0, help="of training: fewer epochs where it takes longer")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--weights", type=Path, help="a vision.pt: do not train")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from the files in --out")


def run(arguments: argparse.Namespace) -> None:
    """Fetch, draw, or measure and draw."""
    from benchmarks.fields.vision.data import fetch
    from benchmarks.fields.vision.full import full
    from benchmarks.fields.vision.picture import draw
    from benchmarks.fields.vision.record import Record
    from benchmarks.fields.vision.small import small, small_speed

    if arguments.fetch:
        fetch()
        return
    if not arguments.draw:
        record = Record(arguments)
        if "small" in arguments.parts:
            small(record)
        elif "small-speed" in arguments.parts:
            small_speed(record)
        if FULL & set(arguments.parts):
            full(record)
    draw(arguments.out, arguments.picture)
