"""Filling the caches of compilers by many processes at once, before anything is timed."""

from __future__ import annotations

import math
import multiprocessing.connection
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from flashbias.bench.isolation import GRACE_S, START_UP_S, Worker
from flashbias.bench.rows import Job, Settings

__all__ = ["warm"]

HARMLESS = ("ok", "unsupported")  # what cannot run has nothing to compile


@dataclass
class _Hand:
    """A worker, the jobs that it is at, and until when it may be."""

    worker: Worker
    jobs: list[Job] = field(default_factory=list)
    until: float = field(default_factory=lambda: time.monotonic() + START_UP_S)
    is_ready: bool = False


def warm(jobs: Iterable[Job], settings: Settings, processes: int, ends: float = math.inf) -> dict[str, str]:
    """Run every job once, many at a time, for what it leaves in the caches on disk; no process is left behind.

    Both passes of a provider on a case run in one process, the jobs' order decides who comes first.

    Args:
        jobs: rows that will be measured; those that cannot run on this machine are passed over.
        settings: of the run.
        processes: how many at a time, all on the device of the run.
        ends: when to stop, by `time.monotonic()`.

    Returns:
        Why not, for each provider on a case that was not compiled, by `CASE PASS PROVIDER DTYPE`. It is compiled
        when it is measured.
    """
    units = deque(_units(jobs, torch.device(settings.device).type))
    hands: list[_Hand] = []
    failures: dict[str, str] = {}
    try:
        for _ in range(min(processes, len(units))):
            hands.append(_Hand(Worker(settings)))
        while hands and time.monotonic() < ends:
            first_end = min(ends, *(hand.until for hand in hands))
            timeout = max(0.0, min(first_end - time.monotonic(), 3600.0))
            ready = multiprocessing.connection.wait([hand.worker.connection for hand in hands], timeout)
            hands = [
                kept
                for hand in hands
                if (kept := _attend(hand, hand.worker.connection in ready, units, failures, settings))
            ]
    finally:
        for hand in hands:
            hand.worker.close()
    for unit in (*(hand.jobs for hand in hands), *units):
        failures |= {_name(job): "not reached" for job in unit}
    return failures


def _units(jobs: Iterable[Job], device_type: str) -> list[list[Job]]:
    """Jobs that share kernels."""
    units: dict[tuple, list[Job]] = {}
    for job in jobs:
        if device_type in job.provider.devices and job.provider.is_installed():
            units.setdefault((job.case, job.dtype, job.provider.name), []).append(job)
    return list(units.values())


def _attend(
    hand: _Hand, has_answered: bool, units: deque[list[Job]], failures: dict[str, str], settings: Settings
) -> _Hand | None:
    """Take a worker's answer and give it the next jobs; a new one in its place if it is lost, None at the end."""
    is_lost = False
    try:
        if has_answered:
            rows, is_lost = hand.worker.receive()
            hand.is_ready = True
            answers = zip(hand.jobs, rows, strict=True)
            failures |= {_name(job): row.status for job, row in answers if not row.status.startswith(HARMLESS)}
        elif time.monotonic() < hand.until:
            return hand
        else:
            is_lost = True
            failures |= {_name(job): "hung" for job in hand.jobs}
        if units and not is_lost:
            jobs = units.popleft()
            hand.jobs, hand.until = jobs, time.monotonic() + len(jobs) * settings.row_limit_s + GRACE_S
            hand.worker.send("compile", jobs, settings.row_limit_s)
            return hand
    except (EOFError, ConnectionError):
        failures |= {_name(job): hand.worker.death() for job in hand.jobs}
    hand.worker.close()
    # One that did not even start would not start again either.
    return _Hand(Worker(settings)) if units and hand.is_ready else None


def _name(job: Job) -> str:
    return " ".join(job.row("").key)
