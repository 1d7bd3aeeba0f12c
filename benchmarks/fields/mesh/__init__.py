"""A transformer on real meshes, with the bias and without; car-sized meshes at full size.

Parts, in this order; each is written when it is done, and what fails is a row that says so:

| part | what a row is |
|---|---|
| `curve` | the training error of one model after some steps |
| `body` | one trained model on the clouds of one held-out body |
| `solver-32k` | a solver on 32,186 points of the motorbike: inference, or a training step |
| `solver-131k` | the same on all 132,871 |
| `attention-32k` | attention alone, its bias made before |
| `solver-4k` | a training step on 4,096 points, also with ways that are too slow for more |
| `solver-32k-learned` | the same with a matrix that passes gradients on; last, for it may end the process |

`mesh.npz` holds a held-out cloud with its true and computed fields, for the picture.
"""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]

PARTS = ("train", "speed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this field."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=50.0, help="of training: fewer steps where it takes longer")
    parser.add_argument("--steps", type=int, help="of training; default: 1500, or 40 with --small")
    parser.add_argument("--seeds", type=int, default=1, help="train so many pairs of models")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from the files in --out")


def run(arguments: argparse.Namespace) -> None:
    """Fetch, draw, or measure and draw."""
    from benchmarks.fields.mesh.bodies import fetch
    from benchmarks.fields.mesh.evidence import Evidence
    from benchmarks.fields.mesh.picture import draw
    from benchmarks.fields.mesh.speed import speed
    from benchmarks.fields.mesh.train import train

    if arguments.fetch or not arguments.draw:
        fetch()
    if arguments.fetch:
        return
    if not arguments.draw:
        evidence = Evidence(arguments)
        if "train" in arguments.parts:
            evidence.attempt("train", train)
        if "speed" in arguments.parts:
            evidence.attempt("speed", speed)
    draw(arguments.out, arguments.picture)
