"""Times and verdicts of all ranks together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist

from flashbias.attention import block

__all__ = ["Timed", "agreed", "over_ranks", "timed", "which_ran"]

MOST_REPEATS = 7


@dataclass(frozen=True)
class Timed:
    """Median milliseconds of the slowest rank, and of how many repeats."""

    ms: float
    repeats: int


def over_ranks(value: float, device: torch.device, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> float:
    """One number of all ranks' numbers."""
    dist.all_reduce(found := torch.tensor([value], dtype=torch.float64, device=device), op=operation)
    return found.item()


def agreed(value: float, device: torch.device) -> float:
    """Rank 0's number, on every rank."""
    dist.broadcast(found := torch.tensor([value], dtype=torch.float64, device=device), src=0)
    return found.item()


def timed(call: Callable[[], object], device: torch.device, seconds: float, is_alone: bool) -> Timed:
    """Time a call that has run before; ranks begin together, and the slowest counts.

    Args:
        call: what to time.
        device: where it runs.
        seconds: about how long to repeat it; a call that takes longer runs once.
        is_alone: whether only this rank calls.
    """
    first = _once(call, device, is_alone)
    repeats = max(1, min(MOST_REPEATS, int(seconds / (first / 1000))))
    times = [first] + [_once(call, device, is_alone) for _ in range(repeats - 1)]
    return Timed(statistics.median(times), repeats)


def _once(call: Callable[[], object], device: torch.device, is_alone: bool) -> float:
    if not is_alone:
        dist.barrier()
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        ms = 1000 * (time.perf_counter() - start)
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        ms = begin.elapsed_time(end)
    return ms if is_alone else over_ranks(ms, device)


@contextmanager
def which_ran() -> Iterator[set[str]]:
    """Collect the implementations that blocks of keys go through."""
    names: set[str] = set()
    ask = block.block_implementation

    def noted(*arguments: object) -> str:
        names.add(name := ask(*arguments))  # pyright: ignore[reportArgumentType]
        return name

    with patch.object(block, "block_implementation", noted):
        yield names
