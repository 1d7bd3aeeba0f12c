"""`run`: cases × dtypes × passes × providers, written down row by row."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from flashbias.bench.cases import Case, case_names, find_cases
from flashbias.bench.environment import describe_environment
from flashbias.bench.isolation import IsolatedTimer
from flashbias.bench.providers import FAMILIES, Provider, find_providers
from flashbias.bench.report import Row, read_rows, replace_file, write_rows
from flashbias.bench.rows import DTYPES, PASSES, Job, RowTimer, Settings
from flashbias.bench.warm import warm as warm_up

__all__ = ["run"]

Progress = Callable[[int, int, Row], None]


def run(
    cases: Iterable[str | Case] | None = None,
    passes: Iterable[str] = PASSES,
    providers: Iterable[str | Provider] = FAMILIES,
    dtypes: Iterable[str] = ("bfloat16",),
    out_dir: Path | str = "benchmark",
    progress: Progress | None = None,
    time_limit_s: float | None = None,
    isolate: bool = False,
    *,
    name: str = "bench",
    resume: bool = False,
    small: bool = False,
    device: str | None = None,
    seed: int = 0,
    budget_s: float = 0.4,
    min_repetitions: int = 10,
    row_limit_s: float = 90.0,
    commit: str | None = None,
    first: Iterable[str | Provider] = (),
    warm: int = 0,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Measure providers on cases; write `NAME.csv` and, beside it, the environment as `NAME.json`.

    For each row the provider's output, and gradients in `fwdbwd`, are compared with float64 first: a wrong
    result has no number. Then it is timed (see `measure`). Failures are results: `oom`, `unsupported: …`,
    `not installed`, `error: …`. Rows are on disk as soon as they are known, in `NAME.csv.part`, which becomes
    `NAME.csv` at the end.

    Args:
        cases: names of frozen cases, or cases; default all.
        passes: `fwd`, `fwdbwd`.
        providers: names, families (`ours`, `dense`, …), patterns (`*/flex`), or `Provider` objects.
        dtypes: `bfloat16`, `float16`, `float32`.
        out_dir: folder for the files; made if need be.
        progress: called after each row with the number of rows done, of all rows, and the row.
        time_limit_s: for the whole run; rows that do not fit are written as `skipped: time limit`.
        isolate: measure in a child process, so that a crash or a hang costs one row and not the run; the next one
            waits, already started. A script that asks for it must guard its own code with
            `if __name__ == "__main__"`.
        name: of the files.
        resume: keep the rows of an interrupted or shortened run in the same folder; measure what is missing.
        small: take the small version of every case.
        device: default `cuda` where there is one, else `cpu`.
        seed: of the inputs.
        budget_s: about how long to repeat each call, in seconds.
        min_repetitions: how often to repeat it at least.
        row_limit_s: for one row: compilation, agreement check and timing.
        commit: of the source, where git cannot be asked.
        first: providers, named as in `providers`, that are measured on all cases before the others: what matters if
            the time may run out. The order in the CSV stays.
        warm: processes that compile before anything is timed, for at most half of the time; 0: each row compiles when
            its turn comes. The guard that `isolate` needs is needed here too.
        say: called with a line on what was compiled, and on rows that did not fit.

    Returns:
        Path of the CSV.

    Raises:
        ValueError: an unknown case, pass, provider or dtype; a limit that is not positive; a negative number of
            processes; results to resume that were measured on another device, with another torch or seed.

    Examples:
        >>> import tempfile, flashbias.bench as bench
        >>> path = bench.run(["swin-49"], ["fwd"], ["ours/sdpa"], ["float32"], tempfile.mkdtemp(), small=True,
        ...                  device="cpu", budget_s=0.01)
        >>> path.read_text().splitlines()[1].startswith("swin-49@small,fwd,ours/sdpa,float32")
        True
    """
    began = time.monotonic()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    settings = Settings(
        device,
        seed,
        _positive("budget_s", budget_s),
        int(_positive("min_repetitions", min_repetitions)),
        _positive("row_limit_s", row_limit_s),
    )
    ends = math.inf if time_limit_s is None else began + _positive("time_limit_s", time_limit_s)
    if warm < 0:
        raise ValueError(f"warm must be a number of processes, 0 for none, got {warm}")
    early = {provider.name for provider in find_providers(first, torch.device(device).type)}
    chosen = find_providers(providers, torch.device(device).type)
    jobs = [
        Job(case, pass_name, provider, dtype)
        for case in find_cases(case_names() if cases is None else cases, small)
        for dtype in _known("dtype", dtypes, DTYPES)
        for pass_name in _known("pass", passes, PASSES)
        for provider in chosen
        if provider.applies(case, pass_name)
    ]
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    files = _Files(Path(out_dir), name)
    facts = {**describe_environment(torch.device(device), commit), "settings": asdict(settings)}
    rows = files.begin(facts, resume)
    turns = sorted(jobs, key=lambda job: job.provider.name not in early)
    missing = [job for job in turns if job.row("").key not in rows]
    say = say or _say_nothing
    if warm:
        facts["warm"] = _warm(missing, settings, warm, (time.monotonic() + ends) / 2, say)
    passes = {job.pass_name for job in missing}
    timer: _Timer = IsolatedTimer(settings, passes, ends) if isolate else RowTimer(settings, passes)
    try:
        for done, job in enumerate(turns, 1):
            row = rows.get(job.row("").key)
            if row is None:
                row = _measure(timer, job, settings.row_limit_s, ends)
                rows[row.key] = row
                files.add(row)
            if progress is not None:
                progress(done, len(jobs), row)
    finally:
        timer.close()
        files.close()
    if skipped := sum(not rows[job.row("").key].is_finished for job in jobs):
        say(f"{skipped} of {len(jobs)} rows did not fit {time_limit_s:g} s; resume goes on with them")
    return files.finish({**facts, "seconds": round(time.monotonic() - began, 1)}, jobs, rows)


