"""Kernels on the vertices of a mesh, by crosses: time, memory, rank and error."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from benchmarks.decomposition.mesh import box_diagonal, motorbike, vertices
from benchmarks.record import Row, say, write
from torch import Tensor

import flashbias as fb
from flashbias.decompose import NotLowRankError

__all__ = ["KERNELS", "cross"]


LENGTH_SCALE = 0.1
"""Of the Gaussian and the Matérn kernel, as a part of the diagonal of the mesh's box."""

CHECK_SEED = 20_000
"""Of the entries that are compared: `compress_function` draws with other numbers."""

KERNELS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "distance": ("-r", lambda r: -r),
    "gaussian": ("exp(-(r / l)^2 / 2)", lambda r: torch.exp(-r.square() / 2)),
    "matern": ("(1 + sqrt(3) r / l) exp(-sqrt(3) r / l)", lambda r: (1 + 3**0.5 * r) * torch.exp(-(3**0.5) * r)),
}
"""Formula and function of the distance r; a Matérn kernel of smoothness 3/2."""


def cross(arguments: argparse.Namespace) -> None:
    """Factor each kernel in a process of its own, so that its peak memory is its own."""
    obj = arguments.obj or motorbike()
    rows: list[Row] = []
    for kernel in arguments.kernels:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            measured = process.submit(
                factor_kernel, kernel, obj, arguments.points, arguments.tol, arguments.entries, arguments.threads
            )
            rows.append(measured.result())
        say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    write(
        arguments,
        rows,
        {"length_scale": f"{LENGTH_SCALE} of the diagonal of the box, {box_diagonal(vertices(obj)):.4g}"},
    )


def factor_kernel(kernel: str, obj: Path, points: int | None, tol: float, entries: int, threads: int) -> Row:
    """Measure one kernel: `compress_function`, and then the error on entries that it has not seen."""
    torch.set_num_threads(threads)
    x = vertices(obj)
    scale = 1.0 if kernel == "distance" else LENGTH_SCALE * box_diagonal(x)
    x = x[:points]
    formula, of_distance = KERNELS[kernel]
    before, cpu_before = time.perf_counter(), time.process_time()
    try:
        bias = fb.compress_function(
            lambda a, b: of_distance(torch.cdist(a, b) / scale), x, tol=tol, progress=progress(kernel)
        )
    except NotLowRankError as refusal:
        say(str(refusal))
        bias, report = None, refusal.report
    else:
        report = bias.report
    seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
    # Linux counts in KiB. The check below is not the library's, and its memory not counted.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row: Row = {
        "kernel": kernel,
        "formula": formula,
        "points": len(x),
        "tol": tol,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_rss_gib": round(peak, 2),
        "rank": report.ranks[0],
        "sample": report.sample[0],
        "evaluations": report.evaluations,
        "status": "ok" if bias is not None else "refused",
    }
    if bias is None:
        return row | dict.fromkeys(("range", "max_error", "rms_error", "diagonal_error"), "")
    return row | relative_errors(bias, x.double() / scale, of_distance, entries)


def relative_errors(bias: fb.FactoredBias, x: Tensor, of_distance: Callable[[Tensor], Tensor], entries: int) -> Row:
    """Errors of random entries, and of those with `i = j`, in parts of the range that the same entries show."""
    generator = torch.Generator().manual_seed(CHECK_SEED)
    i, j = torch.randint(len(x), (2, entries), generator=generator)
    itself = torch.arange(len(x))

    def compared(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        true = of_distance((x[i] - x[j]).norm(dim=-1))
        found = torch.cat(
            [
                (bias.phi_q[0, some_i].double() * bias.phi_k[0, some_j].double()).sum(-1)
                for some_i, some_j in zip(i.split(20_000), j.split(20_000), strict=True)
            ]
        )
        return true, (found - true).abs()

    (true, error), (diagonal, diagonal_error) = compared(i, j), compared(itself, itself)
    ends = torch.cat([true, diagonal])
    extent = float(ends.max() - ends.min())
    return {
        "range": f"{extent:.6g}",
        "max_error": f"{float(error.max()) / extent:.3e}",
        "rms_error": f"{float(error.square().mean().sqrt()) / extent:.3e}",
        "diagonal_error": f"{float(diagonal_error.max()) / extent:.3e}",
    }


def progress(kernel: str) -> Callable[[int, int, str], None]:
    """Say each step once."""
    told = Counter[str]()

    def tell(done: int, total: int, what: str) -> None:
        told[what] += done == 0
        if done == 0:
            say(f"{kernel}: {what}" + (f", again ({told[what]})" if told[what] > 1 else ""))

    return tell
