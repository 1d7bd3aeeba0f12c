"""`calibrate`: the planner's coefficients from measured rows, and predicted against measured times.

Rows come from CSV files of the benchmarks, from a run on `CALIBRATION`, or both. For each provider, dtype and kind of
training the coefficients minimise

    sum over points ((predicted - measured) / measured)^2,    no coefficient negative,

so that a case of 0.1 ms counts as much as one of 100 ms. Beside the coefficients the file holds the points, their
errors within the fit, and those of each point predicted from the others (`held_out`).
"""

from __future__ import annotations

import csv
import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from flashbias.attention.coefficients import FEATURES, Coefficients, Model
from flashbias.attention.hopper import WIDEST_FACTORS
from flashbias.attention.workload import Training
from flashbias.bench.cases import CASES, Case, find_cases
from flashbias.bench.environment import describe_environment
from flashbias.bench.peers import INT32_ELEMENTS, PEERS
from flashbias.bench.points import READINGS, Point, points_of
from flashbias.bench.probes import CALIBRATION, probes
from flashbias.bench.providers import Provider, registry
from flashbias.bench.report import Row, read_rows, replace_file
from flashbias.bench.rows import PASSES
from flashbias.bench.runner import run

__all__ = ["Calibration", "Comparison", "calibrate", "calibration_providers", "compare", "fit", "write_calibration"]

MIN_POINTS = 6
"""Points that a provider must have: with fewer it gets no coefficients."""

Progress = Callable[[int, int, Row], None]


# -------------------------------------------------------------------- the fit


def fit(points: Sequence[Point], device_type: str) -> list[tuple[Model, dict[str, Any]]]:
    """Fit a model to the points of each provider, kind of training and dtype.

    Args:
        points: measured on one device.
        device_type: "cuda" or "cpu".

    Returns:
        Models and, beside each, its errors: `points`, and relative `median_error`, `max_error` and
        `held_out_median_error`. Providers with fewer than `MIN_POINTS` points are left out.
    """
    groups: dict[tuple[str, str, Training, torch.dtype], list[Point]] = {}
    for point in points:
        key = (point.family, point.provider, point.workload.training, point.workload.dtype)
        groups.setdefault(key, []).append(point)
    found = []
    for (family, provider, training, dtype), group in groups.items():
        if len(group) >= MIN_POINTS:
            model = Model(family, provider, training, _dtypes(dtype, device_type), {}, **_traits(provider, device_type))
            found.append(_fitted(model, group))
    return found


def _dtypes(dtype: torch.dtype, device_type: str) -> tuple[str, ...]:
    """GPUs work through both half-precision formats at one speed."""
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "bfloat16", "float16"
    return (str(dtype).removeprefix("torch."),)


# Torch's CPU kernel pads nothing, and takes keys 512 at a time.
_CPU_TILES = {"tile": 1, "causal_step": 512}

_OURS: dict[str, dict[str, Any]] = {
    "sdpa": {"operands": "concatenated", **_CPU_TILES},
    "hopper": {"operands": "ready", "max_columns": WIDEST_FACTORS},
}
"""What else than packed operands and tables an implementation of this library has."""


def _traits(provider: str, device_type: str) -> dict[str, Any]:
    family, who = provider.split("/", 1)
    if family == "ours":
        return dict(_OURS.get(who, {"operands": "packed"}))
    traits: dict[str, Any] = {} if device_type == "cuda" else dict(_CPU_TILES)
    peer = PEERS[who]
    if family != "bias-free":
        if peer.limit(CASES["full-64"], INT32_ELEMENTS) is not None:
            traits["max_elements"] = INT32_ELEMENTS
        if peer.bias_masks:
            traits["causal"] = "computed"
    if peer.limit(CASES["alibi-64-8k"], 0) is not None:
        traits["causal"] = "unsupported"
    return traits


