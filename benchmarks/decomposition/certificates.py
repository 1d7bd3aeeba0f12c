"""The promise against the truth: how far attentions move, and how far they were certified to."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import Row, say, write
from torch import Tensor

import flashbias as fb
from flashbias.attention.workload import Workload
from flashbias.decompose import NotLowRankError
from flashbias.files import whole_file

__all__ = ["certificates"]


DRAWS = 8
"""Random queries, keys and values for each problem."""

ROUNDING = 1e-12
"""What float64 may add to an error."""


def certificates(arguments: argparse.Namespace) -> None:
    """Draw problems until so many are accepted, and move real attentions by each bias that was found."""
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    seed, refused = arguments.seed, 0
    while len(rows) < arguments.problems:
        row = certified_problem(seed)
        seed, refused = seed + 1, refused + (row is None)
        rows += [] if row is None else [row]
        if row is not None and len(rows) % 100 == 0:
            say(f"{len(rows)} problems accepted, {refused} refused")
    summary = {
        "problems": len(rows),
        "refused": refused,
        "draws_per_problem": DRAWS,
        "above": sum(bool(row["above"]) for row in rows),
        "looseness_random": looseness(rows, "random_error"),
        "looseness_two_keys": looseness(rows, "two_key_error"),
    }
    write(arguments, rows, summary)
    if arguments.picture:
        draw(rows, arguments.picture)


def certified_problem(seed: int) -> Row | None:
    """One problem's certificate and true errors, None where `compress` refuses."""
    generator = torch.Generator().manual_seed(seed)
    bias, tol, options = random_problem(seed, generator)
    try:
        found = fb.compress(bias, tol, workload=Workload(1, *bias.shape, head_dim=64), **options)
    except NotLowRankError:
        return None
    mask = options.get("mask")
    true, approximate = bias.double(), found.dense(torch.float64)[0]
    certificate = found.report.certificate
    random = max(random_error(true, approximate, mask, generator) for _ in range(DRAWS))
    adversarial = two_key_error(true, approximate, mask)
    return {
        "seed": seed,
        "queries": bias.shape[0],
        "keys": bias.shape[1],
        "tol": f"{tol:.3e}",
        "masked": mask is not None,
        "form": found.report.heads[0].form,
        "rank": found.report.ranks[0],
        "certificate": f"{certificate:.9e}",
        "random_error": f"{random:.9e}",
        "two_key_error": f"{adversarial:.9e}",
        "above": max(random, adversarial) > certificate + ROUNDING,
    }


def random_problem(seed: int, generator: torch.Generator) -> tuple[Tensor, float, dict[str, Any]]:
    """A bias somewhere between smooth and rough, a tolerance, and options of `compress`."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    n, m = (int(uniform(24, 97)) for _ in range(2))
    x, y = torch.linspace(0, 1, n)[:, None], torch.linspace(0, 1, m)
    bias = 10 ** uniform(-1, 1) * torch.exp(-(10 ** uniform(0, 3)) * (x - y) ** 2)
    if seed % 3 == 1:  # noise
        bias = bias + 10 ** uniform(-4, -1) * torch.randn(n, m, generator=generator)
    if seed % 3 == 2:  # sharp near the diagonal
        offset = torch.arange(m) - torch.arange(n)[:, None]
        sharp = torch.randn(5, generator=generator)[offset.clamp(-2, 2) + 2] * (offset.abs() <= 2)
        bias = bias + 2 * torch.cos(3 * (x - y)) + 3 * sharp
    dtype = (None, torch.float32, torch.bfloat16, torch.float32)[seed % 4]
    options: dict[str, Any] = {"factor_dtype": dtype, "table": None if seed % 9 else "auto", "seed": seed}
    if seed % 24 == 23:
        options["mask"] = torch.rand(n, m, generator=generator) > 0.3
    return bias, 10 ** uniform(-3, -0.5), options


def random_error(true: Tensor, approximate: Tensor, mask: Tensor | None, generator: torch.Generator) -> float:
    """Largest move of an output relative to the diameter of the values its row can see; queries, keys, values drawn."""
    (n, m), width = true.shape, 16
    query, key = (torch.randn(length, width, generator=generator, dtype=torch.float64) for length in (n, m))
    value = torch.randn(m, 3, generator=generator, dtype=torch.float64)
    sharpness = 10 ** (2 * float(torch.rand((), generator=generator)) - 1)
    scores = sharpness * query @ key.mT / width**0.5
    moved = (attend(scores + approximate, value, mask) - attend(scores + true, value, mask)).norm(dim=-1)
    apart = torch.cdist(value, value, compute_mode="donot_use_mm_for_euclid_dist")
    if mask is None:
        return float(moved.max() / apart.max())
    diameter = (apart * (mask[:, :, None] & mask[:, None])).amax((1, 2))
    return float((moved / diameter)[diameter > 0].max())


def two_key_error(true: Tensor, approximate: Tensor, mask: Tensor | None) -> float:
    """The worst case: attention to two keys alone, whose errors lie furthest apart in a row, and values 0 and 1.

    Before the error, the scores favour the one key by half the difference; after it, the other by as much.
    """
    error = approximate - true
    high = error if mask is None else error.masked_fill(~mask, -math.inf)
    low = error if mask is None else error.masked_fill(~mask, math.inf)
    pair = torch.stack([high.argmax(-1), low.argmin(-1)], dim=-1)
    moved_by = error.gather(1, pair)
    scores = -true.gather(1, pair) - moved_by / 2
    before, after = (torch.softmax(scores + bias.gather(1, pair), dim=-1) for bias in (true, approximate))
    moved = (after - before)[:, 0]
    return float((moved if mask is None else moved[mask.any(-1)]).max())


def attend(scores: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in float64; rows without an open key give 0."""
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value


def looseness(rows: Sequence[Row], error: str) -> dict[str, float]:
    """Quantiles of certificate over true error, where the error is more than rounding."""
    ratios = [float(str(row["certificate"])) / float(str(row[error])) for row in rows if float(str(row[error])) > 1e-9]
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    found = torch.tensor(ratios, dtype=torch.float64).quantile(levels).tolist() if ratios else [math.nan] * 4
    names = ("least", "p10", "median", "p90")
    return {"counted": len(ratios)} | {name: round(value, 3) for name, value in zip(names, found, strict=True)}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Certificate against true error, both axes logarithmic; nothing may lie right of the diagonal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    promised = [float(str(row["certificate"])) for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 5.0), dpi=150, layout="constrained")
    series = [("random_error", "random queries, keys and values", "o", "#1f77b4")]
    series += [("two_key_error", "two keys, the worst case", "+", "#d62728")]
    for name, label, marker, colour in series:
        moved = [float(str(row[name])) for row in rows]
        shown = [(x, y) for x, y in zip(moved, promised, strict=True) if x > 1e-9]
        axes.scatter(*zip(*shown, strict=True), s=14, marker=marker, c=colour, alpha=0.6, linewidths=0.8, label=label)
    ends = [axes.get_xlim()[0], 1.0]
    line = [1e-9, 1.0]
    axes.plot(line, line, color="black", linewidth=0.8, label="certificate = error")
    axes.set(xscale="log", yscale="log", xlabel="true change of the output / diameter of the values")
    axes.set(ylabel="certificate", title=f"{len(rows)} attentions: none moves further than certified")
    smallest = min([x for x in promised if x > 1e-9], default=ends[0])
    axes.set(xlim=(smallest / 100, 0.5), ylim=(smallest / 2, 0.5))
    axes.legend(loc="lower right", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)
