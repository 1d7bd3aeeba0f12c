"""The paper's Tables 3 to 7: the shapes of their models, what they report, and a page that puts our times beside it.

FlashBias: Fast Computation of Attention with Bias, https://arxiv.org/abs/2505.12044. The paper times whole models; the
cases here are the attention of one layer of each, and the page multiplies by the number of layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flashbias.bench.cases import Case
from flashbias.bench.report import (
    PASS_TITLES,
    Row,
    fastest,
    heading,
    markdown_table,
    markers,
    read_rows,
    render_rows,
    replace_file,
)

__all__ = ["EXPERIMENTS", "PAPER_CASES", "Experiment", "Figure", "Reported", "render_paper", "write_page"]

Method = Literal["factored", "dense bias", "no bias", "original code"]


@dataclass(frozen=True)
class Figure:
    """Time and memory as a table of the paper has them, in the units of `Reported`."""

    time: float
    memory: float | None = None


@dataclass(frozen=True)
class Reported:
    """What the paper reports for one pass.

    Args:
        figures: by method; None where it ran out of memory. What was not tried is left out.
        unit: of the times.
        memory_unit: of the memory.
    """

    figures: dict[Method, Figure | None]
    unit: str = "s per 100 iterations"
    memory_unit: str = "GB"


@dataclass(frozen=True)
class Experiment:
    """One model of the paper at one size.

    Args:
        table: its number in the paper.
        title: model and bias.
        calls: each case, with how often a pass through the model computes it.
        reported: what the paper reports, by pass.
        difference: what else is not the same, beside attention alone, GPU and dtype; one sentence.
        is_small: whether the cases are small versions, which say nothing about the paper's.
    """

    table: int
    title: str
    calls: tuple[tuple[Case, int], ...]
    reported: dict[str, Reported]
    difference: str
    is_small: bool = False

    def small(self) -> Experiment:
        """The same with the small version of each case."""
        return replace(self, calls=tuple((case.small(), count) for case, count in self.calls), is_small=True)


# -------------------------------------------------------------------- what the paper reports

PAPER = "[FlashBias](https://arxiv.org/abs/2505.12044)"
PAPER_SETTING = "one A100 and fp16"

_GPT2 = Case("gpt2-2k", (1,), 50, 2048, 32, 2, "alibi", True, True, ("GPT-2 1.5B with ALiBi",))


def _swin(stage: int, windows: int, seqlen: int) -> Case:
    """A stage of SwinV2-B at 384 px for 64 images; the last has 12 × 12 tokens, so a window of 144."""
    heads = 2 ** (stage + 1)
    return Case(
        f"swinv2-stage{stage}", (64 * windows,), heads, seqlen, 32, 16, shared=True, tags=("SwinV2-B at 384 px",)
    )


def _car(name: str, points: int) -> Case:
    return Case(name, (1,), 8, points, 16, 5, "distance", shared=True, tags=("PDE solver on a car's surface",))


_PAIRFORMER = Case(
    "pairformer-1218", (1, 1218), 4, 1218, 32, 96, shared=True, tags=("AlphaFold 3 triangle attention, PDB 7wux",)
)


def _pangu(scale: str, around: int, types: int, heads: int) -> Case:
    """Windows of 2 × 6 × 12 places; their types stand among the heads, for windows of one type alone share a bias."""
    tags = (f"Pangu-Weather, {scale} scale",)
    return Case(f"pangu-{scale}", (around,), types * heads, 144, 32, 56, shared=True, tags=tags)


# The fine scale has 8 × 186 × 360 places, so 4 × 31 types and 30 windows along a latitude; the coarse one, padded,
# 8 × 96 × 180 with twice the channels.
_PANGU_FINE, _PANGU_COARSE = _pangu("fine", 30, 4 * 31, 6), _pangu("coarse", 15, 4 * 16, 12)

_CAR_DIFFERENCE = "The dense bias must take a gradient in training, for its weights are learned."

EXPERIMENTS = (
    Experiment(
        3,
        "GPT-2 1.5B, ALiBi",
        ((_GPT2, 48),),
        {
            "fwd": Reported({"factored": Figure(39.26), "dense bias": Figure(40.32), "no bias": Figure(38.77)}),
            "fwdbwd": Reported({"factored": Figure(121.6), "dense bias": Figure(124.3), "no bias": Figure(119.3)}),
        },
        "One sequence here, for the paper names no batch; with ALiBi computed in place (Table 8) its kernel and "
        "FlashAttention both take 38.98 s, 119.8 s with the backward pass.",
    ),
    Experiment(
        4,
        "SwinV2-B at 384 px",
        ((_swin(1, 16, 576), 2), (_swin(2, 4, 576), 2), (_swin(3, 1, 576), 18), (_swin(4, 1, 144), 2)),
        {
            "fwd": Reported(
                {
                    "factored": Figure(0.190, 9429),
                    "dense bias": Figure(0.230, 11448),
                    "no bias": Figure(0.180, 3957),
                    "original code": Figure(0.473, 12829),
                },
                "s per batch of 64",
                "MB",
            )
        },
        "The paper factors the last 8 of 24 layers, here all 24 are, without the masks of shifted windows.",
    ),
    Experiment(
        5,
        "PDE solver, 8,192 points",
        ((_car("car-8k", 8192), 8),),
        {
            "fwd": Reported({"factored": Figure(1.22, 0.98), "dense bias": Figure(5.46, 4.54)}),
            "fwdbwd": Reported({"factored": Figure(4.54, 1.46), "dense bias": Figure(15.4, 12.8)}),
        },
        _CAR_DIFFERENCE,
    ),
    Experiment(
        5,
        "PDE solver, 16,384 points",
        ((_car("car-16k", 16384), 8),),
        {
            "fwd": Reported({"factored": Figure(3.48, 1.03), "dense bias": Figure(21.2, 15.3)}),
            "fwdbwd": Reported({"factored": Figure(14.7, 2.02), "dense bias": None}),
        },
        _CAR_DIFFERENCE,
    ),
    Experiment(
        5,
        "PDE solver, 32,186 points",
        ((_car("car-32k", 32186), 8),),
        {
            "fwd": Reported({"factored": Figure(12.7, 1.13), "dense bias": None}),
            "fwdbwd": Reported({"factored": Figure(51.1, 2.97), "dense bias": None}),
        },
        _CAR_DIFFERENCE,
    ),
    Experiment(
        6,
        "AlphaFold 3 Pairformer, 1,218 tokens",
        ((_PAIRFORMER, 96),),
        {
            "fwd": Reported(
                {
                    "factored": Figure(18.19, 13.62),
                    "dense bias": Figure(20.39, 13.62),
                    "no bias": Figure(8.27, 12.89),
                    "original code": Figure(26.85, 13.62),
                },
                "s per inference",
            )
        },
        "Of the original 26.85 s triangle attention takes 14.32 (Table 9); the paper factors the first 16 of 48 "
        "blocks, here both triangle attentions of all 48 are, and the network that makes the factors is not timed.",
    ),
    Experiment(
        7,
        "Pangu-Weather, fine scale",
        ((_PANGU_FINE, 4),),
        {
            "fwd": Reported(
                {
                    "factored": Figure(76.779, 12222),
                    "dense bias": Figure(79.649, 13186),
                    "no bias": Figure(74.089, 12141),
                    "original code": Figure(98.022, 26552),
                },
                memory_unit="MB",
            )
        },
        "The paper's time includes the coarse scale, whose 12 layers keep a dense bias; here are the 4 layers that are "
        "factored, without the masks of shifted windows.",
    ),
    Experiment(
        7,
        "Pangu-Weather, coarse scale",
        ((_PANGU_COARSE, 12),),
        {},
        "The paper keeps a dense bias in these 12 layers and has no time of theirs alone; here they are factored as "
        "the fine ones are, without the masks of shifted windows.",
    ),
)

PAPER_CASES = {case.name: case for experiment in EXPERIMENTS for case, _ in experiment.calls}
"""The cases of all experiments, by name."""


# -------------------------------------------------------------------- the page


def write_page(csv_path: Path) -> Path:
    """Write the page of a run beside its CSV, under the same name; what is generated stands between markers."""
    begin, _, end = markers("paper")
    introduction = (
        f"What {PAPER} reports in its Tables 3 to 7, and what this library measures at the same shapes. A ratio of two "
        "times means something, for both come from one run; times of a whole model and of its attention alone do not "
        "compare. The attention of a layer is timed once and multiplied by the number of layers."
    )
    page = csv_path.with_suffix(".md")
    replace_file(page, f"# The paper's tables\n\n{introduction}\n\n{begin}\n{render_paper(csv_path)}{end}\n")
    return page


def render_paper(csv_path: Path | str, *, summary: bool = False) -> str:
    """Make Markdown tables of a run on `PAPER_CASES`: the paper's figures beside ours, then every case.

    Args:
        csv_path: written by `run`; the JSON beside it, if there, gives the device.
        summary: the comparison alone.

    Raises:
        ValueError: the file is not a benchmark's, or holds no row of these cases.
    """
    path = Path(csv_path)
    rows = read_rows(path)
    measured = {row.case for row in rows}
    experiments = [
        version
        for experiment in EXPERIMENTS
        for version in (experiment, experiment.small())
        if measured & {case.name for case, _ in version.calls}
    ]
    if not experiments:
        raise ValueError(f"{path} holds no row of the paper's cases, which are {', '.join(PAPER_CASES)}")
    parts = [heading(path.with_suffix(".json"))]
    device = _device(path.with_suffix(".json"))
    timed: list[Row] = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        lines: list[list[str]] = []
        untimed: list[str] = []
        for experiment in experiments:
            for pass_name in PASS_TITLES:
                chosen = _rows_of(experiment, pass_name, dtype, rows)
                if any(row.status == "ok" for row in chosen):
                    lines.append(_line(experiment, pass_name, dtype, chosen, device))
                    timed += chosen
                elif chosen:
                    untimed.append(_untimed(experiment, pass_name, chosen))
        title = f"**The paper and this library, {dtype}**"
        table = markdown_table(["case", "the paper's figure", "our figure", "what differs"], lines, numbers=False)
        parts.append(f"{title}\n\n{table}" if lines else f"{title}: nothing was timed")
        parts += ["Without any time:\n\n" + "\n".join(untimed)] if untimed else []
        parts.append(_absent([row for row in rows if row.dtype == dtype]))
    if not summary:
        parts.append(render_rows(timed))
    return "\n\n".join(part for part in parts if part) + "\n"


def _device(json_path: Path) -> str:
    return json.loads(json_path.read_text())["device"] if json_path.exists() else "an unnamed device"


def _rows_of(experiment: Experiment, pass_name: str, dtype: str, rows: Sequence[Row]) -> list[Row]:
    names = {case.name for case, _ in experiment.calls}
    return [row for row in rows if (row.pass_name, row.dtype) == (pass_name, dtype) and row.case in names]


def _untimed(experiment: Experiment, pass_name: str, rows: Sequence[Row]) -> str:
    """An item of a list: a pass of which no provider has a time, and why."""
    reasons = ", ".join(dict.fromkeys(row.status for row in rows))
    return f"- Table {experiment.table}, {PASS_TITLES[pass_name].lower()}: {experiment.title} ({reasons})"


def _absent(rows: Sequence[Row]) -> str:
    """Say which peers the machine of the run did not have: the fastest of a column may be one of them."""
    peers = dict.fromkeys(row.provider.split("/", 1)[1] for row in rows if row.status == "not installed")
    return f"Not installed in this run, so in no column: {', '.join(f'`{peer}`' for peer in peers)}." if peers else ""


def _line(experiment: Experiment, pass_name: str, dtype: str, chosen: Sequence[Row], device: str) -> list[str]:
    """Cells for one pass of an experiment, of which `chosen` are all rows."""
    shapes = "".join(f"<br>{count} calls of `{case.name}`: {case.shape}" for case, count in experiment.calls)
    reported = experiment.reported.get(pass_name)
    difference = f"Attention alone against a whole model; {device} and {dtype} against {PAPER_SETTING}. "
    difference += (
        "Small versions, which say nothing about the paper's." if experiment.is_small else experiment.difference
    )
    return [
        f"Table {experiment.table}, {PASS_TITLES[pass_name].lower()}: {experiment.title}{shapes}",
        "not reported" if reported is None else _paper_cell(reported),
        _our_cell(experiment, pass_name, chosen),
        difference,
    ]


# -------------------------------------------------------------------- its cells


def _paper_cell(reported: Reported) -> str:
    figures = {method: figure for method, figure in reported.figures.items() if figure is not None}
    return _cell(
        {method: figure.time for method, figure in figures.items()},
        {},
        reported.unit,
        [f"{method} out of memory" for method in reported.figures if method not in figures],
        {method: figure.memory for method, figure in figures.items() if figure.memory is not None},
        reported.memory_unit,
    )


def _our_cell(experiment: Experiment, pass_name: str, rows: Sequence[Row]) -> str:
    """Attention of a whole pass; a family without a number on one of the cases has none."""
    times: dict[str, float] = {}
    providers: dict[str, str] = {}
    memory: dict[str, float] = {}
    missing = []
    for title, family in _families(experiment, pass_name).items():
        if not any(row.family == family for row in rows):
            continue
        best = [fastest(rows, case.name, family) for case, _ in experiment.calls]
        winners = [row for row in best if row is not None]
        if len(winners) < len(best):
            missing.append(f"{title} without a number")
            continue
        counts = [count for _, count in experiment.calls]
        times[title] = sum(count * float(row.median_ms) for count, row in zip(counts, winners, strict=True))
        providers[title] = ", ".join(dict.fromkeys(row.provider.split("/", 1)[1] for row in winners))
        if all(row.peak_mib for row in winners):
            memory[title] = max(float(row.peak_mib) for row in winners)
    return _cell(times, providers, "ms per pass", missing, memory, "MiB, of the largest call")


def _families(experiment: Experiment, pass_name: str) -> dict[str, str]:
    """Families of providers that stand beside ours, by the method that they are."""
    families = {"factored": "ours", "dense bias": "dense"}
    if pass_name == "fwdbwd" and all(case.learns_bias for case, _ in experiment.calls):
        families["dense bias with gradient"] = "dense+grad"
    return {**families, "ALiBi in place": "alibi", "no bias": "bias-free"}


def _cell(
    times: dict[str, float],
    providers: dict[str, str],
    unit: str,
    missing: Sequence[str],
    memory: dict[str, float],
    memory_unit: str,
) -> str:
    """Times by method, what has none, ratios to the factored one, and memory: a line each."""
    shown = [_quantity(method, time) + _in_brackets(providers.get(method)) for method, time in times.items()]
    lines = ["; ".join([*([f"{', '.join(shown)} {unit}"] if shown else []), *missing]) or "no number"]
    if ours := times.get("factored"):
        ratios = [f"{m} / factored **{t / ours:.2f}**" for m, t in times.items() if m not in ("factored", "no bias")]
        ratios += [f"factored / no bias **{ours / times['no bias']:.2f}**"] if "no bias" in times else []
        lines += [", ".join(ratios)] if ratios else []
    if memory:
        lines.append(f"memory: {', '.join(_quantity(method, size) for method, size in memory.items())} {memory_unit}")
    return "<br>".join(lines)


def _quantity(method: str, value: float) -> str:
    return f"{method} {round(value, 3):g}"


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""
