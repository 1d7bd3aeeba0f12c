"""A predictor of contacts, trained on real chains and given factors; the time of a Pairformer block.

    python -m benchmarks.fields protein --fetch
    python -m benchmarks.fields protein --out benchmarks/results/h200/fields

The first part trains a small predictor with dense biases, distils these into factors of several ranks, and judges all
on chains held out. The second times triangle attention, and a block of AlphaFold 3's Pairformer, by what computes the
attention. `--parts` runs one of them and keeps the rows of the other; `--draw` only draws the picture again.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from benchmarks.fields.protein import data, picture
from benchmarks.fields.protein.speed import SMALL_SHAPES, Shapes, Timing, timings
from benchmarks.fields.protein.task import Score, contact_probability
from benchmarks.fields.protein.train import SMALL, Curve, Plan, Study
from benchmarks.fields.record import joined
from benchmarks.record import Row, read, say, write

from flashbias.files import whole_file

__all__ = ["add_arguments", "run"]

PARTS = ("train", "speed")
COLUMNS = (
    *("part", "what", "rank", "step", "loss", "auc", "precision", "bias_error", "seconds"),
    *("tokens", "direction", "provider", "ms", "p10_ms", "p90_ms", "peak_mib", "difference", "status"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this field alone."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run (default: all)")
    parser.add_argument("--seconds", type=float, default=180.0, help="for all; a quarter of it trains the predictor")
    parser.add_argument("--draw", action="store_true", help="only draw the picture, from what is in --out")


def run(arguments: argparse.Namespace) -> None:
    """Fetch, or draw, or run the parts one by one; results are written after each."""
    if arguments.fetch:
        say(str(data.fetch()))
        return
    if not arguments.draw:
        earlier, about = read(arguments.out, arguments.subcommand)
        rows: list[Row] = []
        for part in (part for part in PARTS if part in arguments.parts):
            found = _train(arguments) if part == "train" else _speed(arguments)
            for _, group in groupby(_guarded(part, found), key=lambda row: (row["what"], row["tokens"])):
                rows += group
                whole, summary = joined(earlier, about, rows, {})
                write(arguments, whole, summary | _summary(whole))
    picture.draw(arguments.out, arguments.picture)


def _guarded(part: str, found: Iterator[Row]) -> Iterator[Row]:
    """What a part finds until it ends or fails; a failure is a row."""
    try:
        for row in found:
            if row["status"] != "ok":
                say(f"  {row['provider'] or row['what']}: {row['status']}")
            yield row
    except Exception as failed:
        traceback.print_exc()
        yield _row(part, part, status=f"error: {type(failed).__name__}: {str(failed)[:200]}")


def _row(part: str, what: str, **values: object) -> Row:
    return dict.fromkeys(COLUMNS, "") | {"part": part, "what": what, "status": "ok"} | values


# -------------------------------------------------------------------- the predictor


def _train(arguments: argparse.Namespace) -> Iterator[Row]:
    """Curves, and scores on the chains held out, by what the bias is."""
    began = time.perf_counter()
    train, held_out = data.split(data.load())
    plan = SMALL if arguments.small else replace(Plan(), seconds=arguments.seconds / 4)
    if arguments.small:
        held_out = held_out[:2]
    study = Study(plan, train, held_out, torch.device(arguments.device), arguments.seed)
    say(f"{len(train)} chains to train on, {len(held_out)} held out")

    def scored(what: str, score: Score, **values: object) -> Row:
        spent = time.perf_counter() - began
        say(f"  {what} {values.get('rank', '')}: loss {score.loss:.4f}, AUC {score.auc:.4f}, {spent:.0f} s")
        return _row("train", what, **vars(score), seconds=round(spent, 1), **values)

    yield from _curve("learning", study.learn())
    yield scored("matrix", study.evaluate())
    with study.without_bias():
        yield scored("no bias", study.evaluate())
    maps = _Maps(study)
    maps.add("matrix")
    for rank in sorted({rank for rank, _ in plan.variants}):
        with study.truncated(rank):
            yield scored("matrix truncated", study.evaluate(), rank=rank)
    for rank in plan.sketches:
        with study.sketched(rank):
            yield scored("sketched factors", study.evaluate(), rank=rank)
            maps.add(f"sketched {rank}")
    lessons = study.lessons()
    for rank, reach in plan.variants:
        what = "table + factors" if reach else "factors"
        try:
            students, errors = study.distil(rank, reach, lessons)
            error = float(np.sqrt(np.mean(np.square(errors))))
            with study.with_factors(students):
                yield scored(what, study.evaluate(), rank=rank, bias_error=error)
                maps.add(f"{what} {rank}")
            yield from _curve(f"tuning {what}", study.tune(students), rank)
            with study.with_factors(students):
                yield scored(f"{what}, tuned", study.evaluate(), rank=rank)
            with study.with_factors(students, torch.bfloat16):
                yield scored(f"{what}, tuned, bfloat16", study.evaluate(), rank=rank)
                maps.add(f"{what}, tuned {rank}")
        except Exception as failed:  # the other ranks go on
            yield _row("train", what, rank=rank, status=f"error: {type(failed).__name__}: {str(failed)[:200]}")
    maps.save(arguments.out / "protein-maps.npz")


def _curve(what: str, curve: Curve, rank: int | str = "") -> Iterator[Row]:
    for step, loss in curve:
        yield _row("train", what, rank=rank, step=step, loss=loss)


class _Maps:
    """Contacts of one chain held out, the one nearest to 160 residues: 255 is a contact, or a probability of 1."""

    def __init__(self, study: Study) -> None:
        self.study = study
        lengths = [test.types.shape[1] for test in study.tests]
        self.index = min(range(len(lengths)), key=lambda index: abs(lengths[index] - 160))
        test = study.tests[self.index]
        self.arrays = {
            "name": np.array(study.held_out[self.index].name),
            "contacts": _bytes((test.target[0] < 5).float()),
            "given": _bytes((test.known[0] == test.target[0]).float()),
        }

    def add(self, name: str) -> None:
        """What the model says now."""
        _, logits = self.study.logits(self.index)
        self.arrays[name] = _bytes(contact_probability(logits)[0])

    def save(self, path: Path) -> None:
        with whole_file(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **self.arrays)  # pyright: ignore[reportArgumentType]


def _bytes(share: torch.Tensor) -> np.ndarray:
    return (255 * share).round().byte().cpu().numpy()


# -------------------------------------------------------------------- the block


def _speed(arguments: argparse.Namespace) -> Iterator[Row]:
    shapes = SMALL_SHAPES if arguments.small else Shapes()
    began = time.perf_counter()
    for timing in timings(shapes, torch.device(arguments.device), arguments.seed):
        row = _timed(timing)
        spent = time.perf_counter() - began
        say(f"  {spent:.0f} s: {timing.scope}, {timing.tokens}, {timing.direction}, {timing.provider}: {row['ms']} ms")
        yield row | {"seconds": round(spent, 1)}


def _timed(timing: Timing) -> Row:
    row = _row("speed", timing.scope, tokens=timing.tokens, direction=timing.direction, provider=timing.provider)
    row |= {"status": timing.status}
    taken = timing.measurement
    if taken is None:
        return row
    return row | {
        "ms": round(taken.median_ms, 4),
        "p10_ms": round(taken.p10_ms, 4),
        "p90_ms": round(taken.p90_ms, 4),
        "peak_mib": "" if taken.peak_mib is None else round(taken.peak_mib, 1),
        "difference": timing.difference,
    }


# -------------------------------------------------------------------- in a few numbers


def _summary(rows: Sequence[Row]) -> dict[str, object]:
    """Scores by form of the bias; at each size, factors against open code and the best kernel with a matrix."""
    summary: dict[str, object] = {}
    for row in rows:
        if row["part"] == "train" and row["auc"] != "":
            summary[f"{row['what']} {row['rank']}".strip()] = {
                name: round(float(str(row[name])), 4) for name in ("loss", "auc", "precision")
            }
    for key, times in picture.times(rows).items():
        kernels = [
            ms for name, ms in times.items() if name != "open code" and "factors" not in name and "no bias" not in name
        ]
        ours = times.get("factors")
        if ours is None:
            continue
        summary[", ".join(map(str, key))] = {
            "factors_ms": ours,
            "open code / factors": round(times["open code"] / ours, 2) if "open code" in times else None,
            "best matrix kernel / factors": round(min(kernels) / ours, 2) if kernels else None,
        }
    return summary
