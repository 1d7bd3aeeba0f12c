"""One run: every problem by one GPU and by all ranks, a row for each pass, written at once."""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
from benchmarks.distributed.clock import agreed, over_ranks, timed, which_ran
from benchmarks.distributed.problem import ALONE, Part, Way, relative_error, sample, theory, ways, work
from benchmarks.record import Row, read, say, write
from torch import Tensor

import flashbias.distributed as cp
from flashbias.bench.cases import Case
from flashbias.bench.measure import peak_mib
from flashbias.distributed.errors import RankError
from flashbias.distributed.simulate import LARGEST_MESSAGE, measure_link

__all__ = ["NAME", "Run"]

NAME = "distributed"
SAMPLED = 96
"""Rows of each tensor that are compared."""

AGREES = 2e-2
"""Five roundings to bfloat16: what two ways may differ by that round each block, or the whole, once."""

PASSES = ("fwd", "fwdbwd")
COMPILING = 10.0
"""Seconds that a new length may cost beyond its passes, each of which runs twice at least."""

COLUMNS = (
    "case", "n", "strategy", "order", "cp_size", "pass", "ms", "repeats", "efficiency", "peak_mib", "sent_mb",
    "theory_mb", "bias_share", "bias_share_theory", "error", "impl", "dense_bias_gb", "status",
)  # fmt: skip


