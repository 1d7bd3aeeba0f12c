"""What an analysis comes to, in sentences: what to do with a bias, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from flashbias.decompose.figures import Analysis, HeadFigures
from flashbias.decompose.report import HeadReport, Report

__all__ = [
    "advice_for_all",
    "advice_for_head",
    "bound",
    "energy",
    "form_of",
    "rank_alone",
    "reasons",
    "refusal_of",
    "size",
    "times_dense",
]

EXACT = 1e-12
"""Bounds below this are rounding."""


IN_WORDS = {"low rank": "factors", "table": "a table", "table + low rank": "a table and factors"}


# -------------------------------------------------------------------- numbers as text


def bound(certificate: float) -> str:
    """A certificate with two digits.

    Examples:
        >>> bound(0.01934), bound(0.0)
        ('0.019', 'exact')
    """
    return "exact" if certificate < EXACT else f"{certificate:.2g}"


def size(count: float) -> str:
    """A number of bytes.

    Examples:
        >>> size(3_300_000), size(512)
        ('3.1 MiB', '512 B')
    """
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1024, power + 1
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count:.0f} {unit}" if power == 0 or count >= 100 else f"{count:.1f} {unit}"


def times_dense(head: HeadReport) -> str:
    """Predicted time as a part of the dense bias's."""
    return f"{head.cost_ms / head.dense_ms:.2f}" if math.isfinite(head.dense_ms) and head.dense_ms > 0 else "0"


def energy(head: HeadReport) -> str:
    """Share of the energy that factors keep, where it is they that stand for the bias or came nearest.

    Examples:
        >>> energy(HeadReport(0, "low rank", 4, 1e-4, 0.1, 0.2, 3.0, 0.99987))
        '0.9999'
    """
    has_factors = head.form == "low rank" or (head.form == "dense" and head.certificate > 0)
    return f"{head.energy:.4f}" if has_factors else "–"


def rank_alone(head: HeadFigures, tol: float) -> str:
    """The rank of the chosen factors, or in brackets the one that factors alone would need."""
    if head.report.form in ("low rank", "table + low rank"):
        return str(head.report.rank)
    rank = head.rank_for(tol)
    return f"(> {head.ranks[-1]})" if rank is None else f"({rank})"


def _moved(certificate: float) -> str:
    if certificate < EXACT:
        return "no output moves"
    return f"no output moves by more than {bound(certificate)} of the diameter of its values"


def _alone(head: HeadFigures, tol: float) -> str:
    rank = head.rank_for(tol)
    return f"more than {head.ranks[-1]}" if rank is None else str(rank)


def _heads(count: int) -> str:
    return f"{count} head" + ("s" if count != 1 else "")


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


# -------------------------------------------------------------------- the whole


def form_of(analysis: Analysis) -> str:
    """The form of a layer: that of its heads, "dense" after a refusal, "mixed" where heads differ."""
    if analysis.refusal:
        return "dense"
    forms = {h.report.form for h in analysis.heads}
    return forms.pop() if len(forms) == 1 else "mixed"


def advice_for_all(analyses: Sequence[Analysis]) -> str:
    """What to do, in one or two sentences.

    Args:
        analyses: of the layers, one or more.

    Returns:
        The sentences.
    """
    if len(analyses) == 1:
        return _advice_for_layer(analyses[0])
    pays = [a for a in analyses if not a.refusal]
    if not pays:
        return f"Keep all {len(analyses)} layers dense: none has a form that pays."
    forms = Counter(form_of(a) for a in pays)
    all_or_some = f"all {len(pays)} layers" if len(pays) == len(analyses) else f"{len(pays)} of {len(analyses)} layers"
    listed = next(iter(forms)) if len(forms) == 1 else ", ".join(f"{f} in {n}" for f, n in forms.most_common())
    kept = [h.report.rank for a in pays for h in a.heads if "low rank" in h.report.form]
    ranks = f" ({_span(kept)})" if kept else ""
    rest = "" if len(pays) == len(analyses) else "; keep the others dense"
    return f"Replace the bias of {all_or_some}: {listed}{ranks}{rest}."


def _advice_for_layer(a: Analysis) -> str:
    report, form = a.report, form_of(a)
    if a.refusal or form == "dense":
        return f"Keep it dense. No form keeps a tolerance of {report.tol:g} at less than the time of a dense bias."
    ratio = f"predicted to take {report.cost_ms / report.dense_ms:.2f} of the time of a dense bias"
    table = f"a relative table of {report.table_entries} entries, read by {report.codes}"
    moved = _moved(report.certificate)
    if form == "table":
        exact = "It is exact" if report.certificate < EXACT else moved.capitalize()
        return f"Use {table}. {exact}, and it is {ratio}."
    kept = [h.report.rank for h in a.heads if "low rank" in h.report.form]
    factors = f"factors of {_span(kept)} in {report.factor_dtype}" if kept else ""
    if form == "low rank":
        return f"Use {factors}: {moved}. They are {ratio}."
    if form == "table + low rank":
        return f"Use {table}, beside {factors}: {moved}. Together they are {ratio}."
    forms = Counter(h.report.form for h in a.heads)
    dense = forms.pop("dense", 0)
    use = [f"{form} for {_heads(count)}" for form, count in forms.most_common()]
    keep = [f"keep {_heads(dense)} dense"] if dense else []
    todo = " and ".join([f"use {', '.join(use)}"] * bool(use) + keep)
    return f"{todo.capitalize()}: {moved}. It is {ratio}."


