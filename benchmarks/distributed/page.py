"""What stands in docs/distributed.md between markers: the measured table, the picture, and the model fed with both."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Row, read, say

from flashbias.bench.report import heading, markdown_table, markers, replace_file
from flashbias.distributed.simulate import BACKWARD_WORK, Link, Machine, Workload, predict
from flashbias.files import whole_file

__all__ = ["PAGE", "PICTURE", "rewritten", "write_page"]

PAGE = ROOT / "docs" / "distributed.md"
PICTURE = ROOT / "docs" / "images" / "distributed.png"
WAYS = {
    ("ring", "zigzag"): ("ring, zigzag", "#c0392b"),
    ("ring", "contiguous"): ("ring, contiguous", "#2980b9"),
    ("ulysses", "contiguous"): ("all-to-all", "#27ae60"),
    ("alone", "contiguous"): ("one GPU", "#7f8c8d"),
}
LANGUAGE = "alibi-128"
IMAGE = "![Time, efficiency and memory against tokens](images/distributed.png)"


def write_page(results: Path, page: Path, picture: Path) -> None:
    """Write the tables of a run into the page, and draw its picture.

    Args:
        results: folder of the run's CSV and JSON.
        page: file with the markers.
        picture: file to draw.

    Raises:
        FileNotFoundError: the folder has no run.
        ValueError: the page has no markers, or the run not what the model is fed with.
    """
    rows, _ = read(results, "distributed")
    if not rows:
        raise FileNotFoundError(f"{results} has no distributed.csv with rows and distributed.json")
    replace_file(page, rewritten(page.read_text(), results))
    draw(rows, picture)
    say(f"written: {page.name} and {picture.name}")


def rewritten(text: str, results: Path) -> str:
    """The text of the page with the tables of a run."""
    rows, about = read(results, "distributed")
    measured = (heading(results / "distributed.json"), table(rows), sentences(rows, about), IMAGE)
    parts = {"distributed": "\n\n".join(measured), "thousand": thousand(rows, about)}
    for name, part in parts.items():
        begin, _, end = markers(name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page must have one {begin} and one {end}")
        text = f"{text.split(begin)[0]}{begin}\n{part}\n{end}{text.split(end)[1]}"
    return text


# -------------------------------------------------------------------- what was measured


def table(rows: Sequence[Row]) -> str:
    """Time, then memory and bytes: one line for each problem and way."""
    times, costs = [], []
    for (case, n, way), passes in _by_line(rows).items():
        forward, both = passes.get("fwd", {}), passes.get("fwdbwd", {})
        about = [case, f"{int(n):,}", WAYS[way][0]]
        times.append([
            *about, _ms(forward), _or_dash(forward.get("efficiency")), _ms(both), _or_dash(both.get("efficiency")),
            _or_dash(both.get("impl")), _or_dash(both.get("error")),
        ])  # fmt: skip
        costs.append([
            *about, _number(both, "peak_mib", "{:,.0f}"), _kib_per_token(n, both), _number(both, "sent_mb", "{:,.1f}"),
            _number(both, "theory_mb", "{:,.1f}"), _percent(both, "bias_share"), _percent(both, "bias_share_theory"),
            _number(both, "dense_bias_gb", "{:,.0f}"),
        ])  # fmt: skip
    own = ["problem", "tokens", "way"]
    above = ["forward, ms", "efficiency", "forward and backward, ms", "efficiency", "blocks through", "error"]
    below = [
        "peak per GPU, MiB", "KiB per token of a GPU", "sent per GPU, MB", "theory, MB", "more for the bias", "theory",
        "a dense bias, GB",
    ]  # fmt: skip
    return f"{markdown_table(own + above, times)}\n\n{markdown_table(own + below, costs)}"


def _by_line(rows: Sequence[Row]) -> dict[tuple[str, str, tuple[str, str]], dict[str, Row]]:
    lines: dict[tuple[str, str, tuple[str, str]], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (str(row["case"]), int(str(row["n"])))):
        key = str(row["case"]), str(row["n"]), (str(row["strategy"]), str(row["order"]))
        lines.setdefault(key, {})[str(row["pass"])] = row
    return lines


def _or_dash(value: object) -> str:
    return str(value) if value not in ("", None) else "–"


def _ms(row: Mapping[str, object]) -> str:
    ms = str(row.get("ms", ""))
    return f"{float(ms):,.1f}" if ms else _or_dash(row.get("status"))


def _number(row: Mapping[str, object], column: str, form: str) -> str:
    value = str(row.get(column, ""))
    return form.format(float(value)) if value else "–"


def _kib_per_token(n: str, row: Mapping[str, object]) -> str:
    peak = str(row.get("peak_mib", ""))
    return f"{float(peak) * 1024 * int(str(row['cp_size'])) / int(n):.1f}" if peak else "–"


def _percent(row: Mapping[str, object], column: str) -> str:
    value = str(row.get(column, ""))
    return f"{100 * float(value):.3f} %" if value else "–"


def sentences(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """What the table says, in words made from its numbers."""
    summary = about["summary"]
    long = [row for row in rows if int(str(row["n"])) >= 65_536 and row["efficiency"]]
    said = []
    for (strategy, order), (title, _) in WAYS.items():
        found = [float(str(r["efficiency"])) for r in long if (r["strategy"], r["order"]) == (strategy, order)]
        if found:
            said.append(f"{title} {min(found):.2f} to {max(found):.2f}")
    text = (
        f"Shared by {summary['gpus']} GPUs. Efficiency is the time of one GPU over the GPUs' number times their time."
    )
    if said:
        text += f" From 65,536 tokens on it is: {'; '.join(said)}."
    if "link" in summary:
        link = summary["link"]
        text += (
            f" A hop of the ring, sending and receiving at once, takes {1e6 * link['alpha_s']:.0f} µs and a second for "
            f"every {link['beta_bytes_per_s'] / 1e9:.0f} GB."
        )
    if summary.get("left_out"):
        text += f" Left out for want of time: {', '.join(summary['left_out'])}."
    return text


# -------------------------------------------------------------------- the model


def _literal(x: float) -> str:
    """Three digits, as a formatter of Python writes them."""
    return f"{x:.3g}".replace("e+", "e")


def thousand(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The block of Python that feeds the model with what was measured, what it prints, and the model beside that."""
    timed = [row for row in rows if (row["case"], row["strategy"]) == (LANGUAGE, "alone") and row["ms"]]
    longest = max((int(str(row["n"])) for row in timed), default=0)
    alone = {str(row["pass"]): row for row in timed if int(str(row["n"])) == longest}
    if set(alone) != {"fwd", "fwdbwd"} or "link" not in about["summary"]:
        raise ValueError(
            f"the model is fed with both passes of {LANGUAGE} on one GPU and with a link; some are missing"
        )
    tokens = int(str(alone["fwd"]["n"]))
    seconds = {name: float(str(row["ms"])) / 1000 for name, row in alone.items()}
    measured = _workload(tokens)
    forward = _rounded(measured.forward_work / seconds["fwd"])
    backward = _rounded(BACKWARD_WORK * measured.forward_work / (seconds["fwdbwd"] - seconds["fwd"]))
    link = about["summary"]["link"]
    alpha, beta = _rounded(link["alpha_s"]), _rounded(link["beta_bytes_per_s"])
    code = f"""\
from flashbias.distributed.simulate import Link, Machine, Workload, simulate, simulation_table

machine = Machine(
    forward_flops={_literal(forward)},  # measured: {tokens:,} tokens of alibi-128 on one GPU
    backward_flops={_literal(backward)},  # measured likewise, forward and backward less forward
    near=Link(alpha={_literal(alpha)}, beta={_literal(beta)}),  # measured: a hop between GPUs of one host
    far=Link(alpha=20e-6, beta=45e9),  # not measured: one 400 Gb/s adapter for each GPU
    node=8,
)
alibi = Workload(seqlen=2**20, num_heads=32, num_kv_heads=32, head_dim=128, rank=2, factor_heads=1)
print(simulation_table(simulate(alibi, machine)))
"""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/distributed.md", "exec"), {})
    machine = Machine(forward, backward, Link(alpha, beta), Link(20e-6, 45e9))
    return (
        "Kernels and the link within a host are measured (above); the link between hosts is that of a data sheet.\n\n"
        f"```python\n{code}```\n\n<!-- simulation:begin -->\n{printed.getvalue().strip()}\n<!-- simulation:end -->\n\n"
        f"{_against_the_measured(rows, machine)}"
    )


