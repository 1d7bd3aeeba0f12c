"""`TableFamily`: families whose bias is a learned table over fixed places, exact as a table or, when asked, as factors.

A table is compressed when the model is patched, as `flashbias.compress` does it: the smallest rank that keeps the
tolerance, in bfloat16 where that suffices, if it is predicted to cost less than the dense bias. Otherwise it stays an
exact table. Factors are constants, or parameters that are trained in place of the table. Masks of shifted windows are
no part of it: they are exact factors, and are added in the forward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from flashbias.attention.workload import Workload
from flashbias.decompose.compress import compress
from flashbias.decompose.report import NotLowRankError, Report
from flashbias.decompose.verdict import bound
from flashbias.factored import FactoredBias
from flashbias.integrations.base import Changes, ExactFamily, Options, Plan
from flashbias.integrations.call import settings_of
from flashbias.integrations.factors import Source, TableFactors
from flashbias.integrations.learned import LearnedTable, why_not_learned
from flashbias.integrations.report import AttentionEntry

__all__ = ["StaticTable", "TableFamily", "evaluating"]


CONSTANT = "a head is constant within tol: factors of rank 0 learn nothing, so the table stays, and trains"
"""Why a table that could be factors is none where these are to be trained; a new model's tables are zero."""


@dataclass(frozen=True)
class StaticTable:
    """The bias of one attention, for the places that it is made for.

    Args:
        bias: exact, as a table.
        sources: what it was computed from.
        window: as in `TableFactors`.
    """

    bias: FactoredBias
    sources: list[Source]
    window: tuple[int, int] | None = None


class TableFamily(ExactFamily, register=False):
    """A family with learned tables over fixed places."""

    form = "exact table"
    rank = 0
    factors_note: ClassVar[str] = ""
    """What is worth knowing where the table has become factors."""
    learned_note: ClassVar[str] = "the certificate holds until they are trained"
    """The same where the factors are trained."""

    @abstractmethod
    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one attention."""

    def plan_within(self, model: nn.Module, name: str, attention: nn.Module, options: Options) -> Plan:
        """Compress the table if that was asked for."""
        exact = self.plan(name, attention, options)
        if options.tables == "exact":
            return exact
        read = partial(self.static_table, model, attention)
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            static = read()
            _check_values(name, static)
            reason = why_not_learned(static.sources, read) if options.train_bias else None
            if reason is not None:
                return Plan(replace(exact.entry, note=reason), exact.apply)
            try:
                bias = _compressed(static.bias, options)
            except NotLowRankError as refusal:
                return Plan(replace(exact.entry, note=_why_not(refusal.report)), exact.apply)
        assert isinstance(bias.report, Report)
        if options.train_bias and min(bias.report.ranks) < 1:
            return Plan(replace(exact.entry, note=CONSTANT), exact.apply)
        if options.train_bias:
            factors = LearnedTable(bias, static.sources, read, static.window)
        else:
            factors = TableFactors(bias, static.sources, static.window)

        def apply(changes: Changes) -> None:
            self.change(attention, options, changes)
            settings_of(attention).factors = factors
            if isinstance(factors, LearnedTable):
                factors.register(changes)

        return Plan(self._entry(exact.entry, bias, options), apply)

    def _entry(self, exact: AttentionEntry, bias: FactoredBias, options: Options) -> AttentionEntry:
        """The line of the report for a table that becomes factors."""
        assert isinstance(bias.report, Report)
        return replace(
            exact,
            form="learned factors" if options.train_bias else "factors",
            rank=max(bias.report.ranks),
            certificate=bias.report.certificate,
            note=self.learned_note if options.train_bias else self.factors_note,
        )


def _check_values(name: str, static: StaticTable) -> None:
    for source in static.sources:
        if source.values.is_meta:
            raise ValueError(
                f"tables='factors' needs the values of {source.path!r} of {name!r}, which is on the meta "
                "device; load the model's weights first"
            )
        bad = int((~torch.isfinite(source.values)).sum())
        if bad:
            raise ValueError(
                f"tables='factors' needs finite values, and {source.path!r} of {name!r} has {bad} that are not"
            )


def _compressed(table: FactoredBias, options: Options) -> FactoredBias:
    """Compress a table. Factors that are trained are float32 parameters, and cost what a step of training costs."""
    dense = table.dense()
    if options.train_bias:
        workload = Workload(*dense.shape, head_dim=64, training="bias")
        bias = compress(dense, options.tol, table=None, workload=workload, factor_dtype=torch.float32)
    else:
        bias = compress(dense, options.tol, table=None)
    assert isinstance(bias, FactoredBias), "heads of one form only were allowed"
    return bias


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate: networks that make a table may have dropout. Only the flags are set, and put back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


def _why_not(report: Report) -> str:
    """Say in a few words why a table has no factors."""
    lost = [head for head in report.heads if head.form == "dense"]
    if report.break_even_rank < 1:
        return "no factors: not even one column pays"
    if not lost:
        return f"no factors: they need rank {max(report.ranks)} and pay up to {report.break_even_rank}"
    worst = max(lost, key=lambda head: head.certificate)
    return (
        f"no factors: up to rank {report.break_even_rank}, where they stop paying, "
        f"those of head {worst.head} reach {bound(worst.certificate)}"
    )