def reasons(analyses: Sequence[Analysis], names: Sequence[str]) -> list[str]:
    """Why layers were refused, one line for each reason; with several layers, of the first that was refused.

    Args:
        analyses: of the layers.
        names: what to call them.

    Returns:
        The lines, none where nothing was refused.
    """
    refused = [(a, name) for a, name in zip(analyses, names, strict=True) if a.refusal]
    if not refused:
        return []
    analysis, name = refused[0]
    lines = _reasons_of(analysis)
    return lines if len(analyses) == 1 else [f"{name}: {line}" for line in lines]


def refusal_of(report: Report) -> str:
    """Say in one line why nothing pays, from a report alone.

    Args:
        report: of the refusal.

    Returns:
        The line.
    """
    start = f"no form keeps tol {report.tol:g} at less than the predicted time of a dense bias ({report.device})"
    lost = [h for h in report.heads if h.form == "dense"]
    if not lost:
        return f"{start}: {IN_WORDS[report.heads[0].form]} would take {report.cost_ms / report.dense_ms:.2f} of it"
    worst = max(lost, key=lambda h: h.certificate)
    return (
        f"{start}: factors fail for {len(lost)} of {_heads(len(report.heads))}, where head {worst.head} reaches "
        f"{bound(worst.certificate)} at rank {worst.rank}"
    )


def _reasons_of(a: Analysis) -> list[str]:
    tol, pays = a.report.tol, a.report.break_even_rank
    tried = max((h.report.rank for h in a.heads if h.report.form == "dense"), default=pays)
    limit = min(pays, tried)
    worst = max(a.heads, key=lambda h: h.certificate_at(limit))
    lines = []
    if pays < 1:
        lines.append("Not even one column of factors costs less than reading the matrix here.")
    else:
        lines.append(
            f"Factors {'pay' if limit == pays else 'were tried'} up to rank {limit}, where the certificate of head "
            f"{worst.report.head} is {bound(worst.certificate_at(limit))}. "
            f"For {tol:g} it takes rank {_alone(worst, tol)} of {min(a.report.shape[-2:])}."
        )
    energy_bound = worst.certificate_at(worst.energy_rank)
    if energy_bound > tol:
        lines.append(
            f"Energy says little: that head keeps 99 % of it at rank {worst.energy_rank}, where the certificate is "
            f"still {bound(energy_bound)}."
        )
    lines.append(_table_reason(a))
    paying = sum(h.report.form != "dense" and h.report.cost_ms < h.report.dense_ms for h in a.heads)
    if paying:
        lines.append(f"{_heads(paying)} of {len(a.heads)} would pay alone: allow_dense keeps the others as a matrix.")
    return lines


def _table_reason(a: Analysis) -> str:
    relative = next((h.relative for h in a.heads if h.relative), "")
    if relative and any("table" in h.report.form for h in a.heads):
        ratio = a.report.cost_ms / a.report.dense_ms
        return (
            f"It is relative, by {relative}, but a table is predicted to take {ratio:.2f} of the time of the matrix. "
            "table='exact' takes it all the same, for its memory and its gradients."
        )
    if relative:
        return f"Some heads are relative, by {relative}, but not all: one table cannot serve the layer."
    best = min(h.line_certificate for h in a.heads)
    return (
        "It is no relative bias: pairs of tokens at the same distance differ, and the best table along a line "
        f"certifies {bound(best)} at best."
    )


# -------------------------------------------------------------------- one head


def advice_for_head(analysis: Analysis, h: HeadFigures) -> str:
    """What to do with one head, in a sentence or two."""
    r, tol = h.report, analysis.report.tol
    moved = _moved(r.certificate)
    ratio = f"{times_dense(r)} of the time of the matrix"
    alone = f"factors alone would need rank {_alone(h, tol)}"
    if r.form == "dense":
        reached = f"; rank {r.rank}, the largest tried, reaches {bound(r.certificate)}" if analysis.refusal else ""
        return f"Keep the matrix: {alone}{reached}."
    if r.cost_ms >= r.dense_ms:
        return f"Keep the matrix: {IN_WORDS[r.form]} would keep the tolerance, but take {ratio}."
    if analysis.refusal:
        return f"On its own it would pay as {r.form}: {moved}, in {ratio}. Other heads of the layer do not."
    if r.form == "table":
        exact = "it is exact" if r.certificate < EXACT else moved
        return f"Use the table: {exact}. {alone.capitalize()}; {_pays(analysis)}."
    if r.form == "table + low rank":
        return f"Use the table for what is sharp and rank {r.rank} for what is smooth: {moved}; {alone}."
    if r.rank == 0:
        return "Leave the bias out: up to the tolerance it is constant along each row, which softmax does not see."
    return f"Use factors of rank {r.rank}: {moved}. They take {ratio}."


def _pays(analysis: Analysis) -> str:
    rank = analysis.report.break_even_rank
    return f"they pay up to rank {rank}" if rank >= 1 else "no rank pays here"
