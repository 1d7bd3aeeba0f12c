"""The picture of this field, from the CSV that a run has written."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import say

from flashbias.files import whole_file

__all__ = ["draw"]

Rows = Sequence[dict[str, str]]

COLOURS = {"dense": "#d62728", "factored": "#1f77b4"}
BARS = {
    "bias-free/sdpa-cudnn": ("no bias, cuDNN", "#d9d9d9"),
    "ours/auto": ("factored", "#1f77b4"),
    "alibi/flex": ("FlexAttention", "#9a9a9a"),
    "dense/sdpa-cudnn": ("dense, cuDNN", "#e7a3a3"),
    "dense/sdpa-efficient": ("dense, efficient", "#d62728"),
    "eager/transformers": ("eager", "#7f1d1d"),
}


def draw(folder: Path, path: Path) -> None:
    """Losses of both trainings, loss at 4 times the length of training, and times of ALiBi alone.

    Args:
        folder: of `language.csv`.
        path: of the picture.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        say("matplotlib is not installed: draw later, with --draw")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with (folder / "language.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    figure, (curves, further, times) = plt.subplots(
        1, 3, figsize=(13.0, 4.0), dpi=120, layout="constrained", width_ratios=(1.0, 1.0, 1.4)
    )
    _curves(curves, [row for row in rows if row["part"] == "train"])
    _further(further, rows)
    _times(times, [row for row in rows if row["part"] == "attention" and row["pass"] == "fwdbwd"])
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)
    say(f"drawn: {path.name}")


def _curves(axes: Any, rows: Rows) -> None:
    axes.set(xlabel="step", ylabel="bits per byte", title="Training, same seed and batches")
    for form, width in (("dense", 3.5), ("factored", 1.2)):
        found = [(int(row["step"]), float(row["loss"])) for row in rows if row["provider"] == form]
        if found:
            axes.plot(*zip(*found, strict=True), color=COLOURS[form], linewidth=width, label=form)
    _legend_or_note(axes)


def _further(axes: Any, rows: Rows) -> None:
    axes.set(xlabel="bytes that stand before", ylabel="bits per byte", title="Held-out text, read further")
    for form, width in (("dense", 3.5), ("factored", 1.2)):
        chosen = [row for row in rows if row["part"] == "position" and row["provider"] == form]
        found = [(int(row["step"]), float(row["loss"])) for row in chosen]
        if found:
            axes.plot(*zip(*found, strict=True), "o-", color=COLOURS[form], linewidth=width, markersize=3, label=form)
    trained = [int(row["seqlen"]) for row in rows if row["part"] == "train"]
    if trained:
        axes.axvline(trained[0], color="black", linewidth=0.8, linestyle="--", label="length of training")
    _legend_or_note(axes)


def _times(axes: Any, rows: Rows) -> None:
    axes.set(ylabel="ms, forward and backward", title="ALiBi alone, 32 heads")
    # A case that ran out of time after the first of its kernels compares nothing.
    count = Counter(row["case"] for row in rows if row["ms"])
    rows = [row for row in rows if count[row["case"]] > 1]
    cases = sorted({row["case"] for row in rows}, key=lambda case: (-int(case.split("-")[1]), _seqlen(rows, case)))
    if not cases:
        _legend_or_note(axes)
        return
    width = 0.8 / len(BARS)
    for index, (provider, (label, colour)) in enumerate(BARS.items()):
        found = {row["case"]: float(row["ms"]) for row in rows if row["provider"] == provider}
        places = [place + (index - (len(BARS) - 1) / 2) * width for place, case in enumerate(cases) if case in found]
        if places:
            axes.bar(places, [found[case] for case in cases if case in found], width, color=colour, label=label)
    axes.set_yscale("log")
    labels = [f"{_seqlen(rows, case):,}\nhead {case.split('-')[1]}" for case in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=8)
    axes.set_xlabel("tokens")
    _legend_or_note(axes)


def _seqlen(rows: Rows, case: str) -> int:
    return next(int(row["seqlen"]) for row in rows if row["case"] == case)


def _legend_or_note(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
