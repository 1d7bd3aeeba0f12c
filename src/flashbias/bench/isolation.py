"""Measuring in a process of its own, so that a crash costs one row."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from flashbias.bench.providers import registry
from flashbias.bench.report import Row
from flashbias.bench.rows import Job, RowTimer, Settings

__all__ = ["IsolatedTimer"]

START_UP_S = 60.0  # importing torch and making a CUDA context
GRACE_S = 15.0  # a row over its limit ends by itself in this time, unless it hangs within one kernel


class IsolatedTimer:
    """Measures rows in a child process, which lives until a row ends it and is then started anew.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._child: BaseProcess | None = None
        self._connection: Connection | None = None

    def measure(self, job: Job, limit_s: float) -> Row:
        """Measure one row; if the child dies of it or does not come back, say so in the row.

        Args:
            job: what to measure.
            limit_s: how long it may take.
        """
        is_new = self._child is None or not self._child.is_alive()
        connection = self._start() if is_new else self._connection
        assert connection is not None
        patience = limit_s + GRACE_S + (START_UP_S if is_new else 0.0)
        try:
            connection.send((_portable(job), limit_s))
            if connection.poll(patience):
                row, lost = connection.recv()
                if lost:
                    self.close()
                return row
        except (EOFError, ConnectionError):
            return job.row(f"error: process died ({self._exit_reason()})")
        self.close()
        return job.row(f"error: hung, stopped after {patience:.0f} s")

    def close(self) -> None:
        """Stop the child, if there is one."""
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.join()
        self._child = self._connection = None

    def _start(self) -> Connection:
        self.close()
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self.settings), daemon=False)
        self._child.start()
        theirs.close()
        return self._connection

    def _exit_reason(self) -> str:
        child = self._child
        if child is None:
            return "no process"
        child.join(GRACE_S)
        code = child.exitcode
        self.close()
        return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"


def _portable(job: Job) -> tuple:
    """A job that can be sent: a registered provider goes by its name."""
    known = registry().get(job.provider.name) is job.provider
    return job.case, job.pass_name, job.provider.name if known else job.provider, job.dtype


def _serve(connection: Connection, settings: Settings) -> None:
    """Measure what is asked for until the other side hangs up."""
    timer = RowTimer(settings)
    while True:
        try:
            (case, pass_name, provider, dtype), limit_s = connection.recv()
        except EOFError:
            return
        if isinstance(provider, str):
            provider = registry()[provider]
        row = timer.measure(Job(case, pass_name, provider, dtype), limit_s)
        connection.send((row, timer.lost is not None))
