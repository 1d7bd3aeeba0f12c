"""The picture of this field, from the files that a run has written."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.record import say

from flashbias.files import whole_file

__all__ = ["draw"]

Rows = Sequence[dict[str, str]]

OURS, THEIRS, CEILING = "#1f77b4", "#9a9a9a", "#d9d9d9"
COLOURS = {"exact table": OURS, "factors": OURS, "bias-free": CEILING, "no attention": CEILING}
SHOWN_TABLES = 4


def draw(folder: Path, path: Path) -> None:
    """Accuracy and rank against the tolerance, times of the full size, and some learned tables.

    Args:
        folder: of `vision.csv` and `vision.npz`.
        path: of the picture.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        say("matplotlib is not installed: draw later, with --draw")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with (folder / "vision.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["status"].startswith(("error", "wrong"))]
    figure = plt.figure(figsize=(9.6, 6.4), dpi=130, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1.0))
    upper, lower = halves
    left, right = upper.subplots(1, 2)
    _against_tolerance(left, rows)
    _times(right, [row for row in rows if row["part"] == "full"])
    if (folder / "vision.npz").exists():
        _tables(lower, folder / "vision.npz")
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)
    say(f"drawn: {path.name}")


def _against_tolerance(axes: Any, rows: Rows) -> None:
    found = sorted((float(row["tol"]), row) for row in rows if row["part"] == "compress" and row["tol"])
    before = [float(row["accuracy"]) for row in rows if row["part"] == "compress" and row["provider"] == "as it is"]
    axes.set(xlabel="tolerance of the output", ylabel="test accuracy, %", title="Fashion-MNIST, tables compressed")
    if not found or not before:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    tolerances = [tol for tol, _ in found]
    axes.axhspan(before[0] - 0.1, before[0] + 0.1, color=CEILING, alpha=0.6, label="as it was, ± 0.1")
    axes.plot(tolerances, [float(row["accuracy"]) for _, row in found], "o-", color=OURS, label="accuracy")
    axes.set_xscale("log")
    axes.legend(loc="lower left", fontsize=8)
    ranks = axes.twinx()
    ranks.set_ylabel("largest rank of the layers that are factors")
    ranks.plot(tolerances, [int(row["rank"]) for _, row in found], "s--", color="#d62728", markersize=4)
    ranks.yaxis.label.set_color("#d62728")


def _times(axes: Any, rows: Rows) -> None:
    timed = [row for row in rows if row["ms"]]
    batch = timed[0]["batch"] if timed else "?"
    axes.set(xlabel="milliseconds of inference", title=f"SwinV2-B, 384 pixels, batch {batch}")
    labels = [_label(row) for row in timed]
    times = [float(row["ms"]) for row in timed]
    axes.barh(range(len(timed)), times, color=[COLOURS.get(row["provider"].split(",")[0], THEIRS) for row in timed])
    axes.set_yticks(range(len(timed)), labels, fontsize=8)
    axes.invert_yaxis()
    for place, value in enumerate(times):
        axes.text(value, place, f" {value:.1f}", va="center", fontsize=8)
    axes.margins(x=0.15)


def _label(row: dict[str, str]) -> str:
    if not row["tol"]:
        return row["provider"]
    return f"{row['provider']}, rank ≤ {row['rank']} ({row['weights']}, tol {float(row['tol']):g})"


def _tables(figure: Any, path: Path) -> None:
    """The head of most contrast of each of the last layers."""
    with np.load(path) as file:
        layers = [np.asarray(file[name], dtype=np.float32) for name in file.files]
    figure.suptitle(
        "Learned tables, by offset of the key in the window: one head of each of the last layers", fontsize=10
    )
    shown_layers = layers[-SHOWN_TABLES:]
    for axes, table in zip(figure.subplots(1, len(shown_layers)), shown_layers, strict=True):
        head = table[table.std(axis=(1, 2)).argmax()]
        reach = np.abs(head - np.median(head)).max()
        shown = axes.imshow(head, cmap="RdBu_r", vmin=np.median(head) - reach, vmax=np.median(head) + reach)
        axes.set_axis_off()
        figure.colorbar(shown, ax=axes, shrink=0.8)