def check_device(device: str) -> None:
    """Find out whether torch can measure there.

    Raises:
        ValueError: it is no such device, or there is no GPU of this number.
    """
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    count = torch.cuda.device_count()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        raise ValueError(f"device is {device!r}, but torch finds {count} GPUs")


def _say_nothing(line: str) -> None:
    pass


def _warm(jobs: list[Job], settings: Settings, processes: int, ends: float, say: Callable[[str], None]) -> dict:
    """Compile what the jobs need; return what there is to know about it for the JSON."""
    began = time.monotonic()
    failures = warm_up(jobs, settings, processes, ends)
    seconds = round(time.monotonic() - began, 1)
    say(f"rows have run once, {processes} at a time, after {seconds} s; {len(failures)} did not")
    for job, reason in failures.items():
        say(f"  {job}: {reason}")
    return {"processes": processes, "seconds": seconds, "failures": failures}


class _Timer(Protocol):
    def measure(self, job: Job, limit_s: float) -> Row: ...

    def close(self) -> None: ...


def _measure(timer: _Timer, job: Job, row_limit_s: float, ends: float) -> Row:
    """Measure a row within its own limit and what is left of the run's."""
    skipped = job.row("skipped: time limit")
    left = ends - time.monotonic()
    if left <= 0:
        return skipped
    row = timer.measure(job, min(row_limit_s, left))
    # A row that the end of the run cut short is no verdict on its provider.
    was_cut = time.monotonic() >= ends and row.status.startswith(("error: over the time", "error: hung"))
    return skipped if was_cut else row


def _known(kind: str, names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    allowed, names = list(allowed), list(names)
    for name in names:
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}; allowed are {', '.join(allowed)}")
    return names


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


# -------------------------------------------------------------------- files


class _Files:
    """The CSV as it grows, and the JSON beside it."""

    def __init__(self, folder: Path, name: str) -> None:
        if Path(name).name != name:
            raise ValueError(f"name must be that of a file, without a folder, got {name!r}")
        folder.mkdir(parents=True, exist_ok=True)
        self.csv, self.json = folder / f"{name}.csv", folder / f"{name}.json"
        self.part = folder / f"{name}.csv.part"
        self._open: Any = None

    def begin(self, facts: dict[str, Any], resume: bool) -> dict[tuple[str, ...], Row]:
        """Open the growing CSV; return the finished rows of an earlier run if it is to be resumed."""
        kept: list[Row] = []
        source = self.part if self.part.exists() else self.csv
        if resume and source.exists():
            self._check_same(facts)
            kept = [row for row in read_rows(source) if row.is_finished]
        write_rows(self.part, kept)
        self._open = self.part.open("a", newline="")
        self._write_json({**facts, "started": datetime.now(UTC).isoformat(timespec="seconds"), "finished": False})
        return {row.key: row for row in kept}

    def add(self, row: Row) -> None:
        """Put a row on disk at once."""
        csv.writer(self._open, lineterminator="\n").writerow(astuple(row))
        self._open.flush()

    def close(self) -> None:
        """Stop writing; after an interruption the rows stay in the `.part` file."""
        self._open.close()

    def finish(self, facts: dict[str, Any], jobs: list[Job], rows: dict[tuple[str, ...], Row]) -> Path:
        """Write the CSV in the order of the plan, rows of an earlier plan first, under its final name."""
        planned = [job.row("").key for job in jobs]
        earlier = [key for key in rows if key not in set(planned)]
        write_rows(self.csv, (rows[key] for key in (*earlier, *planned)))
        self.part.unlink()
        started = json.loads(self.json.read_text())["started"]
        self._write_json({**facts, "started": started, "finished": True})
        return self.csv

    def _check_same(self, facts: dict[str, Any]) -> None:
        """Rows of one file are compared with each other, so they must come from one machine and one seed."""
        if not self.json.exists():
            raise ValueError(f"cannot resume: {self.json}, which says where the rows were measured, is missing")
        old = json.loads(self.json.read_text())
        for what, before, now in (
            ("device", old["device"], facts["device"]),
            ("torch", old["packages"]["torch"], facts["packages"]["torch"]),
            ("seed", old["settings"]["seed"], facts["settings"]["seed"]),
        ):
            if before != now:
                raise ValueError(f"cannot resume {self.csv}: it was measured with {what} {before!r}, now {now!r}")

    def _write_json(self, facts: dict[str, Any]) -> None:
        replace_file(self.json, json.dumps(facts, indent=2, default=str) + "\n")