class Run:
    """One run on this rank: what it has found so far, and how much time is left."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.began = time.perf_counter()
        self.left_out: list[str] = []
        self.rows, self.summary = self._earlier()
        self.pace: dict[str, float] = {}
        dist.barrier()  # nobody writes before all have read

    def _earlier(self) -> tuple[list[Row], dict[str, object]]:
        """Rows of an earlier run with as many ranks, if it stands in the same place."""
        rows, about = read(self.arguments.out, NAME)
        if about and about["summary"]["gpus"] != self.size:
            raise ValueError(
                f"{self.arguments.out} has a run of {about['summary']['gpus']} ranks, this has {self.size}"
            )
        return rows, about.get("summary", {}) | {"gpus": self.size, "left_out": self.left_out}

    @property
    def spent(self) -> float:
        """Seconds since the run began, as rank 0 counts them."""
        return agreed(time.perf_counter() - self.began, self.device)

    def say(self, text: str) -> None:
        """Tell the user how far things are."""
        if self.rank == 0:
            say(f"[{time.perf_counter() - self.began:6.1f} s] {text}")

    def write(self) -> None:
        """Write everything so far."""
        if self.rank == 0 and self.rows:
            write(self.arguments, self.rows, self.summary)

    def link(self) -> None:
        """Measure what a hop costs."""
        if self.size == 1 or "link" in self.summary:
            return
        top = 1 << 22 if self.arguments.small else LARGEST_MESSAGE
        try:
            found = measure_link(sizes=[top >> 12, top >> 8, top >> 4, top >> 2, top], device=self.device)
        except RankError:
            raise
        except RuntimeError as error:  # on all ranks alike; the problems are measured all the same
            self.say(f"no link: {error}")
            return
        self.summary["link"] = {"alpha_s": found.alpha, "beta_bytes_per_s": found.beta}
        self.say(f"a hop takes {1e6 * found.alpha:.1f} us + bytes / {found.beta / 1e9:.1f} GB/s")

    def point(self, case: Case) -> None:
        """Measure a problem by one GPU and by every way that ranks share it."""
        what = f"{case.name} with {case.seqlen:,} tokens"
        there = self._rows_of(case)
        if len(there) == len(PASSES) * (1 + len(ways(case, self.size))):
            self.say(f"{what} stands there already")
            self._keep_pace(case)
            return
        spent, expected = self.spent, COMPILING + 2 * self.pace.get(case.bias, 0.0) * work(case)
        if spent + expected > self.arguments.seconds:
            left = self.arguments.seconds - spent
            self.say(f"left out: {what}, which would take {expected:.0f} s; {left:.0f} s are left")
            self.left_out.append(f"{case.name} {case.seqlen}")
            self.write()
            return
        self.rows = [row for row in self.rows if row not in there]  # cut short: once more
        self.say(f"{what}: {len(ways(case, self.size)) + 1} ways, expected {expected:.0f} s")
        chosen = sample(case.seqlen, SAMPLED, self.device)
        right, alone = self._alone(case, chosen)
        dist.barrier()
        for way in ways(case, self.size):
            self._shared(case, way, chosen, right, alone)
        self._keep_pace(case)

    def _rows_of(self, case: Case) -> list[Row]:
        return [row for row in self.rows if (row["case"], int(str(row["n"]))) == (case.name, case.seqlen)]

    def _keep_pace(self, case: Case) -> None:
        """Remember how long a problem has taken, for those of its kind that are longer."""
        milliseconds = sum(float(str(row["ms"] or 0)) for row in self._rows_of(case))
        self.pace[case.bias] = agreed(milliseconds / 1000, self.device) / work(case)

    def _alone(self, case: Case, chosen: Tensor) -> tuple[list[Tensor], dict[str, float]]:
        """Rank 0 by itself: rows to compare with, and its times, which all ranks are told."""
        right: list[Tensor] = []
        times: dict[str, float] = dict.fromkeys(PASSES, 0.0)
        if self.rank == 0:
            part = Part(case, ALONE, 1, 0, self.device, self.dtype)
            impl = part.explained()
            for name, call in part.passes().items():
                with peak_mib(self.device) as peak:
                    found = call()
                right = [part.rows(x, chosen) for x in found.values()]  # of the last pass: output and gradients
                del found
                result = timed(call, self.device, self.arguments.repeat, is_alone=True)
                times[name] = result.ms
                self._add(
                    case,
                    ALONE,
                    1,
                    name,
                    ms=result.ms,
                    repeats=result.repeats,
                    peak_mib=peak[0] if peak else "",
                    impl=impl,
                )
            self._free()
        return right, {name: agreed(ms, self.device) for name, ms in times.items()}

    def _shared(self, case: Case, way: Way, chosen: Tensor, right: list[Tensor], alone: dict[str, float]) -> None:
        """All ranks together. The first call of each pass compiles, is compared and counted; the others are timed."""
        part = Part(case, way, self.size, self.rank, self.device, self.dtype)
        for name, call in part.passes().items():
            with peak_mib(self.device) as peak, cp.count_traffic() as traffic, which_ran() as impls:
                found = call()
            rows = [part.rows(x, chosen) for x in found.values()]
            del found
            for x in rows:
                dist.all_reduce(x)
            # A NaN is no maximum: it fails the comparison below.
            error = agreed(relative_error(rows, right[: len(rows)]) if self.rank == 0 else 0.0, self.device)
            sent = over_ranks(traffic.total, self.device, dist.ReduceOp.SUM) / self.size
            highest = over_ranks(peak[0], self.device) if peak else None
            must, of_bias = theory(case, way, self.size, self.dtype.itemsize, name == "fwdbwd")
            values: dict[str, object] = {
                "error": f"{error:.2e}",
                "impl": "+".join(sorted(impls)),
                "sent_mb": f"{sent / 1e6:.3f}",
                "theory_mb": f"{must / 1e6:.3f}",
                "bias_share": f"{(sent - must + of_bias) / (must - of_bias):.6f}",
                "bias_share_theory": f"{of_bias / (must - of_bias):.6f}",
                "status": "ok" if error <= AGREES else "wrong",
            }
            if error <= AGREES:
                result = timed(call, self.device, self.arguments.repeat, is_alone=False)
                efficiency = alone[name] / (self.size * result.ms)
                values |= {"ms": result.ms, "repeats": result.repeats, "efficiency": f"{efficiency:.3f}"}
                values["peak_mib"] = highest
            self._add(case, way, self.size, name, **values)
        self._free()

    def _add(self, case: Case, way: Way, cp_size: int, name: str, **values: object) -> None:
        """Add a row, and write all."""
        if self.rank != 0:
            return
        row: Row = dict.fromkeys(COLUMNS, "") | {
            "case": case.name, "n": case.seqlen, "strategy": way.strategy, "order": way.order, "cp_size": cp_size,
            "pass": name, "dense_bias_gb": f"{case.num_heads * case.seqlen**2 * 2 / 1e9:.1f}", "status": "ok",
        } | values  # fmt: skip
        for column, digits in (("ms", 3), ("peak_mib", 1)):
            if isinstance(row[column], float):
                row[column] = f"{row[column]:.{digits}f}"
        self.rows.append(row)
        self.say(" ".join(f"{key}={value}" for key, value in row.items() if value not in ("", None)))
        self.write()

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
