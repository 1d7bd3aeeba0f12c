"""What columns of factors cost: milliseconds of the forward pass, by kernel.

    python3 benchmarks/columns.py [shape ...]

Factors are bfloat16 and the scale is a power of two, so that the packed columns are as many as the rank. Each line is
a case, the columns, and the times of the kernels for Hopper and of the portable ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

import flashbias as fb
from flashbias.bench.measure import measure

SHAPES = {
    "swin": (1024, 4, 576, 32),
    "triangle": (512, 4, 512, 32),
    "tri1218": (1218, 4, 1218, 32),
    "pangu": (30, 744, 144, 32),
    "d16": (64, 8, 2048, 16),
    "d64": (16, 16, 2048, 64),
    "d128": (8, 16, 2048, 128),
}
"""Batch, heads, tokens, head_dim."""

COLUMNS = (0, 48, 64, 80, 96, 128, 192, 256)
IMPLS = ("hopper", "triton")


def main() -> None:
    """Time the shapes that are named, all of them if none is."""
    for name in sys.argv[1:] or SHAPES:
        shape = SHAPES[name]
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for columns in COLUMNS:
            bias = factors(shape, columns)
            times = (milliseconds(partial(fb.attention, q, k, v, bias, scale=0.25, impl=impl)) for impl in IMPLS)
            print(name, columns, *(f"{ms:.3f}" for ms in times), flush=True)


def factors(shape: tuple[int, int, int, int], columns: int) -> fb.FactoredBias | None:
    """Random ones that the batch shares; none for no columns."""
    if not columns:
        return None
    phi_q, phi_k = (torch.randn(1, *shape[1:3], columns, device="cuda") / columns**0.5 for _ in range(2))
    return fb.FactoredBias(phi_q.bfloat16(), phi_k.bfloat16())


def milliseconds(run: Callable[[], object]) -> float:
    """Median, after a first call that compiles."""
    run()
    return measure(run, torch.device("cuda"), budget_s=0.06, min_repetitions=5).median_ms


if __name__ == "__main__":
    main()
