"""A GPT with ALiBi: trained dense and factored; time at long lengths.

Parts, in this order; each is written when it is done, and what fails is a row that says so:

| part | what a row is |
|---|---|
| `train` | some training steps of the GPT, with a dense bias and factored: the mean loss, bits per byte |
| `held-out` | the loss on other documents, at 1, 2 and 4 times the length of training, through either attention |
| `position` | the loss at 4 times the length of training, by what stands before |
| `attention` | ALiBi alone at one shape: time, memory, error against float64 |
| `prefill` | a model of transformers reads a prompt, as it is and patched |
"""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]

PARTS = ("train", "attention", "prefill")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this field."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, help="of each training; default 1,000, 30 with --small")
    parser.add_argument("--seconds", type=float, default=75.0, help="after which a training ends, whatever its steps")
    parser.add_argument("--attention-seconds", type=float, default=60.0, help="at most, for ALiBi alone")
    parser.add_argument("--cases", nargs="+", help="of the attention part, by name; default: all")
    parser.add_argument("--providers", nargs="+", help="of the attention part; default: ours and all its peers")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from the CSV in --out")


def run(arguments: argparse.Namespace) -> None:
    """Fetch, draw, or measure and draw."""
    from benchmarks.fields.language.data import fetch
    from benchmarks.fields.language.picture import draw
    from benchmarks.fields.language.prefill import prefill
    from benchmarks.fields.language.results import Results
    from benchmarks.fields.language.speed import attention
    from benchmarks.fields.language.train import train

    if arguments.fetch:
        fetch()
        return
    if not arguments.draw:
        results = Results(arguments)
        for name, part in (("train", train), ("attention", attention), ("prefill", prefill)):
            if name in arguments.parts:
                results.attempt(name, part)
    draw(arguments.out, arguments.picture)
