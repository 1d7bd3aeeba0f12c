"""The columns of this field."""

from __future__ import annotations

from benchmarks.fields import record

__all__ = ["Record"]


class Record(record.Record):
    """Rows and summary of a run.

    `rmse` and `spread_over_months` are in m/s; what `difference` is compared with, a row's part says.
    """

    columns = (
        "part",
        "provider",
        "weights",
        "epoch",
        "tol",
        "rank",
        "smallest_rank",
        "certificate",
        "energy",
        "rmse",
        "rmse_u",
        "rmse_v",
        "spread_over_months",
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