def _workload(tokens: int) -> Workload:
    return Workload(seqlen=tokens, num_heads=32, num_kv_heads=32, head_dim=128, rank=2, factor_heads=1)


def _against_the_measured(rows: Sequence[Row], machine: Machine) -> str:
    """The model beside the table above, where they speak of the same."""
    lines = []
    for row in rows:
        is_balanced = (row["strategy"], row["order"]) in (("ring", "zigzag"), ("ulysses", "contiguous"))
        if row["case"] == LANGUAGE and row["pass"] == "fwdbwd" and is_balanced and row["ms"]:
            size = int(str(row["cp_size"]))
            found = predict(_workload(int(str(row["n"]))), machine, size, str(row["strategy"]))
            lines.append([
                f"{int(str(row['n'])):,}", str(row["strategy"]), f"{1000 * found.seconds:,.1f} ms",
                f"{float(str(row['ms'])):,.1f} ms",
            ])  # fmt: skip
    return "The model beside what was measured, forward and backward, on the GPUs at hand:\n\n" + markdown_table(
        ["tokens", "way", "by the model", "measured"], lines
    )


def _rounded(x: float) -> float:
    """Three digits, as the page shows them."""
    return 0.0 if x == 0 else round(x, 2 - math.floor(math.log10(abs(x))))


# -------------------------------------------------------------------- the picture


def draw(rows: Sequence[Row], picture: Path) -> None:
    """Time, efficiency and memory against tokens, for the language model and the mesh."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    both = [row for row in rows if row["pass"] == "fwdbwd" and row["ms"]]
    panels = (("ms", "forward and backward, ms", "log"), ("efficiency", "efficiency", "linear"),
              ("peak_mib", "peak memory per GPU, MiB", "log"))  # fmt: skip
    grid = figure.subplots(len(cases), len(panels), squeeze=False)
    for line, case in zip(grid, cases, strict=True):
        for axes, (column, title, scale) in zip(line, panels, strict=True):
            for (strategy, order), (label, colour) in WAYS.items():
                shown = [r for r in both if (r["case"], r["strategy"], r["order"]) == (case, strategy, order)]
                pairs = sorted((int(str(r["n"])), float(str(r[column]))) for r in shown if r[column] not in ("", None))
                if pairs:
                    axes.plot(*zip(*pairs, strict=True), marker="o", color=colour, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale(scale)
            if column == "efficiency":
                axes.axhline(1.0, color="#bdc3c7", linewidth=1)
                axes.set_ylim(0, 1.25)
            axes.set_title(f"{case}: {title}", fontsize=9)
            axes.set_xlabel("tokens", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        line[0].legend(fontsize=8)
    with whole_file(picture) as part:
        figure.savefig(part, dpi=130, format="png")
