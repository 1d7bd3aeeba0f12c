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

OURS, THEIRS, BOUND = "#1f77b4", "#9a9a9a", "#d62728"
FIRST_LONGITUDE = 20  # degrees east, of the first column


def draw(folder: Path, path: Path) -> None:
    """A month's wind as it was, as predicted, and as predicted with factors; errors against the rank; times.

    Args:
        folder: of `weather.csv` and `weather.npz`.
        path: of the picture.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        say("matplotlib is not installed: draw later, with --draw")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with (folder / "weather.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    figure = plt.figure(figsize=(10.5, 6.4), dpi=130, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.35))
    upper, lower = halves
    if (folder / "weather.npz").exists():
        _month(upper, folder / "weather.npz")
    left, right = lower.subplots(1, 2)
    _against_rank(left, rows)
    _times(right, [row for row in rows if row["part"] == "attention" and row["ms"]])
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)
    say(f"drawn: {path.name}")


def _month(figure: Any, path: Path) -> None:
    """Speed in colour, direction as arrows, the last map what factors change."""
    with np.load(path) as file:
        fields = {name: file[name].astype(np.float32) for name in file.files if name not in ("tables", "latitudes")}
        latitudes = file["latitudes"]
    titles = {"truth": "a held-out month", "without factors": "predicted"}
    longitudes = FIRST_LONGITUDE + 360 * np.arange(fields["truth"].shape[-1]) / fields["truth"].shape[-1]
    extent = (longitudes[0], longitudes[0] + 360, latitudes[0], latitudes[-1])
    panels = figure.subplots(1, len(fields), sharey=True)
    highest = np.hypot(*fields["truth"]).max()
    shown = None
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        shown = axes.imshow(
            np.hypot(*field), origin="lower", extent=extent, aspect="auto", cmap="viridis", vmin=0, vmax=highest
        )
        step = slice(2, None, 6)
        arrows = (field[0][step, step], field[1][step, step])
        axes.quiver(longitudes[step], latitudes[step], *arrows, color="white", scale=160, width=0.003)
        axes.set_title(titles.get(name, f"predicted, factors of {name}"), fontsize=10)
        axes.set_xlabel("degrees east")
    panels[0].set_ylabel("degrees north")
    figure.colorbar(shown, ax=panels, label="wind, m/s")


def _against_rank(axes: Any, rows: Rows) -> None:
    """The error on held-out months, with its spread over them, and how far factors move the prediction."""
    axes.set(
        xlabel="rank of the bias of all windows", ylabel="error on held-out months, m/s", title="Next month's wind"
    )
    cuts = [row for row in rows if row["part"] == "rank"]
    if not cuts:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    ranks = [int(row["rank"]) for row in cuts]
    spreads = [float(row["spread_over_months"]) for row in cuts]
    errors = [float(row["rmse"]) for row in cuts]
    axes.errorbar(ranks, errors, yerr=spreads, fmt="o-", color=OURS, capsize=3, label="model, spread over months")
    for style, name in (("--", "climatology"), (":", "damped anomaly"), ("-", "model")):
        for row in rows:
            if row["part"] == "score" and row["provider"] == name:
                axes.axhline(float(row["rmse"]), color=THEIRS, linestyle=style, label=name, zorder=0)
    axes.legend(loc="upper right", fontsize=8)
    axes.margins(y=0.35)
    moved = axes.twinx()
    moved.set_yscale("log")
    moved.set_ylabel("moved by factors, m/s")
    moved.yaxis.label.set_color(BOUND)
    moved.plot(ranks, [float(row["difference"]) for row in cuts], "s--", color=BOUND, markersize=4)


def _times(axes: Any, rows: Rows) -> None:
    axes.set(xlabel="milliseconds", title="Attention of Pangu-Weather's outer layer")
    labels = [f"{row['provider']}{', rank ' + row['rank'] if row['tol'] else ''}" for row in rows]
    times = [float(row["ms"]) for row in rows]
    ours = ("exact table", "factors")
    axes.barh(range(len(rows)), times, color=[OURS if row["provider"].startswith(ours) else THEIRS for row in rows])
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    for place, value in enumerate(times):
        axes.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    axes.margins(x=0.15)
