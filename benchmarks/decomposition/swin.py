"""A model's worth of learned biases, through `compress` as a user would call it."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter

import torch
from benchmarks.record import Row, say, write
from torch import Tensor

import flashbias as fb
from flashbias.decompose import NotLowRankError
from flashbias.decompose.request import Request

__all__ = ["swin"]


STAGES = ((2, 4), (2, 8), (18, 16), (2, 32))
"""Layers and heads of each stage of SwinV2-B."""

HIDDEN = 512


def swin(arguments: argparse.Namespace) -> None:
    """Compress the biases of every layer with the defaults, one call each; then the ranks of each stage's first."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(arguments.seed)
    heads_of_layers = [heads for layers, heads in STAGES for _ in range(layers)][: arguments.layers]
    biases = [position_bias(heads, arguments.window, generator) for heads in heads_of_layers]
    before, cpu_before = time.perf_counter(), time.process_time()
    rows: list[Row] = []
    for layer, bias in enumerate(biases):
        rows.append({"layer": layer, **compressed(bias, arguments.tol)})
        say(f"layer {layer}: {rows[-1]['forms']}, {rows[-1]['seconds']} s")
    seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
    for layer, (row, bias) in enumerate(zip(rows, biases, strict=True)):
        is_first_of_stage = layer == 0 or len(bias) != len(biases[layer - 1])
        ranks = ranks_needed(bias, arguments.tol) if is_first_of_stage else []
        row["ranks_needed"] = " ".join(map(str, ranks))
    heads = sum(heads_of_layers)
    write(arguments, rows, {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "heads": heads})


def compressed(bias: Tensor, tol: float) -> Row:
    """What `compress` makes of one layer; of a refusal, what the ranks that pay would reach."""
    before = time.perf_counter()
    try:
        report, status = fb.compress(bias, tol).report, "ok"
    except NotLowRankError as refusal:
        report, status = refusal.report, "refused"
    seconds = time.perf_counter() - before
    forms = Counter(head.form for head in report.heads)
    reached = [min(head.certificates.values(), default=1.0) for head in report.heads]
    return {
        "heads": bias.shape[0],
        "tokens": bias.shape[-1],
        "tol": tol,
        "status": status,
        "forms": " and ".join(f"{count} {form}" for form, count in forms.items()),
        "largest_rank_that_pays": report.break_even_rank,
        "ranks": " ".join(str(head.rank) for head in report.heads),
        "certificate": f"{report.certificate:.3e}",
        "predicted_over_dense": f"{report.cost_ms / report.dense_ms:.3f}",
        "factors_reach_least": f"{min(reached):.3e}",
        "factors_reach_most": f"{max(reached):.3e}",
        "seconds": round(seconds, 3),
    }


def ranks_needed(bias: Tensor, tol: float) -> list[int]:
    """Smallest rank of float32 factors with which each head keeps the promise, whatever it costs; -1 if none does."""
    request = Request.checked(bias, tol, None, None, False, None, None, torch.float32, 0)
    fits = [request.head(index).low_rank(min(bias.shape[-2:]), torch.float32) for index in range(len(request))]
    return [-1 if fit is None else fit.rank for fit in fits]


def position_bias(heads: int, window: int, generator: torch.Generator) -> Tensor:
    """`[heads, window^2, window^2]`: `16 sigmoid(MLP(offset))`, offsets on a logarithmic scale.

    The weights are random and larger than a fresh model's, whose biases are nearly constant: heads differ as learned
    ones do.

    Reference:
        "Swin Transformer V2", https://arxiv.org/abs/2111.09883, equations 3 to 5.
    """
    line = 8 * torch.arange(1 - window, window) / (window - 1)
    line = line.sign() * torch.log2(1 + line.abs()) / math.log2(8)
    offsets = torch.cartesian_prod(line, line)
    weight, shift = (0.7 * torch.randn(HIDDEN, width, generator=generator) for width in (2, 1))
    out = 0.1 * torch.randn(heads, HIDDEN, generator=generator)
    table = 16 * torch.sigmoid(out @ torch.relu(weight @ offsets.mT + shift))
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    row, column = (places[:, None] - places + window - 1).unbind(-1)
    return table[:, row * (2 * window - 1) + column]