def _fitted(model: Model, points: Sequence[Point]) -> tuple[Model, dict[str, Any]]:
    """Coefficients of the features that occur in the points, and their errors."""
    seen = [{"launch": 1.0} | _call_features(model, point) for point in points]
    names = [name for name in FEATURES if any(name in features for features in seen)]
    measured = np.array([point.ms for point in points])
    matrix = np.array([[features.get(name, 0.0) for name in names] for features in seen])
    relative = matrix / measured[:, None]
    errors = np.abs(relative @ _solve(relative) - 1)
    rest = ~np.eye(len(points), dtype=bool)
    held_out = np.array([abs(relative[i] @ _solve(relative[rest[i]]) - 1) for i in range(len(points))])
    coefficients = {name: float(f"{value:.6g}") for name, value in zip(names, _solve(relative), strict=True)}
    return replace(model, coefficients=coefficients), {
        "points": len(points),
        "median_error": round(float(np.median(errors)), 4),
        "max_error": round(float(errors.max()), 4),
        "held_out_median_error": round(float(np.median(held_out)), 4),
    }


def _call_features(model: Model, point: Point) -> dict[str, float]:
    head = model.features(point.workload, point.rank, point.table)
    return {name: point.workload.num_heads * value for name, value in head.items()}


def _solve(relative: np.ndarray) -> np.ndarray:
    """Coefficients, none negative, for which every row of `relative` comes nearest to 1."""
    from scipy.optimize import nnls

    # Features differ by many orders of magnitude: columns are brought to one.
    size = relative.max(axis=0)
    size[size == 0] = 1.0
    return nnls(relative / size, np.ones(len(relative)))[0] / size


# -------------------------------------------------------------------- predicted against measured


@dataclass(frozen=True)
class Comparison:
    """One form of one case: the fastest provider that was measured, and the fastest that is predicted."""

    case: str
    dtype: str
    training: str
    form: str
    rank: int
    entries: int
    measured_ms: float
    measured_provider: str
    predicted_ms: float
    predicted_provider: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted_ms / self.measured_ms - 1)


def compare(points: Iterable[Point], coefficients: Coefficients) -> list[Comparison]:
    """Predict each form of each case as `flashbias.plan` would, and put the best measured time beside it.

    Points that no model covers, and kernels of ours that ran without a bias, are left out; so is the time without
    a bias in a second kind of training, which is the same measurement.
    """
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        if point.family == "ours" and point.rank == 0 and point.table is None:
            continue
        if point.family == "bias-free" and point.workload.training == "bias":
            continue
        groups.setdefault((point.case, point.workload, point.form, point.rank, point.table), []).append(point)
    covered = {(m.family, m.training, dtype) for m in coefficients.models for dtype in m.dtypes}
    found = []
    for (case, workload, form, rank, table), group in groups.items():
        dtype = str(workload.dtype).removeprefix("torch.")
        if (group[0].family, workload.training, dtype) not in covered:
            continue
        model, ms = coefficients.fastest(form, workload, (rank,) * workload.num_heads, table)
        if model is None:  # every provider with coefficients has a limit that this case passes
            continue
        best = min(group, key=lambda point: point.ms)
        entries = 0 if table is None else table.entries
        who = (best.ms, best.provider, ms, model.provider)
        found.append(Comparison(case, dtype, workload.training, form, rank, entries, *who))
    return found


