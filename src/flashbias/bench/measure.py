"""Time and memory of one call, on a GPU or a CPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Measurement", "let_go", "measure", "peak_mib"]

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
MAX_REPETITIONS = 1000
MAX_FLUSHES = 64
MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """Median, 10th and 90th percentile in milliseconds; `peak_mib` is None where it cannot be measured."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    peak_mib: float | None
    repetitions: int


def let_go() -> None:
    """Free what only cycles hold, of what is new since the last time.

    Beside torch a full collection takes a third of a second, beside its compiler and peers three: nearly all of what it
    looks at are modules that stay. `gc.unfreeze` makes the next one look at everything once more.
    """
    gc.collect()
    gc.freeze()


def measure(
    call: Callable[[], object],
    device: torch.device,
    *,
    budget_s: float = 0.4,
    min_repetitions: int = 10,
) -> Measurement:
    """Time a call that has run before, so that nothing is compiled any more.

    On a GPU each repetition finds a cold L2 cache (a buffer of 256 MiB is overwritten before it) and lies
    between two device events. The buffer is overwritten as often as it takes for the host to enqueue the call
    meanwhile, so that the time is the device's and not the interpreter's. Peak memory is the highest that
    torch's allocator held during a call, less what it held before: the inputs are not counted, outputs and
    everything saved for the backward pass are.

    On a CPU the wall clock is read, caches are as they are, and peak memory is not measured.

    Args:
        call: what to time. What it returns is dropped.
        device: where it runs.
        budget_s: about how long to repeat it, in seconds.
        min_repetitions: how often to repeat it at least, whatever the budget says.
    """
    timer = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    peak = None
    if device.type == "cuda":
        with peak_mib(device) as found:
            call()
        (peak,) = found
    times = sorted(timer(call, budget_s, min_repetitions))
    return Measurement(_quantile(times, 0.5), _quantile(times, 0.1), _quantile(times, 0.9), peak, len(times))


@contextmanager
def peak_mib(device: torch.device) -> Iterator[list[float]]:
    """Append the highest memory that torch's allocator holds in the block, beyond what it held before; on a GPU only.

    Args:
        device: where the block's work runs; with a CPU the list stays empty.
    """
    found: list[float] = []
    if device.type == "cpu":
        yield found
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found.append((torch.cuda.max_memory_allocated() - before) / MIB)


def _time_on_gpu(call: Callable[[], object], budget_s: float, min_repetitions: int) -> list[float]:
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    host_s, call_s = _warm_up(call, budget_s / 8)
    flush_s = _flush_seconds(buffer)
    flushes = min(MAX_FLUSHES, 1 + math.ceil(1.5 * host_s / flush_s))
    repetitions = _repetitions(budget_s, call_s + flushes * flush_s, min_repetitions)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repetitions)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        for _ in range(flushes):
            buffer.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _warm_up(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Run for a while; return how long the host takes to enqueue a call, and how long a call takes in all."""
    hosts, totals = [], []
    began = time.perf_counter()
    while len(totals) < 3 or (time.perf_counter() - began < seconds and len(totals) < 100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        totals.append(time.perf_counter() - start)
    return _quantile(sorted(hosts), 0.5), _quantile(sorted(totals), 0.5)


def _flush_seconds(buffer: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    buffer.zero_()
    start.record()
    buffer.zero_()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _time_on_cpu(call: Callable[[], object], budget_s: float, min_repetitions: int) -> list[float]:
    times: list[float] = []
    start = time.perf_counter()
    call()
    repetitions = _repetitions(budget_s, time.perf_counter() - start, min_repetitions)
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _repetitions(budget_s: float, call_s: float, minimum: int) -> int:
    return max(minimum, min(MAX_REPETITIONS, int(budget_s / max(call_s, 1e-6))))


def _quantile(ordered: list[float], fraction: float) -> float:
    """Linear interpolation between the two nearest of sorted values."""
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
