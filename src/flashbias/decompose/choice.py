"""The choice among the forms that keep the promise, and what is made of it: a bias and its report, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from flashbias.decompose.fit import Fit
from flashbias.decompose.relative import Codes
from flashbias.decompose.report import HeadReport, Report
from flashbias.decompose.request import Request
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__all__ = ["Evidence", "Group", "Option", "bias_of", "cheapest_groups", "cheapest_of_each", "report_of"]

GROUP = 0.05
"""Share of the time that a further group of heads adds: a launch, and tokens that are gathered."""


@dataclass(frozen=True, eq=False)
class Option:
    """One form for all heads.

    Args:
        form: its name, as in a report.
        dtype: of the factors.
        fits: one for each head, None where it has none that keeps the promise.
        costs: predicted milliseconds of each head, infinite where it has no fit.
        codes: how the table is read, if there is one.
    """

    form: str
    dtype: torch.dtype
    fits: Sequence[Fit | None]
    costs: Sequence[float]
    codes: Codes | None = None


@dataclass(frozen=True)
class Group:
    """Heads in one form; an option of None keeps them dense."""

    option: Option | None
    heads: tuple[int, ...]


@dataclass
class Evidence:
    """What was found out about one head on the way.

    Args:
        extent: largest spread of a row of the bias.
        energy: share of the squared entries, rows centred, that the best factors keep.
        certificates: rank to certificate, for the ranks that were tried without a table.
    """

    extent: float = 0.0
    energy: float = 0.0
    certificates: dict[int, float] = field(default_factory=dict)


def cheapest_groups(
    options: Sequence[Option], num_heads: int, dense_ms: float, allow_dense: bool
) -> tuple[Group, ...] | None:
    """Find the forms with the smallest predicted time.

    Args:
        options: what keeps the promise.
        num_heads: number of heads.
        dense_ms: predicted time of a dense head.
        allow_dense: whether heads may differ in form, dense ones among them.

    Returns:
        Groups that hold each head once; None if nothing costs less than dense heads and these are not allowed.
    """
    forms: list[tuple[Option | None, Sequence[float]]] = [(option, option.costs) for option in options]
    if allow_dense:
        forms.append((None, [dense_ms] * num_heads))
    best, least = None, dense_ms * num_heads
    for size in range(1, len(forms) + 1 if allow_dense else 2):
        for some in combinations(forms, size):
            groups, cost = cheapest_of_each(some, num_heads)
            if cost < least:
                best, least = groups, cost
    if best is None and allow_dense:
        return (Group(None, tuple(range(num_heads))),)
    return best


def cheapest_of_each(
    forms: Sequence[tuple[Option | None, Sequence[float]]], num_heads: int
) -> tuple[tuple[Group, ...], float]:
    """Give each head the cheapest of some forms; what all of them cost together."""
    picks = [min(range(len(forms)), key=lambda form, h=h: forms[form][1][h]) for h in range(num_heads)]
    groups = tuple(
        Group(forms[form][0], tuple(h for h, pick in enumerate(picks) if pick == form)) for form in sorted(set(picks))
    )
    cost = sum(forms[pick][1][h] for h, pick in enumerate(picks))
    return groups, cost * (1.0 + GROUP * (len(groups) - 1))


# -------------------------------------------------------------------- the bias


def bias_of(groups: Sequence[Group], request: Request, report: Report) -> FactoredBias | MixedBias:
    """Make the bias: one `FactoredBias` where all heads have one form."""
    if len(groups) == 1 and groups[0].option is not None:
        return replace(_factored(groups[0], request), report=report)
    parts = tuple(_dense(group, request) if group.option is None else _factored(group, request) for group in groups)
    return MixedBias(parts, tuple(group.heads for group in groups), report)


def _dense(group: Group, request: Request) -> Tensor:
    heads = list(group.heads)
    matrix = request.bias[heads]
    return matrix if request.mask is None else matrix.masked_fill(~request.mask[heads], 0.0)


def _factored(group: Group, request: Request) -> FactoredBias:
    """Stack the heads' factors, padded to the widest, and their tables."""
    option = group.option
    assert option is not None
    fits = [fit for fit in (option.fits[h] for h in group.heads) if fit is not None]
    assert len(fits) == len(group.heads), "a head is put only where it has a fit"
    ranks = torch.tensor([fit.rank for fit in fits])
    # A batch of biases shares the ranks of its heads.
    ranks = ranks.reshape(-1, request.num_heads).amax(0) if request.biases > 1 else ranks
    width = max(int(ranks.max()), 0 if option.codes else 1)

    def stacked(side: str, length: int) -> Tensor:
        out = torch.zeros(len(fits), length, width, dtype=option.dtype, device=request.bias.device)
        for row, fit in zip(out, fits, strict=True):
            row[:, : fit.rank] = getattr(fit.factors, side)
        return out if request.biases == 1 else out.reshape(*request.shape[:-2], length, width)

    table, code_q, code_k = None, None, None
    if option.codes is not None:
        table = torch.stack([fit.table for fit in fits if fit.table is not None]).to(torch.float32)
        if not option.codes.is_positions:
            code_q, code_k = option.codes.code_q, option.codes.code_k
    return FactoredBias(
        stacked("left", request.shape[-2]),
        stacked("right", request.shape[-1]),
        table,
        code_q,
        code_k,
        None if bool((ranks == width).all()) else ranks.tolist(),
    )


# -------------------------------------------------------------------- the report


def report_of(
    groups: Sequence[Group],
    evidence: Sequence[Evidence],
    request: Request,
    *,
    dense_ms: float,
    device: str,
    break_even_rank: int,
    seconds: float,
    refused: bool = False,
) -> Report:
    """Say what was found; `refused`: that dense heads are no form that was chosen, but what nothing could replace."""
    heads = {h: _head_report(h, group.option, evidence[h], dense_ms, refused) for group in groups for h in group.heads}
    options = [group.option for group in groups if group.option is not None]
    tables = {
        str(o.codes): len(fit.table) for o in options for fit in o.fits if fit is not None and fit.table is not None
    }
    return Report(
        tol=request.tol,
        shape=tuple(request.shape),
        heads=tuple(heads[h] for h in sorted(heads)),
        codes=" and ".join(tables),
        table_entries=max(tables.values(), default=0),
        factor_dtype=" and ".join(dict.fromkeys(str(o.dtype).removeprefix("torch.") for o in options)),
        break_even_rank=break_even_rank,
        device=device,
        certified_for=("probabilities like the calibration's" if request.calibrated else "every query, key and value"),
        seconds=seconds,
    )


def _head_report(head: int, option: Option | None, evidence: Evidence, dense_ms: float, refused: bool) -> HeadReport:
    fit = None if option is None else option.fits[head]
    tried = dict(sorted(evidence.certificates.items()))
    common = {"head": head, "dense_ms": dense_ms, "extent": evidence.extent, "certificates": tried}
    if option is not None and fit is not None:
        return HeadReport(
            form=option.form,
            rank=fit.rank,
            certificate=fit.certificate,
            cost_ms=option.costs[head],
            energy=fit.energy,
            **common,
        )
    return HeadReport(
        form="dense",
        rank=max(tried, default=0),
        certificate=min(tried.values(), default=1.0) if refused else 0.0,
        cost_ms=dense_ms,
        energy=evidence.energy if refused else 1.0,
        **common,
    )
