"""Winds of the next month, with an earth-specific bias.

Parts, in this order; each is written when it is done, and what fails is a row that says so:

| part | what a row is |
|---|---|
| `step` | a training step of the small model: dense SDPA, exact table |
| `train` | an epoch |
| `score` | the error on held-out months: baselines and model |
| `rank` | the trained model, the bias of all its windows cut to one rank by an SVD |
| `compress` | the trained model, the bias of all its windows compressed with one tolerance |
| `tables` | Pangu-Weather's window: the rank that a tolerance takes, for learned and for random tables |
| `attention` | Pangu-Weather's outer layer, its attention alone |

`weather.npz` holds a held-out month for the picture, and the learned tables. `--parts speed` takes them from there and
measures the last two parts alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["add_arguments", "run"]


PARTS = ("model", "speed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this field."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=12.0, help="of training: fewer epochs where it takes longer")
    parser.add_argument("--epochs", type=int, help="default: 60; 1 with --small")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from the files in --out")


def run(arguments: argparse.Namespace) -> None:
    """Fetch, draw, or measure and draw."""
    from benchmarks.fields.weather.data import fetch
    from benchmarks.fields.weather.factors import factor
    from benchmarks.fields.weather.picture import draw
    from benchmarks.fields.weather.record import Record
    from benchmarks.fields.weather.speed import speed
    from benchmarks.fields.weather.train import train

    if arguments.fetch:
        fetch()
        return
    if not arguments.draw:
        record = Record(arguments)
        tables = None
        if "model" in arguments.parts:
            study = train(record)
            factor(record, study)
            tables = study.tables()
        if "speed" in arguments.parts:
            speed(record, learned_before(arguments.out) if tables is None else tables)
    draw(arguments.out, arguments.picture)


def learned_before(out: Path) -> Tensor:
    """The tables that an earlier run has left in `out`, `[rows, tables]`; float16, as they are kept.

    Raises:
        FileNotFoundError: there are none.
    """
    path = out / "weather.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path}, which holds the learned tables, is missing: run the part 'model' first")
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["tables"])
