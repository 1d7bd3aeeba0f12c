"""One measurement: a method at a size, in a process of its own.

A process of its own has a peak of memory of its own, and if it runs out of memory, that is a result and not
the end. Peak memory is what a stage needs beyond its inputs: on a CPU the growth of the process' largest
resident set (everything counts, also what the allocator keeps), on a GPU what torch has allocated. Neither
ever falls, so the stages go from small to large: a training step contains a forward pass.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from flashbias.demo.problem import METHODS, Problem, forward, make_problem, tiny, training_step, truth

__all__ = ["STAGES", "Job", "Measurement", "measure"]

Stage = Callable[[Problem, Callable[[Problem], Tensor]], tuple[Tensor, ...]]

STAGES: dict[str, Stage] = {"forward": forward, "training step": training_step}

MIB = 2**20

REPEATS = 5
"""Timed runs; fewer once they have taken `ENOUGH_SECONDS`."""

ENOUGH_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What to measure.

    Args:
        method: a name of `METHODS`.
        copies: copies of the protein.
        num_heads: H.
        head_dim: width of queries, keys and values.
        device: "cpu" or "cuda".
        dtype: name of queries', keys' and values' dtype.
        seed: of the random inputs.
    """

    method: str
    copies: int
    num_heads: int
    head_dim: int
    device: str
    dtype: str
    seed: int


@dataclass(frozen=True)
class Measurement:
    """One row of the result.

    Args:
        residues: N.
        method: "dense" or "factored".
        stage: "forward" or "training step".
        median_ms: time of one run, None if there was none.
        peak_mib: memory beyond the inputs.
        error: largest error against float64, relative to the largest true value; of the output, or of the
            worst gradient.
        status: "ok", or why there are no numbers.
    """

    residues: int
    method: str
    stage: str
    median_ms: float | None
    peak_mib: float | None
    error: float | None
    status: str = "ok"


class OutOfMemory(RuntimeError):
    """The process of a measurement ran out of memory."""


def measure(job: Job) -> list[Measurement]:
    """Run a job in a process of its own.

    Args:
        job: what to measure.

    Returns:
        One measurement for each stage.

    Raises:
        OutOfMemory: it did not fit.
        RuntimeError: it failed otherwise; the message is the child's.
    """
    # A fork server has torch loaded but has never used it, so that each child starts at once and clean.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flashbias.demo.measure"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, job, free_memory(job.device)), daemon=True)
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:  # killed: the kernel does that to what takes too much memory
        raise OutOfMemory(f"the process was killed ({job})") from None
    finally:
        child.kill()  # it has answered, or nobody waits for it any more
        child.join()
        receiver.close()
    if isinstance(answer, OutOfMemory):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"{job} failed: {answer}")
    return answer


def free_memory(device: str) -> int:
    """Return the bytes that a new process could have.

    Args:
        device: "cpu" or "cuda".

    Returns:
        Free memory of the GPU, or of the machine and of the container that this runs in, whichever is less.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


# ---------------------------------------------------------------- in the child


def _child(sender: Connection, job: Job, free: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and ends its children
    try:
        sender.send(_measure(job, free))
    except (torch.OutOfMemoryError, MemoryError) as error:
        sender.send(OutOfMemory(str(error)))
    except RuntimeError as error:
        ran_out = "can't allocate memory" in str(error)  # what torch says on a CPU, in no class of its own
        sender.send(OutOfMemory(str(error)) if ran_out else f"{type(error).__name__}: {error}")
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _measure(job: Job, free: int) -> list[Measurement]:
    device = torch.device(job.device)
    dtype = getattr(torch, job.dtype)
    problem = make_problem(job.copies, job.num_heads, job.head_dim, device, dtype, job.seed)
    method = METHODS[job.method]
    for stage in STAGES.values():
        stage(tiny(problem), method)
    if device.type == "cpu":
        _limit_memory(free)
    inputs = _start_peak(device)
    taken = {name: _run(stage, problem, method) for name, stage in STAGES.items()}
    rows = []
    for (name, (seconds, peak, found)), true in zip(taken.items(), truth(problem), strict=True):
        error = max(_relative_error(x, t) for x, t in zip(found, true, strict=True))
        residues = problem.coordinates.shape[0]
        rows.append(Measurement(residues, job.method, name, 1e3 * seconds, (peak - inputs) / MIB, error))
    return rows


def _run(stage: Stage, problem: Problem, method: Callable[[Problem], Tensor]) -> tuple[float, int, tuple[Tensor, ...]]:
    """Median seconds, highest use of memory so far, and the results of the first run."""
    seconds, results = _timed(stage, problem, method)
    peak = _peak(problem.query.device)
    times = [seconds]
    if seconds < ENOUGH_SECONDS:  # a short first run is not warm yet: it counts for memory alone
        times = []
        while len(times) < REPEATS and sum(times) < ENOUGH_SECONDS:
            times.append(_timed(stage, problem, method)[0])
    return statistics.median(times), peak, results


def _timed(stage: Stage, problem: Problem, method: Callable[[Problem], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    _wait(problem.query.device)
    start = time.perf_counter()
    results = stage(problem, method)
    _wait(problem.query.device)
    return time.perf_counter() - start, results


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory(free: int) -> None:
    """Make what asks for more than `free` bytes fail, rather than drive the machine into the ground."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + free
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _relative_error(found: Tensor, true: Tensor) -> float:
    return float((found.cpu().double() - true).abs().max() / true.abs().max())
