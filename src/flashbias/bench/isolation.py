"""Measuring in a process of its own, so that a crash costs one row; the next process waits, already started."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Collection, Sequence
from multiprocessing.connection import Connection
from typing import Literal

import torch

from flashbias.bench.providers import registry
from flashbias.bench.report import Row
from flashbias.bench.rows import Job, RowTimer, Settings

__all__ = ["GRACE_S", "START_UP_S", "IsolatedTimer", "Worker"]

START_UP_S = 60.0  # importing torch
GRACE_S = 15.0  # a row over its limit ends by itself in this time, unless it hangs within one kernel
LAST_GRACE_S = 1.0  # the same at the end of the run's time

# One kernel is compiled at a time in each process, and what it gives is left to the processes that come after.
COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}

Task = Literal["measure", "compile"]


class Worker:
    """A child process with a `RowTimer`. It does not touch the GPU before it is given something to do.

    It says once that it is ready, with no rows, and then answers each message with the rows it was asked for.

    Args:
        settings: of the run.
        passes: see `RowTimer`.

    Attributes:
        connection: readable when there is something to receive, or nothing ever again.
    """

    def __init__(self, settings: Settings, passes: Collection[str] = ()) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, tuple(passes)), daemon=False)
        self._process.start()
        theirs.close()

    def send(self, task: Task, jobs: Sequence[Job], limit_s: float) -> None:
        """Ask for one row after the other, each within `limit_s` seconds.

        Raises:
            ConnectionError: the process has died.
        """
        self.connection.send((task, [_portable(job) for job in jobs], limit_s))

    def receive(self) -> tuple[list[Row], bool]:
        """The rows, and whether the process is of no use any more; waits for them.

        Raises:
            EOFError: the process has died.
            ConnectionError: the same.
        """
        return self.connection.recv()

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def death(self) -> str:
        """Status of a row in which the process died."""
        self._process.join(GRACE_S)
        code = self._process.exitcode
        return f"error: process died ({f'signal {-code}' if code is not None and code < 0 else f'exit status {code}'})"

    def close(self) -> None:
        """End the process, whatever it does; its memory on the GPU is free afterwards."""
        self.connection.close()
        self._process.kill()
        self._process.join()


class IsolatedTimer:
    """Measures rows in a child process, which lives until a row ends it; a spare one takes its place at once.

    Only one of them ever works on the GPU: the spare has imported what it needs, waits, and makes its CUDA context
    when the other process is gone.

    Args:
        settings: of the run.
        passes: see `RowTimer`.
        ends: when the run must end, by `time.monotonic()`.
    """

    def __init__(self, settings: Settings, passes: Collection[str] = (), ends: float = math.inf) -> None:
        self.settings = settings
        self.passes = passes
        self.ends = ends
        self._worker: Worker | None = None
        self._is_ready = False
        self._spare: Worker | None = None

    def measure(self, job: Job, limit_s: float) -> Row:
        """Measure one row; if the child dies of it or does not come back, say so in the row.

        Args:
            job: what to measure.
            limit_s: how long it may take.
        """
        if self._worker is not None and not self._worker.is_alive():
            self._stop_worker()  # it has died since its last row, which is not this one's fault
        if self._spare is not None and not self._spare.is_alive():
            self._spare.close()  # nor is it that a spare has died while it waited
            self._spare = None
        worker = self._worker = self._worker or self._spare or self._new()
        if worker is self._spare:
            self._spare = None
        try:
            if not self._is_ready:
                if not self._answers(worker, START_UP_S):
                    return self._give_up(job.row(f"error: hung, not ready after {START_UP_S:.0f} s"))
                worker.receive()
                self._is_ready = True
            self._spare = self._spare or self._new()
            worker.send("measure", [job], limit_s)
            if not self._answers(worker, limit_s + GRACE_S):
                return self._give_up(job.row(f"error: hung, stopped after {limit_s + GRACE_S:.0f} s"))
            (row,), is_lost = worker.receive()
        except (EOFError, ConnectionError):
            return self._give_up(job.row(worker.death()))
        return self._give_up(row) if is_lost else row

    def close(self) -> None:
        """Stop the children, if there are any."""
        self._stop_worker()
        if self._spare is not None:
            self._spare.close()
        self._spare = None

    def _new(self) -> Worker:
        return Worker(self.settings, self.passes)

    def _answers(self, worker: Worker, patience_s: float) -> bool:
        """Wait for a worker, not beyond the end of the run."""
        left = self.ends - time.monotonic() + LAST_GRACE_S
        return worker.connection.poll(max(0.0, min(patience_s, left)))

    def _give_up(self, row: Row) -> Row:
        """The worker is of no use any more: the next row is the spare's."""
        self._stop_worker()
        return row

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker, self._is_ready = None, False


def _portable(job: Job) -> tuple:
    """A job that can be sent: a registered provider goes by its name."""
    known = registry().get(job.provider.name) is job.provider
    return job.case, job.pass_name, job.provider.name if known else job.provider, job.dtype


def _job(case, pass_name, provider, dtype) -> Job:
    return Job(case, pass_name, registry()[provider] if isinstance(provider, str) else provider, dtype)


def _serve(connection: Connection, settings: Settings, passes: tuple[str, ...]) -> None:
    """Do what is asked for until the other side hangs up."""
    for name, value in COMPILERS.items():
        os.environ.setdefault(name, value)
    device = torch.device(settings.device)
    timer = RowTimer(settings, passes)
    try:
        connection.send(([], False))
        while True:
            task, jobs, limit_s = connection.recv()
            if device.type == "cuda":
                torch.cuda.set_device(device)  # not before: a spare must leave the GPU alone
            rows = [getattr(timer, task)(_job(*job), limit_s) for job in jobs]
            connection.send((rows, timer.lost is not None))
    except (EOFError, ConnectionError):  # nobody is there any more
        return
