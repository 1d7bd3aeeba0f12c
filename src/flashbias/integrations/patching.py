"""`patch`, `unpatch`, `supports`: the machinery, which knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import nn

from flashbias.attention import implementations
from flashbias.decompose.bound import check_tol
from flashbias.integrations.base import SETTINGS, Changes, Family, Options, Plan, Tables, families_for
from flashbias.integrations.learned import learned_tables
from flashbias.integrations.report import PatchReport, UnpatchReport

__all__ = ["check_not_patched", "patch", "supports", "unpatch"]

RECORD = "_flashbias_patch"
"""The attribute of a patched model that says how to take it back."""


@dataclass(frozen=True)
class _Record:
    report: PatchReport
    changes: Changes


def patch(
    model: nn.Module,
    *,
    tol: float = 1e-3,
    tables: Tables = "exact",
    impl: str = "auto",
    train_bias: bool = False,
) -> PatchReport:
    """Make the biased attention of a model factored, in place.

    Formula: in every attention that is replaced, `softmax(scale q k^T + b) v` is computed with b as factors or as a
    relative table; neither b nor the mask is formed as an N×M matrix. A bias of the pairs of a protein is: it is
    compressed in the forward pass, or left to the model's own code, see the page "Proteins".

    Use it on a model that is loaded and before it is compiled or wrapped. Weights stay where they are, so training,
    `state_dict`, `save_pretrained` and optimisers go on as before, unless factors are to be trained. The cost is
    O((N + M) · rank) memory in place of O(N · M). Each attention either takes the form that its family calls exact, or
    one that keeps `tol`, or stays as it was; the report says which and why.

    Args:
        model: a model of a known family, or one that contains some. See the page "Models" for the list.
        tol: how far the output of one attention may move, relative to the diameter of the values that a query sees.
            Exact forms do not use it.
        tables: what learned tables over fixed places become: Swin's, BEiT's and the like. "exact": tables, which are
            trained as before. "factors": each is compressed now (well under a second for a window, some seconds for
            hundreds of tokens) to factors that keep `tol`, if these are predicted to cost less than a dense bias; the
            others stay exact tables, and the report says why. Factors are constants, for inference: if the table
            changes afterwards, or would have to be trained, the next forward pass raises. With `train_bias=True` they
            are parameters instead.
        impl: as in `flashbias.attention`: "auto", "triton", "sdpa" or "reference".
        train_bias: let the tables that become factors train as factors, which matters with `tables="factors"` alone.
            Their factors are float32 parameters (float64 beside such a table) of the model, named after the table
            with `_flashbias_factors` behind it; they need a gradient even if the table did not. Make the optimiser
            after `patch`, from `model.parameters()`: an older one does not know them. The table is frozen and its
            gradient dropped. `state_dict` has the factors too, so it loads into models that are patched in the same
            way, and elsewhere raises for unexpected keys; `unpatch` writes them to the table. Tables that a network
            makes, and others that stay exact, train as they do with `tables="exact"`, and the report says which.

    Returns:
        A `PatchReport`; print it.

    Raises:
        TypeError: `model` is not a module, or `train_bias` not a bool.
        ValueError: no attention of the model carries a bias that is known here, or it is patched already, or
            `tol`, `tables` or `impl` is none of what is allowed, or `tables="factors"` meets weights without values, or
            tables that are not finite.
        NotImplementedError: the family is known and this configuration of it is not supported; the message names it.
            Or `impl` cannot run on this machine.

    Supports:
        Training with every gradient of the unpatched model, dropout, gradient checkpointing, padding masks,
        generation with a cache. Not `output_attentions=True`: the probabilities are what is never formed.

    Examples:
        >>> import torch, flashbias as fb
        >>> from transformers import T5Config, T5EncoderModel
        >>> config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        >>> model, tokens = T5EncoderModel(config).eval(), torch.arange(20)[None]
        >>> before = model(tokens).last_hidden_state
        >>> print(fb.integrations.patch(model))
        T5EncoderModel: 1 attention replaced, 0 left, 0 unsupported
        attention                              family  status    form         rank  certificate  note
        encoder.block.0.layer.0.SelfAttention  T5      replaced  exact table     0        exact
        >>> torch.allclose(model(tokens).last_hidden_state, before, atol=1e-5)
        True
        >>> len(fb.integrations.unpatch(model))  # no table was trained as factors
        0
        >>> torch.equal(model(tokens).last_hidden_state, before)
        True

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044.
    """
    options = _checked(model, tol, impl, train_bias, tables)
    check_not_patched(model)
    planned = _planned(model, options)
    report = _report(model, planned)
    if not report.entries:
        raise ValueError(
            f"model has no attention with a bias that is known here, got {type(model).__name__}; "
            f"known are {_names(families_for(model))}"
        )
    if report.unsupported:
        entry = report.unsupported[0]
        more = f" (and {len(report.unsupported) - 1} more)" if len(report.unsupported) > 1 else ""
        raise NotImplementedError(f"{entry.family} attention {entry.name!r}{more} is not supported: {entry.note}")
    changes = Changes()
    try:
        for family, plans in planned.items():
            for plan in plans:
                if plan.apply is not None:
                    plan.apply(changes)
            family.prepare(model, changes)
    except BaseException:
        changes.undo()
        raise
    model.__dict__[RECORD] = _Record(report, changes)
    return report


def unpatch(model: nn.Module) -> UnpatchReport:
    """Take back what `patch` did to this model: every attribute, hook and configuration as it was before.

    Parameters keep the values that they have now: what was trained while patched stays trained. Factors that were
    trained in place of a table are written to it: the table becomes the one whose bias is closest to theirs, by least
    squares over all pairs and up to constants of rows, which softmax does not see. A table has fewer numbers than the
    pairs it serves, so something may be lost; the report says how much. A table that was not trained keeps its bits.

    Args:
        model: the module that `patch` was called with, or a deep copy of it.

    Returns:
        An `UnpatchReport`: the residual of each table that was written. It is empty where nothing was.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model is not patched, or a part of it was patched by itself; the message names it.
        RuntimeError: something that `patch` had set was replaced since, or a table whose factors were trained has
            another shape; nothing is changed then.
    """
    _check_module(model)
    record = model.__dict__.get(RECORD)
    if record is None:
        part = _patched_part(model)
        where = "" if part is None else f"; its part {part!r} is: unpatch that"
        raise ValueError(f"model is not patched, got {type(model).__name__}{where}")
    tables = learned_tables(model)
    for name, table in tables.items():
        table.check_shape(name)
    trained = {name: table.factors() for name, table in tables.items()}
    record.changes.undo()
    del model.__dict__[RECORD]
    written = (table.write(name, trained[name]) for name, table in tables.items())
    return UnpatchReport(type(model).__name__, tuple(entry for entry in written if entry is not None))


def supports(
    model: nn.Module,
    *,
    tol: float = 1e-3,
    tables: Tables = "exact",
    impl: str = "auto",
    train_bias: bool = False,
) -> PatchReport:
    """Say what `patch` would do, without changing anything.

    Args:
        model: as in `patch`.
        tol: as in `patch`.
        tables: as in `patch`. "factors" compresses every table, as `patch` does.
        impl: as in `patch`.
        train_bias: as in `patch`.

    Returns:
        The report that `patch` would return. It is empty for a model without a known bias, and has `unsupported`
        entries where `patch` would raise.

    Raises:
        TypeError: as in `patch`.
        ValueError: the model is patched already, or `tol`, `tables` or `impl` is none of what is allowed.
        NotImplementedError: `impl` cannot run on this machine.
    """
    options = _checked(model, tol, impl, train_bias, tables)
    check_not_patched(model)
    return _report(model, _planned(model, options))


# -------------------------------------------------------------------- planning


def _planned(model: nn.Module, options: Options) -> dict[Family, list[Plan]]:
    plans = {family: list(family.plans(model, options)) for family in families_for(model)}
    return {family: found for family, found in plans.items() if found}


def _report(model: nn.Module, planned: dict[Family, list[Plan]]) -> PatchReport:
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    entries = [plan.entry for plans in planned.values() for plan in plans]
    return PatchReport(type(model).__name__, tuple(sorted(entries, key=lambda entry: order[entry.name])))


def _names(families: list[Family]) -> str:
    return ", ".join(family.name for family in families) or "none: the model's library has no integration"


# -------------------------------------------------------------------- checks


def _checked(model: nn.Module, tol: float, impl: str, train_bias: bool, tables: Tables) -> Options:
    _check_module(model)
    if not isinstance(train_bias, bool):
        raise TypeError(f"train_bias must be a bool, got {train_bias!r}")
    if tables not in get_args(Tables):
        raise ValueError(f"tables must be 'exact' or 'factors', got {tables!r}")
    known = implementations()
    if impl != "auto" and impl not in known:
        raise ValueError(f"impl must be 'auto' or one of {sorted(known)}, got {impl!r}")
    if impl != "auto" and known[impl] is not None:
        raise NotImplementedError(f"impl={impl!r} cannot run on this machine: {known[impl]}")
    return Options(check_tol(tol), impl, train_bias, tables)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_not_patched(model: nn.Module) -> None:
    """Refuse what is no module, and a model that is patched in whole or in part."""
    _check_module(model)
    part = _patched_part(model)
    if part is not None:
        where = f", in its part {part!r}" if part else ""
        raise ValueError(f"model is patched already{where}, got {type(model).__name__}; unpatch it first")


def _patched_part(model: nn.Module) -> str | None:
    """Name of the first module that was patched, '' for the model itself, None if there is none."""
    for name, module in model.named_modules():
        if RECORD in module.__dict__ or SETTINGS in module.__dict__:
            return name
    return None
