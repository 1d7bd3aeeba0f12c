"""The columns of this field."""

from __future__ import annotations

from benchmarks.fields import record

__all__ = ["Results"]


class Results(record.Record):
    """Rows and summary of a run."""

    columns = (
        "part",
        "case",
        "pass",
        "provider",
        "attention",
        "seqlen",
        "step",
        "loss",
        "ms",
        "p10_ms",
        "p90_ms",
        "peak_mib",
        "error",
        "agreement",
        "status",
    )
