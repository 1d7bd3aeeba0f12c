"""`unpatched_state_dict`: a state_dict in which tables are trained factors, made one of the unpatched model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from flashbias.decompose.learned import LowRankBias
from flashbias.factored import FactoredBias
from flashbias.integrations.base import families_for
from flashbias.integrations.learned import SUFFIX, LearnedTable
from flashbias.integrations.patching import check_not_patched
from flashbias.integrations.report import UnpatchReport
from flashbias.integrations.tables import TableFamily, evaluating

__all__ = ["unpatched_state_dict"]


def unpatched_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], UnpatchReport]:
    """Convert what a model saved while its tables were trained as factors, so that the unpatched model loads it.

    Formula: each table becomes the one whose bias is closest to `phi_q phi_k^T`, by least squares over all pairs and up
    to constants of rows, as `unpatch` writes it.

    Use it for a checkpoint of a model patched with `tables="factors", train_bias=True`, where the patched model is at
    hand no more. While it is, `unpatch` does this, and leaves tables to the bit that were not trained. A checkpoint
    does not say whether they were: here each table moves to its factors, and one that was not trained by the error of
    its compression. A state_dict without factors comes back as it is.

    Args:
        model: an unpatched model of the same configuration. It is copied, not changed.
        state_dict: of the patched model.

    Returns:
        A state_dict that `model.load_state_dict` takes, and a report with the residual of each table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model is patched, or has no table for some of the factors.
        RuntimeError: the rest of the state_dict does not fit the model.

    Examples:
        >>> import torch, flashbias as fb
        >>> from transformers import SwinConfig, SwinModel
        >>> shape = dict(image_size=16, patch_size=2, window_size=4, embed_dim=8, depths=[1], num_heads=[1])
        >>> plain, patched = SwinModel(SwinConfig(**shape)), SwinModel(SwinConfig(**shape))
        >>> (table,) = (name for name, _ in plain.named_parameters() if name.endswith("relative_position_bias_table"))
        >>> _ = torch.nn.init.normal_(patched.get_parameter(table))  # a new model's are zero
        >>> report = fb.integrations.patch(patched, tol=0.1, tables="factors", train_bias=True)
        >>> saved = patched.state_dict()  # and a process later:
        >>> converted, report = fb.integrations.unpatched_state_dict(plain, saved)
        >>> plain.load_state_dict(converted)
        <All keys matched successfully>
        >>> [written.name == table for written in report]
        [True]
    """
    check_not_patched(model)
    factors = {key.removesuffix(f"{SUFFIX}.phi_q"): value for key, value in state_dict.items() if _is_phi_q(key)}
    plain = copy.deepcopy(model)
    plain.load_state_dict({key: value for key, value in state_dict.items() if f"{SUFFIX}." not in key})
    written = []
    for name, table in _tables(plain):
        if name in factors:
            if f"{name}{SUFFIX}.phi_k" not in state_dict:
                raise ValueError(f"state_dict has '{name}{SUFFIX}.phi_q' without its phi_k: both must have been saved")
            bias = FactoredBias(factors.pop(name), state_dict[f"{name}{SUFFIX}.phi_k"])
            written.append(table(bias).fit(name, LowRankBias.from_bias(bias)))
    if factors:
        raise ValueError(
            f"state_dict has factors of {next(iter(factors))!r}, which is no table over fixed places in this "
            f"{type(model).__name__}: the model must have the configuration of the one that was saved"
        )
    return plain.state_dict(), UnpatchReport(type(model).__name__, tuple(written))


def _is_phi_q(key: str) -> bool:
    return key.endswith(f"{SUFFIX}.phi_q")


def _tables(model: nn.Module) -> list[tuple[str, partial[LearnedTable]]]:
    """Each attention's table by the name of its parameter, and what makes a `LearnedTable` of factors of it."""
    names = {module: name for name, module in model.named_modules()}
    order = {name: place for place, name in enumerate(names.values())}
    attentions = [
        (order[name], family, attention)
        for family in families_for(model)
        if isinstance(family, TableFamily)
        for name, attention in family.found_in(model)
    ]
    found = []
    for _, family, attention in sorted(attentions, key=lambda item: item[0]):
        read = partial(family.static_table, model, attention)
        with torch.no_grad(), evaluating(model):
            static = read()
        owner, leaf = static.sources[0].place()
        make = partial(LearnedTable, sources=static.sources, read=read, window=static.window)
        found.append((f"{names[owner]}.{leaf}".lstrip("."), make))
    return found
