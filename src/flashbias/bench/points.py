"""`Point`: one measured time as the planner sees it, made from a row of a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from flashbias.attention.workload import TableSize, Training, Workload
from flashbias.bench.cases import CASES, Case
from flashbias.bench.peers import PEERS
from flashbias.bench.probes import CALIBRATION, LOCAL_ENTRIES
from flashbias.bench.report import Row
from flashbias.bench.rows import DTYPES

__all__ = ["READINGS", "Point", "points_of", "read_points"]


@dataclass(frozen=True)
class Point:
    """One measured time.

    Args:
        case: its name.
        workload: shapes, dtype, training.
        family: "ours", "dense" or "bias-free".
        provider: who ran; what this library runs has one name, whatever the form.
        rank: of the factors, 0 without.
        table: its size, or None.
        ms: milliseconds.
    """

    case: str
    workload: Workload
    family: str
    provider: str
    rank: int
    table: TableSize | None
    ms: float

    @property
    def form(self) -> str:
        """As in `flashbias.plan`; a kernel of ours without a bias counts as factored with rank 0."""
        if self.family != "ours":
            return self.family
        if self.table is None:
            return "factored"
        return "table+factored" if self.rank else "table"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what has its default is left out."""
        w = self.workload
        workload = {f.name: getattr(w, f.name) for f in fields(w) if getattr(w, f.name) != f.default}
        workload |= {name: str(getattr(w, name)).removeprefix("torch.") for name in ("dtype", "factor_dtype")}
        found = {"case": self.case, "family": self.family, "provider": self.provider}
        found |= {"rank": self.rank} if self.rank else {}
        found |= {"table": asdict(self.table)} if self.table else {}
        return found | {"ms": self.ms, "workload": workload}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Point:
        """The inverse of `to_dict`."""
        dtypes = {name: getattr(torch, entry["workload"][name]) for name in ("dtype", "factor_dtype")}
        table = TableSize(**entry["table"]) if "table" in entry else None
        workload = Workload(**entry["workload"] | dtypes)
        return cls(
            entry["case"], workload, entry["family"], entry["provider"], entry.get("rank", 0), table, entry["ms"]
        )


def read_points(path: Path | str) -> list[Point]:
    """Read the points that a file of coefficients was made from."""
    return [Point.from_dict(entry) for entry in json.loads(Path(path).read_text())["points"]]


@dataclass(frozen=True)
class _Reading:
    """How the rows of a family of providers are read."""

    family: str
    trained: tuple[Training, ...]  # what "fwdbwd" stands for
    has_rank: bool = False
    table: str | None = None


READINGS = {
    "ours": _Reading("ours", ("bias",), has_rank=True),
    "ours-frozen": _Reading("ours", ("frozen",), has_rank=True),
    "ours-bias-free": _Reading("ours", ("frozen", "bias")),
    "table-local": _Reading("ours", ("bias",), table="local"),
    "table-local-frozen": _Reading("ours", ("frozen",), table="local"),
    "table-full": _Reading("ours", ("bias",), table="full"),
    "table-full-frozen": _Reading("ours", ("frozen",), table="full"),
    "bias-free": _Reading("bias-free", ("frozen", "bias")),
    "dense": _Reading("dense", ("frozen",)),
    "dense+grad": _Reading("dense", ("bias",)),
}


def points_of(rows: Iterable[Row], cases: Iterable[Case] = ()) -> list[Point]:
    """Turn rows of a benchmark into points; rows without a number, and of families that no form has, are left out.

    Args:
        rows: of one device.
        cases: cases that the rows may name, beside the frozen ones, those of `CALIBRATION` and their small versions.

    Raises:
        ValueError: a row names an unknown case.
    """
    known = {case.name: case for case in cases}
    for case in (*CASES.values(), *(case for group in CALIBRATION.values() for case in group)):
        known |= {case.name: case, case.small().name: case.small()}
    points = []
    for row in rows:
        reading = READINGS.get(row.family)
        who = row.provider.split("/", 1)[1]
        if row.status != "ok" or reading is None or who == "reference" or not _is_general(who):
            continue
        if row.case not in known:
            raise ValueError(f"unknown case {row.case!r}; cases are {', '.join(known)}")
        points += _points(row, known[row.case], reading, who)
    return points


def _points(row: Row, case: Case, reading: _Reading, who: str) -> list[Point]:
    trained: tuple[Training, ...] = reading.trained
    if row.family == "ours" and not case.learns_bias:
        trained = ("frozen",)
    dtype = DTYPES[row.dtype]
    workload = Workload(
        num_heads=case.num_heads,
        seqlen_q=case.seqlen,
        seqlen_k=case.seqlen,
        head_dim=case.head_dim,
        batch=math.prod(case.batch),
        is_causal=case.is_causal,
        shared_bias=case.shared,
        dtype=dtype,
        factor_dtype=dtype if case.bias == "low-rank" else torch.float32,
    )
    table = None
    if reading.table is not None:
        table = TableSize(LOCAL_ENTRIES) if reading.table == "local" else TableSize(2 * case.seqlen - 1, local=False)
    provider = f"ours/{who}" if reading.family == "ours" else row.provider
    rank = case.rank if reading.has_rank else 0
    return [
        Point(case.name, replace(workload, training=t), reading.family, provider, rank, table, float(row.median_ms))
        for t in (trained if row.pass_name == "fwdbwd" else ("none",))
    ]


def _is_general(who: str) -> bool:
    """Whether a peer takes any shape (masks apart), so that a prediction for another shape means something."""
    peer = PEERS.get(who)
    return peer is None or peer.limit(CASES["full-64"], 0) is None
