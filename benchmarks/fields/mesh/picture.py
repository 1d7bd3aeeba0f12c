"""The picture: true and computed fields on a held-out body, time, and memory."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.record import say

from flashbias.files import whole_file

__all__ = ["draw"]

BODY = "motorBike.obj.gz"
FIELDS = {"true": "true", "factors": "with the bias", "no bias": "without"}
BARS = {
    "factors": ("factors", "#c0392b"),
    "no bias": ("no bias", "#95a5a6"),
    "matrix": ("matrix, cuDNN", "#2c3e50"),
    "flex": ("FlexAttention", "#2980b9"),
}


def draw(folder: Path, picture: Path) -> None:
    """Draw from the files `mesh.csv` and `mesh.npz` of a run; where matplotlib is missing, say how to draw later.

    Args:
        folder: of the run's files.
        picture: file to write.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        say("no picture: matplotlib is not installed; `--draw` makes it from the files elsewhere")
        return
    with (folder / "mesh.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    above, below = (figure.add_subfigure(place) for place in figure.add_gridspec(2, 1, height_ratios=[1.4, 1]))
    if (folder / "mesh.npz").exists():
        with np.load(folder / "mesh.npz") as fields:
            _fields(above, {name: fields[name][0] for name in fields.files}, rows)
    _bars(below, rows)
    with whole_file(picture) as part:
        figure.savefig(part, dpi=130, format="png")
    say(f"drawn: {picture.name}")


def _fields(figure: Any, fields: dict[str, Any], rows: list[dict[str, str]]) -> None:
    x, y, z = fields["points"].T
    limit = np.quantile(np.abs(fields["true"]), 0.98)
    scale = fields["true"].std()
    for place, (name, title) in enumerate(FIELDS.items(), start=1):
        axes = figure.add_subplot(1, 3, place, projection="3d")
        colours = {"c": fields[name] / scale, "vmin": -limit / scale, "vmax": limit / scale}
        axes.scatter(x, y, z, s=3, cmap="coolwarm", clip_on=False, **colours)  # the zoom reaches beyond the box
        axes.set_aspect("equal")
        axes.set_box_aspect(axes.get_box_aspect(), zoom=1.4)
        axes.view_init(elev=12, azim=-70)
        axes.set_axis_off()
        errors = [float(row["relative_error"]) for row in rows if row["part"] == "body" and row["who"] == name]
        mean = f": error {np.mean(errors):.1%} on held-out bodies" if errors else " density on a held-out body"
        axes.set_title(title + mean, fontsize=10)


def _bars(figure: Any, rows: list[dict[str, str]]) -> None:
    car = [row for row in rows if row["part"] == "solver-32k"]
    if not car:
        return
    most, points = (max(int(row[column]) for row in car) for column in ("layers", "points"))
    panels = [
        (name, column, unit)
        for column, unit in (("median_ms", "ms"), ("peak_mib", "MiB"))
        for name in ("inference", "training")
    ]
    for axes, (name, column, unit) in zip(figure.subplots(1, 4), panels, strict=True):
        of = {row["who"]: row for row in car if row["pass"] == name and int(row["layers"]) == most}
        shown = [who for who in BARS if who in of]
        values = [float(of[who][column] or 0) for who in shown]
        bars = axes.barh([BARS[who][0] for who in shown], values, color=[BARS[who][1] for who in shown])
        texts = [f" {value:,.0f}" if value else f" {_why(of[who])}" for who, value in zip(shown, values, strict=True)]
        axes.bar_label(bars, texts, fontsize=8)
        axes.set_xlim(0, 1.3 * max(values, default=0.0) or 1.0)
        axes.invert_yaxis()
        axes.set_title(f"{name}, {points:,} points, {unit}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def _why(row: dict[str, str]) -> str:
    """Why there is no bar."""
    return "not measured" if row["status"] == "ok" else row["status"].split(":")[0]
