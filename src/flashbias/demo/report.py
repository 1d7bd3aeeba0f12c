"""What was measured, as a table, a CSV file, a plot, and one sentence that the numbers support."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flashbias.demo.measure import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["conclusion", "markdown", "plot", "write"]

COLOURS = {"dense": "#b5502f", "factored": "#1f6f8b"}
STYLES = {"forward": ("--", "o"), "training step": ("-", "s")}
PANELS = {
    "median_ms": "time of one run [ms]",
    "peak_mib": "peak memory beyond the inputs [MiB]",
    "error": "largest error against float64, relative",
}
NO_DIFFERENCE = 1.05
"""Two times within this factor are called equal."""


def markdown(rows: Sequence[Measurement]) -> str:
    """Write the rows as a Markdown table, which a terminal shows just as well.

    Args:
        rows: as `run` returns them.

    Returns:
        The table, one line for each row.
    """
    table = [["residues", "stage", "bias", "time", "peak memory", "error against float64"]]
    for row in rows:
        cells = [f"{row.residues:,}", row.stage, row.method]
        if row.median_ms is None or row.peak_mib is None or row.error is None:
            cells += [row.status, "", ""]
        else:
            cells += [_time(row.median_ms), _memory(row.peak_mib), f"{row.error:.1e}"]
        table.append(cells)
    # What did not run is said across the columns of the numbers, and must not widen them.
    widths = [max(len(cells[n]) for cells in table if n < 3 or cells[4]) for n in range(6)]
    lines = ["| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def conclusion(rows: Sequence[Measurement]) -> str:
    """Say in one sentence what the factors changed, at the largest size that both methods reached.

    Args:
        rows: as `run` returns them.

    Returns:
        The sentence; every number in it comes from `rows`.
    """
    done = {(row.residues, row.method, row.stage): row for row in rows if row.status == "ok"}
    both = [n for n, method, _ in done if method == "dense" and (n, "factored", "forward") in done]
    if not both:
        return "No size was reached by both methods, so nothing can be compared."
    size = max(both)
    parts = []
    for stage in STYLES:
        dense, ours = done[size, "dense", stage], done[size, "factored", stage]
        parts.append(f"{_speed(dense, ours)} in a {_stage(stage)} with {_saving(dense, ours)}")
    worst = {method: max(done[size, method, stage].error or 0.0 for stage in STYLES) for method in COLOURS}
    sentence = (
        f"At {size:,} residues the factored bias is {' and '.join(parts)}; "
        f"its largest error against float64 is {worst['factored']:.0e} (dense: {worst['dense']:.0e})"
    )
    return sentence + _beyond(rows, size) + "."


def write(rows: Sequence[Measurement], folder: Path, setting: str) -> list[Path]:
    """Write `demo.csv` and `demo.png`, each whole or not at all.

    Args:
        rows: as `run` returns them.
        folder: made if it is not there.
        setting: what the numbers were measured on; the plot's subtitle.

    Returns:
        The paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"demo.csv": _csv(rows).encode(), "demo.png": plot(rows, setting)}
    for name, content in contents.items():
        part = folder / f".{name}.{os.getpid()}.part"
        try:
            part.write_bytes(content)
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
    return [folder / name for name in contents]


def plot(rows: Sequence[Measurement], setting: str) -> bytes:
    """Draw time, memory and error against the number of residues.

    Args:
        rows: as `run` returns them.
        setting: the subtitle.

    Returns:
        A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        _draw(axes, rows, name)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("residues")
    figure.suptitle(f"Attention over protein 2XHE and its crystal, squared-distance bias\n{setting}", fontsize=12)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.supxlabel("\n".join(_missing(rows)), fontsize=9, color="#555555")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# ---------------------------------------------------------------- parts of the sentence


def _stage(stage: str) -> str:
    return "forward pass" if stage == "forward" else stage


def _speed(dense: Measurement, ours: Measurement) -> str:
    ratio = (dense.median_ms or 0.0) / (ours.median_ms or 1.0)
    if ratio > NO_DIFFERENCE:
        return f"{ratio:.1f}x faster"
    if ratio < 1 / NO_DIFFERENCE:
        return f"{1 / ratio:.1f}x slower"
    return "as fast"


def _saving(dense: Measurement, ours: Measurement) -> str:
    ratio = (dense.peak_mib or 0.0) / max(ours.peak_mib or 0.0, 1.0)
    if ratio > NO_DIFFERENCE:
        return f"{ratio:.0f}x less memory" if ratio >= 10 else f"{ratio:.1f}x less memory"
    return "no less memory"


def _beyond(rows: Sequence[Measurement], size: int) -> str:
    """What happened at larger sizes."""
    reached = max((row.residues for row in rows if row.method == "factored" and row.status == "ok"), default=size)
    refused = [row for row in rows if row.method == "dense" and size < row.residues <= reached]
    if not refused:
        return ""
    return f"; at {refused[0].residues:,} only the factored bias ran (dense {refused[0].status})"


# ---------------------------------------------------------------- numbers as text


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _memory(mebibytes: float) -> str:
    if mebibytes < 1:
        return "< 1 MiB"
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def _csv(rows: Sequence[Measurement]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Measurement)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return buffer.getvalue()


# ---------------------------------------------------------------- parts of the plot


def _draw(axes: Axes, rows: Sequence[Measurement], name: str) -> None:
    for method, colour in COLOURS.items():
        for stage, (line, marker) in STYLES.items():
            chosen = [r for r in rows if (r.method, r.stage) == (method, stage) and r.status == "ok"]
            values = [getattr(row, name) for row in chosen]
            if name == "peak_mib":
                values = [max(value, 1.0) for value in values]  # a resident set is no finer than that
            axes.plot(
                [row.residues for row in chosen],
                values,
                line,
                marker=marker,
                markersize=5,
                color=colour,
                label=f"{method} bias, {stage}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _whole_decades(axes)
    sizes = sorted({row.residues for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7.5)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_decades(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))


def _missing(rows: Sequence[Measurement]) -> list[str]:
    """One line for each method and kind of obstacle, at the first size that met it."""
    first = {(r.method, r.status.partition(":")[0]): r for r in reversed(rows) if r.status != "ok"}
    found = sorted(first.values(), key=lambda row: (row.method, row.residues))
    return [f"{row.method}, {row.residues:,} residues: {row.status}" for row in found]
