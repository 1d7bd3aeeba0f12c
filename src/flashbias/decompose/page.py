"""One self-contained page about a bias: what to do with it, and each head's picture, spectrum, bounds and errors.

The page needs nothing but itself: no script, no font, no image from elsewhere. Heads are folded away with `details`;
colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib import resources

from torch import Tensor

from flashbias.decompose.bound import spread_allowed
from flashbias.decompose.draw import BIAS_COLOURS, ERROR_COLOURS, Axis, Chart, css_gradient, picture
from flashbias.decompose.figures import Analysis, HeadFigures
from flashbias.decompose.report import HeadReport
from flashbias.decompose.verdict import (
    advice_for_all,
    advice_for_head,
    bound,
    energy,
    form_of,
    rank_alone,
    reasons,
    size,
    times_dense,
)

__all__ = ["PAGE_BYTES", "pixels_for", "render"]

PAGE_BYTES = 12_000_000
"""What the pictures of a page may take, however many heads it has."""

FLOOR = 1e-9
"""Bounds below this are drawn there."""

WIDE = (540, 300)
"""Width and height of a chart of all heads."""

FORMS = ("low rank", "table", "table + low rank", "dense")
HEADS_IN_A_ROW = 16
MANY_HEADS = 64


def pixels_for(num_heads: int) -> int:
    """Longest side of each picture, so that a page with so many heads stays small.

    Examples:
        >>> pixels_for(12), pixels_for(376)
        (288, 109)
    """
    per_picture = PAGE_BYTES / (2 * max(1, num_heads)) * 3 / 4  # three bytes become four letters
    return max(48, min(288, int(math.sqrt(per_picture))))


def render(
    title: str, facts: Sequence[str], analyses: Sequence[Analysis], commands: Sequence[str], made_by: str
) -> str:
    """Write the page.

    Args:
        title: what was analysed.
        facts: under the title: shape, tolerance, the attention that the bias is for.
        analyses: one for each layer.
        commands: what to run next, line by line.
        made_by: last line of the page: program and version.

    Returns:
        HTML, complete.
    """
    style = (resources.files("flashbias.decompose") / "page.css").read_text()
    names = _short_names([a.name for a in analyses])
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            f'<header><div class="kicker">flashbias analyze</div><h1>{escape(title)}</h1>',
            f'<p class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p></header>',
            _verdict(analyses, names, commands),
            "<h2>All heads</h2>",
            _glance(analyses),
            _map(analyses, names),
            "<h2>Head by head</h2>",
            '<p class="soft">Open a line for its pictures. In brackets: the rank at which factors alone would do.</p>',
            *(_layer(n, a, names[n], len(analyses)) for n, a in enumerate(analyses)),
            _how_to_read(analyses[0].report.tol),
            f"<footer>{escape(made_by)}</footer></body></html>\n",
        ]
    )


# -------------------------------------------------------------------- what to do


def _verdict(analyses: Sequence[Analysis], names: Sequence[str], commands: Sequence[str]) -> str:
    forms = {form_of(a) for a in analyses}
    kind = forms.pop() if len(forms) == 1 else "mixed"
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in _tiles(analyses))
    why = "".join(f"<li>{escape(reason)}</li>" for reason in reasons(analyses, names))
    lines = "\n".join(commands)
    run = f"<pre>{escape(lines)}</pre>" if commands else ""
    return (
        f'<section class="card verdict {_css(kind)}"><span class="chip">{kind}</span>'
        f"<p>{escape(advice_for_all(analyses))}</p>"
        f'<div class="tiles">{tiles}</div>{f"<ul class=why>{why}</ul>" if why else ""}{run}</section>'
    )


def _tiles(analyses: Sequence[Analysis]) -> list[tuple[str, str]]:
    """Figures of the whole, each with what it is."""
    reports = [a.report for a in analyses]
    tol, device = reports[0].tol, reports[0].device
    dense_ms = sum(r.dense_ms for r in reports)
    used_ms = sum(r.dense_ms if a.refusal else r.cost_ms for a, r in zip(analyses, reports, strict=True))
    stored = sum(a.dense_bytes if a.stored_bytes is None else a.stored_bytes for a in analyses)
    dense = sum(a.dense_bytes for a in analyses)
    kept = [a for a in analyses if not a.refusal]
    worst = max((a.report.certificate for a in kept), default=None)
    ranks = [reports[0].break_even_rank] if len({r.break_even_rank for r in reports}) == 1 else []
    return [
        ("none" if worst is None else bound(worst), f"certificate: most that an output moves; {tol:g} was asked for"),
        (f"{used_ms / dense_ms:.2f} ×", f"predicted time, as a part of the dense bias's ({device})"),
        (size(stored), f"stored, in place of {size(dense)} in half precision"),
        *((f"{rank}", "largest rank at which factors pay") for rank in ranks),
    ]


# -------------------------------------------------------------------- all heads


def _glance(analyses: Sequence[Analysis]) -> str:
    many = " many" if sum(len(a.heads) for a in analyses) > MANY_HEADS else ""
    return (
        f'<div class="glance{many}"><figure class="card"><h3>Certificate against rank</h3>{_all_bounds(analyses).svg()}'
        "<figcaption>What factors alone can promise, one line for each head. Left of the dotted line they are "
        "predicted to be faster than a dense bias; below the dashed one they keep the tolerance.</figcaption></figure>"
        f'<figure class="card"><h3>Singular values, rows centred</h3>{_all_spectra(analyses).svg()}'
        "<figcaption>In units of each head's largest. A steep fall is a low rank.</figcaption></figure></div>"
    )


def _all_bounds(analyses: Sequence[Analysis]) -> Chart:
    heads = [h for a in analyses for h in a.heads]
    tol, pays = analyses[0].report.tol, analyses[0].report.break_even_rank
    chart = Chart(_rank_axis(heads), _bound_axis(heads, tol), "Certificate against rank, all heads", WIDE)
    for a in analyses:
        for h in a.heads:
            name = f"{a.name} head {h.report.head}".strip()
            chart.line(h.ranks, _drawn(h.certificates), f"thin {_css(h.report.form)}", name)
    chart.level(tol, "promise", f"tol {tol:g}")
    return chart.upright(pays, "limit", f"pays up to {pays}") if pays >= 1 else chart


def _all_spectra(analyses: Sequence[Analysis]) -> Chart:
    heads = [h for a in analyses for h in a.heads]
    low = min(_smallest(h.centred) for h in heads)
    chart = Chart(_rank_axis(heads), Axis("", low, 1.0, True), "Singular values of all heads, rows centred", WIDE)
    for a in analyses:
        for h in a.heads:
            first = float(h.centred[0]) or 1.0
            name = f"{a.name} head {h.report.head}".strip()
            chart.line(range(1, len(h.centred) + 1), (h.centred / first).tolist(), f"thin {_css(h.report.form)}", name)
    return chart


def _map(analyses: Sequence[Analysis], names: Sequence[str]) -> str:
    """A cell for each head: a row for each layer, or some rows for the only one."""
    rows = []
    for number, (analysis, name) in enumerate(zip(analyses, names, strict=True)):
        heads = [h.report for h in analysis.heads]
        width = HEADS_IN_A_ROW if len(analyses) == 1 else len(heads)
        for start in range(0, len(heads), width):
            some = heads[start : start + width]
            label = name if len(analyses) > 1 else f"heads {start}–{start + len(some) - 1}"
            cells = "".join(
                f'<td class="{_css(h.form)}"><a href="#{_anchor(number, h.head)}" '
                f'title="{escape(_cell_title(name, h))}">{_cell(h)}</a></td>'
                for h in some
            )
            rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    counts = Counter(h.report.form for a in analyses for h in a.heads)
    legend = "".join(
        f'<span><span class="chip {_css(form)}">{form}</span> {_heads(counts[form])}</span>'
        for form in FORMS
        if form in counts
    )
    many = " many" if len(rows) > 2 else ""
    return (
        f'<div class="card map{many}"><table>{"".join(rows)}</table><div class="legend">{legend}'
        "<span>A number is the rank, T a table, D a matrix.</span></div></div>"
    )


def _cell(h: HeadReport) -> str:
    return {"table": "T", "dense": "D", "table + low rank": f"T+{h.rank}"}.get(h.form, str(h.rank))


def _cell_title(name: str, h: HeadReport) -> str:
    return f"{name} head {h.head}: {h.form}, certificate {bound(h.certificate)}, {times_dense(h)} of dense".strip()


# -------------------------------------------------------------------- head by head


def _layer(number: int, analysis: Analysis, name: str, count: int) -> str:
    rows = [_names(), *(_head(number, analysis, h, count == 1 and n == 0) for n, h in enumerate(analysis.heads))]
    if count == 1:
        return "\n".join(rows)
    forms = Counter(h.report.form for h in analysis.heads)
    chips = " ".join(f'<span class="chip {_css(form)}">{form}</span>' for form in FORMS if form in forms)
    return (
        f'<details class="layer"{" open" if count <= 2 else ""}><summary>{escape(name)} {chips}'
        f'<span class="soft">{escape(advice_for_all([analysis]))}</span></summary>{"".join(rows)}</details>'
    )


def _names() -> str:
    """The line above the heads."""
    right = ("certificate", "energy", "extent")
    cells = ["", "", "form", "rank", *right, "time, of dense"]
    spans = "".join(f"<span{' class=n' if cell in right else ''}>{cell}</span>" for cell in cells)
    return f'<div class="row names">{spans}</div>'


def _head(number: int, analysis: Analysis, h: HeadFigures, is_open: bool) -> str:
    r = h.report
    low, high = _range(h)
    smallest = min(analysis.report.shape[-2:])
    rank = r.rank if r.form in ("low rank", "table + low rank") else (h.rank_for(analysis.report.tol) or smallest)
    ratio = r.cost_ms / r.dense_ms if r.dense_ms else 1.0
    thumb = picture(h.bias[:: _stride(h), :: _stride(h)], BIAS_COLOURS, low, high, "")
    cells = [
        thumb,
        f"<span>head {r.head}</span>",
        f'<span><span class="chip">{r.form}</span></span>',
        _bar(rank / smallest, rank_alone(h, analysis.report.tol), "" if "low rank" in r.form else "alone"),
        f'<span class="n">{bound(r.certificate)}</span>',
        f'<span class="n">{energy(r)}</span>',
        f'<span class="n">{r.extent:.3g}</span>',
        _bar(ratio, times_dense(r)),
    ]
    return (
        f'<details class="{_css(r.form)}"{" open" if is_open else ""}><summary class="row">{"".join(cells)}</summary>'
        f'<div class="figures" id="{_anchor(number, r.head)}">{"".join(_figures(analysis, h))}</div></details>'
    )


def _bar(share: float, label: str, kind: str = "") -> str:
    return (
        f'<span class="bar {kind}"><i style="--share:{100 * min(1.0, max(0.0, share)):.0f}%"></i><b>{label}</b></span>'
    )


def _figures(analysis: Analysis, h: HeadFigures) -> list[str]:
    tol = analysis.report.tol
    low, high = _range(h)
    shape = "×".join(map(str, analysis.report.shape[-2:]))
    parts = [
        _figure(
            "The bias",
            picture(h.bias, BIAS_COLOURS, low, high, f"Bias of head {h.report.head}, queries down, keys across"),
            _scale(BIAS_COLOURS, f"{low:.3g}", f"{high:.3g}"),
            f"Queries down, keys across, {shape}." + (" Blank: not read." if bool(h.bias.isnan().any()) else ""),
        ),
        _figure(
            "Singular values",
            _spectrum(h).svg(),
            "",
            "Dashed: the matrix as it is. Solid: with each row's mean taken off, which softmax does not see.",
        ),
        _figure("Certificate against rank", _bounds(analysis, h).svg(), "", _bounds_caption(h)),
        _error_figure(h, tol),
    ]
    if h.table is not None:
        parts.append(_table_figure(analysis, h))
    return [*parts, _notes(analysis, h)]


def _error_figure(h: HeadFigures, tol: float) -> str:
    worst = float(h.error.max())
    if worst == 0:
        return _figure("Error", '<div class="none">no entry differs</div>', "", f"Of {h.error_of}.")
    return _figure(
        "Error",
        picture(h.error, ERROR_COLOURS, 0.0, worst, f"Error of {h.error_of}"),
        _scale(ERROR_COLOURS, "0", _share(worst)),
        f"Of {h.error_of}: distance from the bias, constants of rows apart, as a part of what tol {tol:g} allows.",
    )


def _figure(name: str, drawing: str, scale: str, caption: str) -> str:
    return f"<figure><h3>{name}</h3>{drawing}{scale}<figcaption>{escape(caption)}</figcaption></figure>"


def _scale(colours: Sequence[str], low: str, high: str) -> str:
    return f'<div class="scale">{low}<i style="background:{css_gradient(colours)}"></i>{high}</div>'


def _spectrum(h: HeadFigures) -> Chart:
    largest = max(float(h.spectrum[0]), float(h.centred[0])) or 1.0
    low = largest * min(_smallest(h.spectrum), _smallest(h.centred))
    chart = Chart(_rank_axis([h]), Axis("", low, 1.5 * largest, True), "Singular values")
    chart.line(range(1, len(h.spectrum) + 1), h.spectrum.tolist(), "before", "as it is")
    return chart.line(range(1, len(h.centred) + 1), h.centred.tolist(), "after", "rows centred")


def _bounds(analysis: Analysis, h: HeadFigures) -> Chart:
    tol, pays = analysis.report.tol, analysis.report.break_even_rank
    chart = Chart(_rank_axis([h]), _bound_axis([h], tol), "Certificate against rank")
    if h.energy_rank:
        chart.upright(h.energy_rank, "energy", "99 % of the energy", row=1)
    if pays >= 1:
        chart.upright(pays, "limit", f"pays up to {pays}")
    chart.level(tol, "promise", f"tol {tol:g}")
    chart.line(h.ranks, _drawn(h.certificates), "svd", "SVD, rows centred")
    for rank, certificate in h.report.certificates.items():
        if rank >= 1:
            chart.dot(rank, max(certificate, FLOOR), "tried", f"rank {rank}: {bound(certificate)}")
    if h.report.form == "low rank" and h.report.rank >= 1:
        chart.dot(h.report.rank, max(h.report.certificate, FLOOR), "chosen", f"chosen: rank {h.report.rank}")
    return chart


def _bounds_caption(h: HeadFigures) -> str:
    tried = " Circles: ranks that were tried" if h.report.certificates else ""
    chosen = "; filled: the one chosen." if h.report.form == "low rank" else "." if tried else ""
    return f"Most that an output can move when factors of this rank stand for the bias.{tried}{chosen}"


def _table_figure(analysis: Analysis, h: HeadFigures) -> str:
    assert h.table is not None
    low, high = float(h.table.min()), float(h.table.max())
    if h.table.dim() == 2:
        drawing = picture(h.table, BIAS_COLOURS, low, high, "The table by offset")
        scale = _scale(BIAS_COLOURS, f"{low:.3g}", f"{high:.3g}")
        return _figure("The table", drawing, scale, f"{h.table.numel()} entries, by offset from query to key.")
    half = len(h.table) // 2
    room = 0.06 * (high - low) or 1.0
    chart = Chart(Axis("key − query", -half, half), Axis("", low - room, high + room), "The table by distance")
    chart.line(range(-half, half + 1), h.table.tolist(), "entries", "entries")
    return _figure("The table", chart.svg(), "", f"{len(h.table)} entries; beyond its ends the last one goes on.")


def _notes(analysis: Analysis, h: HeadFigures) -> str:
    tol = analysis.report.tol
    facts = {
        "certificate": f"{bound(h.report.certificate)} (asked: {tol:g})",
        "factors alone": f"rank {rank_alone(h, tol).strip('()')} for this tolerance",
        "99 % of the energy": f"rank {h.energy_rank}, certificate {bound(h.certificate_at(h.energy_rank))}",
        "extent": f"{h.report.extent:.3g}: most that the bias moves one score against another",
        "relative": h.relative or "no: equal distances differ",
        "time": f"{times_dense(h.report)} of the dense bias's",
    }
    rows = "".join(f"<dt>{what}</dt><dd>{escape(value)}</dd>" for what, value in facts.items())
    wide = " wide" if h.table is None else ""
    return f'<div class="notes{wide}"><h3>Advice</h3><p>{escape(advice_for_head(analysis, h))}</p><dl>{rows}</dl></div>'


# -------------------------------------------------------------------- how to read it


def _how_to_read(tol: float) -> str:
    items = {
        "Certificate": "With e the error of a row of the bias and δ its largest minus its smallest entry, no output "
        "moves by more than tanh(δ/4) of the diameter of the values, whatever queries, keys and values are. "
        f"tol {tol:g} allows δ = {spread_allowed(tol):.3g}.",
        "Rows centred": "A number that is the same for all keys of a query changes no probability. So each row's mean "
        "is taken off before ranks are counted.",
        "Energy": "The share of the squared entries that factors keep. Often used to choose a rank, but it promises "
        "nothing: a spike on the diagonal has little energy and decides the output.",
        "Time": "Predicted from measured times of the device named above, for the attention named above. A rank pays "
        "while its columns cost less than reading the matrix.",
    }
    parts = "".join(f"<div><h3>{name}</h3><p>{escape(text)}</p></div>" for name, text in items.items())
    return f'<h2>How to read this</h2><div class="reading">{parts}</div>'


# -------------------------------------------------------------------- small parts


def _css(form: str) -> str:
    return form.replace(" + ", "-").replace(" ", "-")


def _anchor(layer: int, head: int) -> str:
    return f"l{layer}h{head}"


def _heads(count: int) -> str:
    return f"{count} head" + ("s" if count != 1 else "")


def _share(value: float) -> str:
    """A part of what is allowed."""
    if value < 1e-4:
        return "0" if value == 0 else f"{value:.0e}"
    return f"{100 * value:.2g} %" if value < 10 else f"{value:.3g} ×"


def _stride(h: HeadFigures) -> int:
    """Pixels of a picture for one of its thumbnail."""
    return -(-max(h.bias.shape) // 64)


def _range(h: HeadFigures) -> tuple[float, float]:
    seen = h.bias[~h.bias.isnan()]
    return float(seen.min()), float(seen.max())


def _drawn(bounds: Sequence[float]) -> list[float]:
    return [max(value, FLOOR) for value in bounds]


def _rank_axis(heads: Sequence[HeadFigures]) -> Axis:
    return Axis("rank", 1, max(2, *(len(h.centred) for h in heads)), True)


def _bound_axis(heads: Sequence[HeadFigures], tol: float) -> Axis:
    """From a decade or two below the tolerance, or what is reached, up to 1."""
    lowest = min(tol, *(min(h.certificates) for h in heads))
    return Axis("", max(FLOOR, min(tol / 30, max(lowest, tol / 1000))), 1.0, True)


def _smallest(values: Tensor) -> float:
    """Lower end of an axis for singular values, in units of the largest: the last but one, if rounding leaves one."""
    if len(values) < 3 or not float(values[0]) > 0:
        return 1e-2
    return min(0.3, max(1e-7, 0.5 * float(values[-2] / values[0])))


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without the words, separated by dots or blanks, that all begin and end with."""
    words = [re.split(r"[. ]", name) for name in names]
    if len(words) < 2:
        return list(names)
    shortest = min(map(len, words))
    start = next((n for n in range(shortest) if len({w[n] for w in words}) > 1), 0)
    end = next((n for n in range(shortest - start) if len({w[-1 - n] for w in words}) > 1), 0)
    short = [".".join(w[start : len(w) - end]) for w in words]
    return [f"layer {name}" if name.isdecimal() else name for name in short]