def errors_by_form(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Number of comparisons and median and largest error, for each form and for all."""
    groups: dict[str, list[float]] = {}
    for comparison in comparisons:
        for form in (comparison.form, "all"):
            groups.setdefault(form, []).append(comparison.error)
    return {
        form: {"cases": len(e), "median_error": round(median(e), 4), "max_error": round(max(e), 4)}
        for form, e in sorted(groups.items(), key=lambda item: item[0] == "all")
    }


def write_comparison(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write the comparisons as a CSV, through a temporary name."""
    partial = path.with_name(path.name + ".tmp")
    names = [field.name for field in fields(Comparison)]
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, "error"])
        writer.writerows([*(_cell(getattr(c, name)) for name in names), f"{c.error:.4f}"] for c in comparisons)
    os.replace(partial, path)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def draw_comparison(path: Path, comparisons: Sequence[Comparison], title: str) -> None:
    """Draw predicted against measured times, both logarithmic, with a band of 15 %, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    times = [ms for c in comparisons for ms in (c.measured_ms, c.predicted_ms)]
    line = np.array([min(times) / 1.5, max(times) * 1.5])
    axes.plot(line, line, color="0.4", linewidth=1)
    axes.fill_between(line, 0.85 * line, 1.15 * line, color="0.9", label="within 15 %")
    for form in dict.fromkeys(c.form for c in comparisons):
        chosen = [c for c in comparisons if c.form == form]
        label = f"{form}: {len(chosen)} cases, median error {100 * median(c.error for c in chosen):.1f} %"
        axes.scatter([c.measured_ms for c in chosen], [c.predicted_ms for c in chosen], s=18, label=label)
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line, xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="upper left")
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, format="png", dpi=130)
    os.replace(partial, path)


# -------------------------------------------------------------------- the whole of it


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` made.

    Attributes:
        path: of the coefficients; `NAME-fit.csv` and `NAME-fit.png` beside it compare predicted and measured times.
        coefficients: as they will be loaded.
        comparisons: predicted against measured.
        left_out: providers with too few points for a fit.
    """

    path: Path
    coefficients: Coefficients
    comparisons: tuple[Comparison, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Errors for each form, a line each."""
        lines = [f"{self.coefficients.device}: predicted against measured, relative error"]
        for form, found in errors_by_form(self.comparisons).items():
            share = f"median {100 * found['median_error']:5.1f} %, largest {100 * found['max_error']:5.1f} %"
            lines.append(f"  {form:15} {found['cases']:4d} cases   {share}")
        if self.left_out:
            lines.append(f"  fewer than {MIN_POINTS} points, so no coefficients: {', '.join(self.left_out)}")
        return "\n".join(lines)


def calibrate(
    out: Path | str = "coefficients.json",
    *,
    rows: Iterable[Path | str] = (),
    device: str | None = None,
    cases: Iterable[str | Case] | None = None,
    providers: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    passes: Iterable[str] = PASSES,
    small: bool = False,
    resume: bool = False,
    isolate: bool = False,
    time_limit_s: float | None = None,
    budget_s: float = 0.15,
    progress: Progress | None = None,
) -> Calibration:
    """Measure, fit and write the planner's coefficients for one device.

    With `rows` alone nothing is measured: the fit uses what the CSV files hold. With a device as well, and without
    rows, `cases` are measured on it; their rows go into `NAME-rows.csv` beside the result.

    Args:
        out: file to write; `flashbias.plan(workload, device=PATH)` reads it.
        rows: CSV files of `flashbias bench`, with their environment beside them, all from one device.
        device: where to measure: "cpu" or "cuda". Default: the GPU where there is one, if `rows` is empty.
        cases: names of frozen cases or of those in `CALIBRATION`, or cases; default: `CALIBRATION` of the device.
        providers: names, families or patterns among those of the benchmarks and of `probes`; default: all whose
            times a plan can use.
        dtypes: default float32 and bfloat16 on a CPU, bfloat16 on a GPU.
        passes: "fwd", "fwdbwd".
        small: take the small version of every case.
        resume: keep the rows of an interrupted run.
        isolate: measure in a child process, see `flashbias.bench.run`.
        time_limit_s: for measuring.
        budget_s: about how long to repeat each call, in seconds.
        progress: called after each measured row.

    Returns:
        What was written, and how well it predicts.

    Raises:
        ValueError: an unknown name; rows of different devices or without an environment; too few points for any fit.
        ModuleNotFoundError: scipy or matplotlib, of the extra `bench`, is missing.
    """
    import matplotlib  # noqa: F401  (both are needed at the end: say so before hours of measuring)
    import scipy  # noqa: F401

    out = Path(out)
    if out.suffix != ".json":
        raise ValueError(f"out must be a file that ends in .json, got {str(out)!r}")
    device_type = _device_type(device)
    chosen = _cases(cases, device_type, small)
    sources = [Path(path) for path in rows]
    environments = [_environment(path) for path in sources]
    if device is not None or not sources:
        here = describe_environment(torch.device(device or device_type))
        _check_one_device([*environments, here])
        measured = run(
            chosen,
            passes,
            calibration_providers(device_type, providers),
            dtypes or (["float32", "bfloat16"] if device_type == "cpu" else ["bfloat16"]),
            out.parent,
            progress,
            time_limit_s,
            isolate,
            name=f"{out.stem}-rows",
            resume=resume,
            device=device,
            budget_s=budget_s,
            min_repetitions=5,
        )
        sources.append(measured)
        environments.append(_environment(measured))
    _check_one_device(environments)
    environment = environments[-1]
    points = points_of([row for path in sources for row in read_rows(path)], chosen)
    provenance = {
        "source": "rows of flashbias bench: " + ", ".join(path.name for path in sources),
        "date": str(environment["started"])[:10],
        **{name: environment.get(name) for name in ("packages", "driver", "threads", "system", "commit")},
    }
    memory_mib = environment["device_memory_mib"]
    fitted = fit(points, "cpu" if memory_mib is None else "cuda")
    return write_calibration(out, fitted, points, environment["device"], memory_mib, provenance)


def write_calibration(
    out: Path,
    fitted: Sequence[tuple[Model, dict[str, Any]]],
    points: Sequence[Point],
    device: str,
    memory_mib: int | None,
    provenance: dict[str, Any],
) -> Calibration:
    """Write coefficients, the points behind them and the comparison of predicted and measured times.

    Args:
        out: the JSON file.
        fitted: what `fit` returned.
        points: measured on one device.
        device: its name.
        memory_mib: its memory, None for a CPU.
        provenance: where the points come from; their number and the errors are added.

    Raises:
        ValueError: nothing was fitted.
    """
    if not fitted:
        raise ValueError(f"no provider has {MIN_POINTS} points with a number, so there is nothing to fit")
    models = tuple(model for model, _ in fitted)
    memory_bytes = None if memory_mib is None else memory_mib * 2**20
    comparisons = compare(points, Coefficients(device, models, provenance, memory_bytes))
    content = {
        "device": device,
        "memory_bytes": memory_bytes,
        "provenance": {**provenance, "points": len(points), "errors": errors_by_form(comparisons)},
        "models": [{f.name: getattr(model, f.name) for f in fields(model)} | {"fit": e} for model, e in fitted],
        "points": [point.to_dict() for point in points],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, _json(content))
    write_comparison(out.with_name(f"{out.stem}-fit.csv"), comparisons)
    draw_comparison(out.with_name(f"{out.stem}-fit.png"), comparisons, f"{device}: predicted and measured times")
    left_out = {point.provider for point in points} - {model.provider for model in models}
    return Calibration(out, Coefficients.load(out), tuple(comparisons), tuple(sorted(left_out)))


def _json(content: dict[str, Any]) -> str:
    """JSON with one line for each model and point."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n    ".join(json.dumps(entry, ensure_ascii=False) for entry in value)
            parts.append(f'  "{name}": [\n    {lines}\n  ]')
        else:
            shown = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
            parts.append(f'  "{name}": {shown}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _device_type(device: str | None) -> str:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type


def _cases(cases: Iterable[str | Case] | None, device_type: str, small: bool) -> list[Case]:
    known = {case.name: case for group in CALIBRATION.values() for case in group}
    given = CALIBRATION[device_type] if cases is None else cases
    return find_cases([known.get(case, case) if isinstance(case, str) else case for case in given], small)


def calibration_providers(device_type: str, names: Iterable[str] | None = None) -> list[Provider]:
    """The providers whose times a plan can use.

    Args:
        device_type: "cuda" or "cpu".
        names: names, families or patterns; default: everything installed that is worth running on the device.

    Raises:
        ValueError: a name that fits nothing.
    """
    known = {p.name: p for p in (*registry().values(), *probes()) if p.family in READINGS}
    if names is None:
        return [
            provider
            for name, provider in known.items()
            if device_type in provider.in_family and provider.is_installed() and not name.endswith("/reference")
        ]
    chosen: set[str] = set()
    for pattern in names:
        matches = [n for n, p in known.items() if p.family == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not matches:
            raise ValueError(f"unknown provider {pattern!r}; for a calibration there are {', '.join(known)}")
        chosen |= set(matches)
    return [provider for name, provider in known.items() if name in chosen]


def _environment(path: Path) -> dict[str, Any]:
    """The JSON beside a CSV."""
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise ValueError(f"{beside}, which says where the rows of {path.name} were measured, is missing")
    return json.loads(beside.read_text())


def _check_one_device(environments: Iterable[dict[str, Any]]) -> None:
    devices = {str(environment["device"]) for environment in environments}
    if len(devices) > 1:
        raise ValueError(f"rows must come from one device, got {', '.join(sorted(devices))}")
