"""The columns of this field."""

from __future__ import annotations

from benchmarks.fields import record

__all__ = ["Evidence"]


class Evidence(record.Record):
    """Rows and summary of a run."""

    columns = (
        "part",
        "who",
        "pass",
        "body",
        "points",
        "layers",
        "seed",
        "step",
        "relative_error",
        "difference",
        "median_ms",
        "p10_ms",
        "p90_ms",
        "peak_mib",
        "repetitions",
        "status",
    )

    def add(self, part: str, *, quiet: bool = False, **values: object) -> None:
        """Add a row, its numbers to five digits."""
        super().add(part, quiet=quiet, **{name: _short(value) for name, value in values.items()})


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
