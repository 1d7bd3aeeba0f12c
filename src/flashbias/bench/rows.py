"""One row of a run: prepare a provider, check that it agrees, time it, turn every failure into a status."""

from __future__ import annotations

import contextlib
import gc
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch

from flashbias.bench.agreement import TOLERANCE, Reference, max_rel_error
from flashbias.bench.cases import Case, Inputs
from flashbias.bench.measure import MIB, let_go, measure
from flashbias.bench.peers import Unsupported
from flashbias.bench.providers import Provider
from flashbias.bench.report import Row

__all__ = ["DTYPES", "PASSES", "Job", "RowTimer", "Settings"]

PASSES = ("fwd", "fwdbwd")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

REASON_LENGTH = 140
KEPT_SHARE = 1 / 8  # of a GPU's memory, for inputs and references of cases whose turn may come again


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


@dataclass
class _Kept:
    """A case's inputs, and its references by (biased, grads)."""

    inputs: Inputs
    references: dict[tuple[bool, bool], Reference] = field(default_factory=dict)


class RowTimer:
    """Measures rows in this process.

    Inputs and references are computed once and serve all providers. On a GPU those of earlier cases are kept as long
    as they take little of its memory, on a CPU those of the last case.

    Args:
        settings: of the run.
        passes: of the run; if `fwdbwd` is among them, a reference has gradients from the start and serves both.

    Attributes:
        lost: why no further row can be measured in this process (a CUDA context does not recover from an
            illegal access), or None.
    """

    def __init__(self, settings: Settings, passes: Collection[str] = ()) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.lost: str | None = None
        self._with_gradients = "fwdbwd" in passes
        self._kept: dict[tuple[Case, str], _Kept] = {}

    def measure(self, job: Job, limit_s: float) -> Row:
        """Measure one row. Whatever a provider does, a row comes back; only an interruption passes through.

        Args:
            job: what to measure.
            limit_s: how long it may take, everything included.
        """
        ends = time.monotonic() + limit_s
        row = self._guarded(self._measure, job, limit_s)
        if row.status == "oom" and len(self._kept) > 1 and not self.lost:
            self.close()  # what other cases have kept may have been in the way
            gc.collect()
            row = self._guarded(self._measure, job, ends - time.monotonic())
        return row

    def compile(self, job: Job, limit_s: float) -> Row:
        """Run a provider once, for what compilers leave in their caches; the row has no number.

        Args:
            job: what to run.
            limit_s: how long it may take.
        """
        if (job.case, job.dtype) not in self._kept:
            self._forget()  # many processes share the device now
        return self._guarded(self._compile, job, limit_s)

    def close(self) -> None:
        """Let go of inputs and references, and of what earlier rows may have left in cycles."""
        gc.unfreeze()
        self._forget()

    def _forget(self) -> None:
        self._kept.clear()
        if self.device.type == "cuda" and not self.lost:
            torch.cuda.empty_cache()

    def _guarded(self, action: Callable[[Job], Row], job: Job, limit_s: float) -> Row:
        """Turn whatever happens into a row, and leave nothing behind in memory."""
        if self.lost:
            return job.row(f"error: device lost earlier: {self.lost}")
        if self.device.type not in job.provider.devices:
            return job.row(f"unsupported: does not run on {self.device.type}")
        if not job.provider.is_installed():
            return job.row("not installed")
        try:
            with _time_limit(limit_s):
                return action(job)
        except OverTime:
            return job.row(f"error: over the time limit of {limit_s:.3g} s")
        except Exception as error:  # a peer may raise anything; the row says what
            return job.row(_status(error))
        finally:
            self._clean_up(job)

    def _compile(self, job: Job) -> Row:
        grads = job.pass_name == "fwdbwd"
        job.provider.prepare(self._case(job).inputs, grads).run(grads)
        return job.row("ok")

    def _measure(self, job: Job) -> Row:
        grads = job.pass_name == "fwdbwd"
        case = self._case(job)
        inputs, reference = case.inputs, self._reference(case, job.provider.biased, grads)
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

    def _case(self, job: Job) -> _Kept:
        """Inputs are drawn once for all rows of a case."""
        key = (job.case, job.dtype)
        if key not in self._kept:
            while self._kept and self._kept_share() > KEPT_SHARE:
                del self._kept[next(iter(self._kept))]  # the oldest, before the next case is drawn
            self._kept[key] = _Kept(job.case.inputs(DTYPES[job.dtype], self.device, self.settings.seed))
        return self._kept[key]

    def _kept_share(self) -> float:
        """Share of the device's memory that is in use between rows; a CPU's is not this process's to fill."""
        if self.device.type != "cuda":
            return 1.0
        return torch.cuda.memory_allocated(self.device) / torch.cuda.get_device_properties(self.device).total_memory

    def _reference(self, case: _Kept, biased: bool, grads: bool) -> Reference:
        """The reference with gradients serves both passes, so it is looked for first."""
        for key in ((biased, True), (biased, grads)):
            if key in case.references:
                return case.references[key]
        grads = grads or self._with_gradients
        case.references[biased, grads] = Reference.compute(case.inputs, biased=biased, grads=grads)
        return case.references[biased, grads]

    def _clean_up(self, job: Job) -> None:
        """Free what the provider held; find out whether the device still answers."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        let_go()
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
