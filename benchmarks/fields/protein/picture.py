"""The picture of this field, from the files of a run alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.record import say

from flashbias.files import whole_file

__all__ = ["draw", "times"]

SHOWN = ("block", "triangle")


def times(rows: Sequence[Mapping[str, object]]) -> dict[tuple[str, int, str], dict[str, float]]:
    """Milliseconds by (scope, tokens, direction) and provider, where there are any."""
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        if row["part"] == "speed" and row["ms"] != "":
            key = str(row["what"]), int(str(row["tokens"])), str(row["direction"])
            found.setdefault(key, {})[str(row["provider"])] = float(str(row["ms"]))
    return found


def draw(folder: Path, target: Path) -> None:
    """Contact maps, curves of the loss, and times, from `protein.csv` and `protein-maps.npz`."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        say(f"matplotlib is not there: draw {target.name} later with --draw")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (folder / "protein.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    maps = folder / "protein-maps.npz"
    height = 2 if maps.exists() else 1
    figure, axes = plt.subplots(height, 3, figsize=(13, 4 * height), layout="constrained", squeeze=False)
    if maps.exists():
        with np.load(maps) as arrays:
            _maps(axes[0], dict(arrays))
    _curves(axes[-1, 0], rows)
    for axis, scope in zip(axes[-1, 1:], SHOWN, strict=True):
        _bars(axis, scope, times(rows))
    with whole_file(target) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
    say(f"drawn: {target.name}")


def _maps(axes: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Contacts, and what the model makes of them with the matrix and with factors of the largest rank."""
    made = [name for name in arrays if "factors" in name and "tuned" not in name]
    largest = max(made, key=lambda name: ("table" in name, int(name.split()[-1])), default=None)
    shown = [("contacts", f"contacts of {arrays['name']}"), ("matrix", "predicted, bias as a matrix")]
    shown += [(largest, f"predicted, {largest}")] if largest else []
    for axis, (name, title) in zip(axes, shown, strict=False):
        axis.imshow(arrays[name], cmap="Blues", vmin=0, vmax=255, interpolation="nearest")
        axis.set(title=title, xlabel="residue")


def _curves(axis: Any, rows: Sequence[Mapping[str, str]]) -> None:
    """Training with the matrix; as levels, the loss on chains held out by what the bias is."""
    learning = [(int(r["step"]), float(r["loss"])) for r in rows if r["what"] == "learning"]
    if learning:
        axis.plot(*zip(*learning, strict=True), lw=1, color="0.7", label="training, a batch")
    for index, row in enumerate(_best_of_each(rows)):
        style = {"matrix": "-", "no bias": ":"}.get(row["what"], "--")
        label = f"{row['what']} {row['rank']}".strip()
        axis.axhline(float(row["loss"]), ls=style, lw=1, color=f"C{index % 10}", label=label)
    axis.set(title="loss of the task (levels: held-out chains)", xlabel="step", ylabel="cross entropy")
    if axis.lines:
        axis.legend(fontsize=7, loc="upper right")


def _best_of_each(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Of each form of the bias that can be used the row of least loss, whatever its rank and tuning."""
    best: dict[str, Mapping[str, str]] = {}
    scores = [row for row in rows if row["part"] == "train" and row["auc"] and "truncated" not in row["what"]]
    for row in scores:
        form = row["what"].split(",")[0]
        best[form] = min(best.get(form, row), row, key=lambda score: float(score["loss"]))
    return list(best.values())


def _bars(axis: Any, scope: str, found: Mapping[tuple[str, int, str], Mapping[str, float]]) -> None:
    """Forward at the largest number of tokens."""
    keys = [key for key in found if key[0] == scope and key[2] == "forward"]
    if not keys:
        return
    key = max(keys, key=lambda key: key[1])
    names = sorted(found[key], key=lambda name: found[key][name])
    bars = axis.barh(names, [found[key][name] for name in names])
    for bar, name in zip(bars, names, strict=True):
        bar.set_color("C1" if "factors" in name else "0.8" if name.startswith("no bias") else "C0")
    axis.bar_label(bars, fmt="%.3g ms", padding=2, fontsize=8)
    axis.set_xlim(0, 1.25 * max(found[key].values()))
    axis.set(title=f"{'Pairformer block' if scope == 'block' else 'triangle attention'}, {key[1]:,} tokens")
    axis.set(xlabel="milliseconds, forward")
