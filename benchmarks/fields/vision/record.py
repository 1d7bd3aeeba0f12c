"""The columns of this field."""

from __future__ import annotations

from benchmarks.fields import record

__all__ = ["Record"]


class Record(record.Record):
    """Rows and summary of a run."""

    columns = (
        "part",
        "provider",
        "weights",
        "layer",
        "batch",
        "tol",
        "form",
        "rank",
        "certificate",
        "accuracy",
        "loss",
        "difference",
        "ms",
        "p10_ms",
        "p90_ms",
        "peak_mib",
        "seconds",
        "status",
        "note",
    )
