"""One row of a run: prepare a provider, check that it agrees, time it, turn every failure into a status."""

from __future__ import annotations

import contextlib
import gc
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashbias.bench.agreement import TOLERANCE, Reference, max_rel_error
from flashbias.bench.cases import Case, Inputs
from flashbias.bench.measure import MIB, measure
from flashbias.bench.peers import Unsupported
from flashbias.bench.providers import Provider
from flashbias.bench.report import Row

__all__ = ["DTYPES", "PASSES", "Job", "RowTimer", "Settings"]

PASSES = ("fwd", "fwdbwd")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

REASON_LENGTH = 140


@dataclass(frozen=True)
class Settings:
    """What is the same for every row of a run; see `run`."""

    device: str
    seed: int
    budget_s: float
    min_repetitions: int
    row_limit_s: float


@dataclass(frozen=True)
class Job:
    """A row that is still to be measured."""

    case: Case
    pass_name: str
    provider: Provider
    dtype: str

    def row(self, status: str, **numbers: str) -> Row:
        """The row with its status, and numbers if there are any."""
        return Row(self.case.name, self.pass_name, self.provider.name, self.dtype, status=status, **numbers)


class OverTime(BaseException):
    """A row has used up its time. Not an `Exception`, so that no autotuner takes it for one of its own."""


class RowTimer:
    """Measures rows in this process. Inputs and references are kept for as long as the case stays the same.

    Args:
        settings: of the run.

    Attributes:
        lost: why no further row can be measured in this process (a CUDA context does not recover from an
            illegal access), or None.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.lost: str | None = None
        self._inputs: tuple[tuple[Case, str], Inputs] | None = None
        self._references: dict[tuple[bool, bool], Reference] = {}

    def measure(self, job: Job, limit_s: float) -> Row:
        """Measure one row. Whatever a provider does, a row comes back; only an interruption passes through.

        Args:
            job: what to measure.
            limit_s: how long it may take, everything included.
        """
        if self.lost:
            return job.row(f"error: device lost earlier: {self.lost}")
        if self.device.type not in job.provider.devices:
            return job.row(f"unsupported: does not run on {self.device.type}")
        if not job.provider.is_installed():
            return job.row("not installed")
        try:
            with _time_limit(limit_s):
                return self._measure(job)
        except OverTime:
            return job.row(f"error: over the time limit of {limit_s:.3g} s")
        except Exception as error:  # a peer may raise anything; the row says what
            return job.row(_status(error))
        finally:
            self._clean_up(job)

    def close(self) -> None:
        """Let go of inputs and references."""
        self._inputs = None
        self._references.clear()

    def _measure(self, job: Job) -> Row:
        grads = job.pass_name == "fwdbwd"
        inputs = self._inputs_of(job)
        reference = self._reference(inputs, job.provider.biased, grads)
        prepared = job.provider.prepare(inputs, grads)
        _poison(inputs)
        error = max_rel_error(prepared.named(prepared.run(grads)), reference)
        shown_error = f"{error:.2e}"
        if not error <= TOLERANCE[DTYPES[job.dtype]]:
            return job.row("wrong", max_rel_error=shown_error)
        found = measure(
            lambda: prepared.run(grads),
            self.device,
            budget_s=self.settings.budget_s,
            min_repetitions=self.settings.min_repetitions,
        )
        peak = "" if found.peak_mib is None else f"{found.peak_mib + prepared.matrix_bytes / MIB:.1f}"
        return job.row(
            "ok",
            median_ms=f"{found.median_ms:.4f}",
            p10_ms=f"{found.p10_ms:.4f}",
            p90_ms=f"{found.p90_ms:.4f}",
            peak_mib=peak,
            max_rel_error=shown_error,
        )

    def _inputs_of(self, job: Job) -> Inputs:
        key = (job.case, job.dtype)
        if self._inputs is None or self._inputs[0] != key:
            self.close()  # before the next case is drawn
            self._inputs = (key, job.case.inputs(DTYPES[job.dtype], self.device, self.settings.seed))
        return self._inputs[1]

    def _reference(self, inputs: Inputs, biased: bool, grads: bool) -> Reference:
        """The reference with gradients serves both passes, so it is looked for first."""
        for key in ((biased, True), (biased, grads)):
            if key in self._references:
                return self._references[key]
        self._references[biased, grads] = Reference.compute(inputs, biased=biased, grads=grads)
        return self._references[biased, grads]

    def _clean_up(self, job: Job) -> None:
        """Free what the provider held; find out whether the device still answers."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:  # the context is gone: every later call would raise the same
            self.lost = f"{job.provider.name} on {job.case.name}: {_first_line(error)}"


def _poison(inputs: Inputs) -> None:
    """Leave NaN in the memory that outputs will be given, so that what is not written cannot look right."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.dout, inputs.phi_q, inputs.phi_k)
    blocks = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    del blocks


# -------------------------------------------------------------------- failures


def _status(error: Exception) -> str:
    """Name a failure: out of memory and unsupported are results, the rest is an error."""
    root: BaseException = error
    while root.__cause__ is not None:  # compilers wrap what a kernel has to say
        root = root.__cause__
    text = f"{error}\n{root}"
    if isinstance(root, (torch.OutOfMemoryError, MemoryError)) or _OUT_OF_MEMORY.search(text):
        return "oom"
    if isinstance(root, (Unsupported, NotImplementedError)) or _UNSUPPORTED.search(text):
        return f"unsupported: {_first_line(root)}"
    return f"error: {type(root).__name__}: {_first_line(root)}"


_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CUDA_ERROR_OUT_OF_MEMORY", re.IGNORECASE)
_UNSUPPORTED = re.compile(r"No available kernel|is not supported|not supported by|NYI|cannot be used", re.IGNORECASE)


def _first_line(error: BaseException) -> str:
    """The first line of a message that says something, short enough for a table."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 1] + "…"


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `OverTime` in the main thread after `seconds`; elsewhere, and without SIGALRM, there is no limit.

    It comes when the interpreter next runs: between the steps of a compilation or of an autotuner, not within
    one kernel.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise OverTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
