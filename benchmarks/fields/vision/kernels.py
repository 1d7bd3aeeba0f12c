"""Where the GPU's time of one pass goes: its kernels by name, and the gaps between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from benchmarks.fields.vision.record import Record
from torch.profiler import ProfilerActivity, profile

__all__ = ["Span", "add_kernels", "by_name"]

SHOWN = 8
"""Kernels with a row of their own."""

PASSES = 3

Span = tuple[str, float, float]
"""Name of a kernel, and when it began and ended, in microseconds."""


def add_kernels(record: Record, provider: str, weights: str, call: Callable[[], object]) -> None:
    """Add rows of the part `kernels`: milliseconds a pass, by kernel; nothing on a CPU.

    Args:
        record: where rows go.
        provider: of the rows.
        weights: likewise.
        call: has run before.
    """
    if record.device.type != "cuda":
        return
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PASSES):
            call()
        torch.cuda.synchronize()
    events = (event for event in profiler.events() or () if event.device_type == torch.autograd.DeviceType.CUDA)
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    for name, count, microseconds in by_name(spans):
        about = {"provider": provider, "weights": weights, "layer": name}
        note = f"{count / PASSES:g} launches a pass" if count else ""
        record.add("kernels", **about, ms=round(microseconds / PASSES / 1000, 4), note=note)


def by_name(spans: Iterable[Span]) -> list[tuple[str, int, float]]:
    """The longest kernels, the others together, and the gaps: name, launches, microseconds."""
    launches: dict[str, list[float]] = defaultdict(list)
    gaps, end = 0.0, None
    for name, start, stop in sorted(spans, key=lambda span: span[1]):
        launches[name].append(stop - start)
        gaps += 0.0 if end is None else max(0.0, start - end)
        end = stop if end is None else max(end, stop)
    found = sorted(((name, len(times), sum(times)) for name, times in launches.items()), key=lambda kernel: -kernel[2])
    rest = found[SHOWN:]
    others = [("others", sum(count for _, count, _ in rest), sum(time for *_, time in rest))] if rest else []
    return [*((name[:80], count, time) for name, count, time in found[:SHOWN]), *others, ("gaps", 0, gaps)]
