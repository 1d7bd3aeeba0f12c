"""The experiment: both methods on more and more copies of the protein, until memory or time ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashbias.demo.measure import STAGES, Job, Measurement, OutOfMemory, free_memory, measure
from flashbias.demo.problem import METHODS
from flashbias.demo.protein import MAX_COPIES, NUM_RESIDUES

__all__ = ["Settings", "run"]

GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """What the experiment is run with.

    Args:
        copies: the largest number of copies of the protein; sizes double up to it.
        num_heads: attention heads, each with a learned weight.
        head_dim: width of queries, keys and values.
        device: "cpu", "cuda", or "auto" for the GPU if there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        seconds: a measurement that is not expected to end within this time of the start is not begun.
        seed: of queries, keys and values.

    Raises:
        ValueError: a value that cannot be used; the message names it.
    """

    copies: int = 32
    num_heads: int = 4
    head_dim: int = 32
    device: str = "auto"
    dtype: str = "auto"
    seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value, and settle what is "auto"."""
        if not 1 <= self.copies <= MAX_COPIES:
            raise ValueError(f"copies must lie in 1 … {MAX_COPIES}, got {self.copies}")
        if not 1 <= self.num_heads <= 64:
            raise ValueError(f"num_heads must lie in 1 … 64, got {self.num_heads}")
        if not 8 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must lie in 8 … 256, got {self.head_dim}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        has_gpu = torch.cuda.is_available()
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if has_gpu else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {self.device!r}")
        if self.device == "cuda" and not has_gpu:
            raise ValueError("device is 'cuda', but torch finds no GPU; 'cpu' can be used")
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", "bfloat16" if self.device == "cuda" else "float32")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {self.dtype!r}")

    @property
    def sizes(self) -> list[int]:
        """Copies of the protein: 1, 2, 4, … up to `copies`."""
        return [2**n for n in range(self.copies.bit_length())]

    def describe(self) -> str:
        """What the numbers were measured on, in one line."""
        where = f"CPU, {torch.get_num_threads()} threads"
        if self.device == "cuda":
            where = torch.cuda.get_device_name()
        return f"{where}, {self.dtype}, {self.num_heads} heads x {self.head_dim}, torch {torch.__version__}"


def run(settings: Settings, progress: Callable[[int, int, str], None] | None = None) -> list[Measurement]:
    """Measure both methods at every size.

    A size that cannot fit into memory is a result: its rows say how much it would need, by the growth of the
    last size that ran.

    Args:
        settings: sizes, device and so on.
        progress: called with (done, total, what is next) before each measurement.

    Returns:
        The rows, by size, then method (factored first), then stage.

    Raises:
        RuntimeError: a measurement failed for another reason than memory.
    """
    # The dense method last: it may use up what time is left.
    jobs = [(copies, method) for copies in settings.sizes for method in reversed(METHODS)]
    rows: list[Measurement] = []
    last: dict[str, _Cost] = {}
    start = time.perf_counter()
    for done, (copies, method) in enumerate(jobs):
        residues = copies * NUM_RESIDUES
        if progress is not None:
            progress(done, len(jobs), f"{method}, {residues:,} residues")
        left = settings.seconds - (time.perf_counter() - start)
        cost = _Cost(copies, 0.0, 0.0) if method not in last else last[method].at(copies)
        obstacle = _obstacle(cost, left, free_memory(settings.device))
        if obstacle is None:
            try:
                measured = measure(_job(settings, copies, method))
            except OutOfMemory:
                obstacle = f"out of memory: needs {cost.peak / GIB:.1f} GiB or more"
            else:
                rows += measured
                last[method] = _Cost.of(copies, measured)
        if obstacle is not None:
            rows += [Measurement(residues, method, stage, None, None, None, obstacle) for stage in STAGES]
    if progress is not None:
        progress(len(jobs), len(jobs), "done")
    return rows


def _job(settings: Settings, copies: int, method: str) -> Job:
    return Job(method, copies, settings.num_heads, settings.head_dim, settings.device, settings.dtype, settings.seed)


@dataclass(frozen=True)
class _Cost:
    """Bytes and seconds of a method at a size."""

    copies: int
    peak: float
    seconds: float

    @classmethod
    def of(cls, copies: int, measured: list[Measurement]) -> _Cost:
        """What one run of every stage took."""
        peak = max(row.peak_mib or 0.0 for row in measured) * 2**20
        return cls(copies, peak, sum(row.median_ms or 0.0 for row in measured) / 1000)

    def at(self, copies: int) -> _Cost:
        """What another size would cost: time grows with the square of the size, and so does a dense bias."""
        growth = (copies / self.copies) ** 2
        return _Cost(copies, self.peak * growth, self.seconds * growth)


def _obstacle(cost: _Cost, seconds_left: float, free: int) -> str | None:
    """Why a measurement of this expected cost is not begun, None if it is."""
    if cost.peak > free:
        return f"out of memory: would need {cost.peak / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
    if cost.seconds > seconds_left:
        return f"not begun: would take about {cost.seconds:.0f} s, {max(seconds_left, 0):.0f} s are left"
    return None
