"""What a calibration times beside the benchmarks: small cases for a fit, frozen factors, and relative tables.

A calibration needs cases that differ in one thing at a time (length, width, rank, batch, sharing), so that a fit can
tell their costs apart; the frozen cases of `cases.py` come from models and do not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import flashbias as fb
from flashbias.bench.cases import Case, Inputs
from flashbias.bench.peers import Unsupported
from flashbias.bench.providers import Prepared, Provider

__all__ = ["CALIBRATION", "LOCAL_ENTRIES", "probes"]

LOCAL_ENTRIES = 33
"""Entries of the table whose lookups are near the diagonal."""

TABLE_VALUE = 0.25
"""Every entry of a timed table: softmax cancels a constant, so the result is checked against no bias at all."""


def _case(batch: int, heads: int, seqlen: int, head_dim: int, rank: int, bias: str = "low-rank", **options) -> Case:
    notes = "".join(f"-{name}" for name in ("shared", "causal") if options.get(name) or options.get(f"is_{name}"))
    kind = "" if bias == "low-rank" else f"-{bias}"
    name = f"fit-{batch}x{heads}x{seqlen}x{head_dim}-r{rank}{kind}{notes}"
    return Case(name, (batch,), heads, seqlen, head_dim, rank, bias, tags=("calibration",), **options)  # type: ignore[arg-type]


CALIBRATION: dict[str, tuple[Case, ...]] = {
    "cpu": (
        _case(1, 2, 512, 64, 16),
        _case(1, 4, 512, 64, 64),
        _case(1, 2, 1024, 32, 8),
        _case(1, 2, 512, 32, 128),
        _case(1, 8, 256, 64, 4),
        _case(1, 2, 512, 128, 32),
        _case(2, 2, 256, 128, 128),
        _case(8, 4, 128, 32, 8, shared=True),
        _case(16, 4, 128, 64, 96, shared=True),
        _case(64, 4, 49, 32, 16, shared=True),
        _case(4, 4, 256, 16, 32, shared=True),
        _case(2, 2, 512, 64, 2, "alibi", shared=True, is_causal=True),
        _case(1, 1, 1024, 64, 2, "alibi", shared=True, is_causal=True),
        _case(1, 1, 1024, 16, 5, "distance", shared=True),
    ),
    "cuda": (
        _case(1, 16, 4096, 128, 16),
        _case(1, 16, 4096, 128, 64),
        _case(1, 16, 4096, 64, 4),
        _case(1, 16, 4096, 64, 32),
        _case(1, 16, 4096, 64, 128),
        _case(2, 16, 4096, 32, 8),
        _case(8, 16, 1024, 64, 16),
        _case(32, 16, 512, 64, 16, shared=True),
        _case(256, 8, 256, 32, 32, shared=True),
        _case(2048, 8, 64, 32, 16, shared=True),
        _case(64, 16, 576, 32, 64, shared=True),
        _case(2, 16, 4096, 64, 2, "alibi", shared=True, is_causal=True),
        _case(1, 16, 8192, 128, 2, "alibi", shared=True, is_causal=True),
        _case(1, 8, 8192, 16, 5, "distance", shared=True),
        _case(1, 8, 4096, 64, 12, "distance", shared=True),
        _case(1, 8, 4096, 64, 32, "distance", shared=True),
    ),
}
"""Cases for a fit, by type of device."""


@dataclass(frozen=True, eq=False)
class _PreparedTable(Prepared):
    """A table's gradient is timed; the check, against attention without a bias, has none to compare it with."""

    def named(self, results: Sequence[Tensor]) -> dict[str, Tensor]:
        """The results that the reference has too."""
        return {name: value for name, value in super().named(results).items() if name != "table"}


def probes() -> list[Provider]:
    """Frozen factors, and tables near the diagonal or everywhere, for each implementation that takes factors."""
    impls = [impl for impl in fb.implementations() if impl != "reference"]
    frozen = [
        Provider(
            f"ours-frozen/{impl}",
            functools.partial(_prepare_frozen, impl),
            applies=_learning_backward,
            in_family=_devices(impl),
        )
        for impl in impls
    ]
    tables = [
        Provider(
            f"table-{extent}{'' if learns else '-frozen'}/{impl}",
            functools.partial(_prepare_table, impl, extent == "local", learns),
            biased=False,
            applies=_always if learns else _backward,
            in_family=_devices(impl),
        )
        for impl, extent, learns in product(impls, ("local", "full"), (True, False))
    ]
    return frozen + tables


def _devices(impl: str) -> tuple[str, ...]:
    return ("cpu",) if impl == "sdpa" else ("cuda",)


def _always(case: Case, pass_name: str) -> bool:
    return True


def _backward(case: Case, pass_name: str) -> bool:
    return pass_name == "fwdbwd"


def _learning_backward(case: Case, pass_name: str) -> bool:
    return pass_name == "fwdbwd" and case.learns_bias


def _prepare_frozen(impl: str, inputs: Inputs, grads: bool) -> Prepared:
    bias = fb.FactoredBias(inputs.phi_q, inputs.phi_k)
    return _prepared(impl, inputs, bias, _tokens(inputs, grads), grads)


def _prepare_table(impl: str, is_local: bool, learns: bool, inputs: Inputs, grads: bool) -> Prepared:
    case, device = inputs.case, inputs.query.device
    entries = LOCAL_ENTRIES if is_local else 2 * case.seqlen - 1
    table = torch.full((case.num_heads, entries), TABLE_VALUE, device=device, requires_grad=grads and learns)
    # Given codes stand for those of windows: a kernel cannot know them to be positions.
    code = None if is_local else torch.arange(case.seqlen, device=device)
    bias = fb.FactoredBias.from_table(table, case.seqlen, case.seqlen, code, code)
    leaves = _tokens(inputs, grads)
    if grads and learns:
        leaves["table"] = table
    return _prepared(impl, inputs, bias, leaves, grads, _PreparedTable)


def _tokens(inputs: Inputs, grads: bool) -> dict[str, Tensor]:
    named = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    return {name: tensor.detach().requires_grad_(grads) for name, tensor in named.items()}


def _prepared(
    impl: str,
    inputs: Inputs,
    bias: fb.FactoredBias,
    leaves: dict[str, Tensor],
    grads: bool,
    kind: type[Prepared] = Prepared,
) -> Prepared:
    if reason := fb.implementations()[impl]:
        raise Unsupported(reason)
    case = inputs.case
    query, key, value = leaves["query"], leaves["key"], leaves["value"]

    def forward() -> Tensor:
        out = fb.attention(query, key, value, bias, is_causal=case.is_causal, scale=case.scale, impl=impl)
        assert isinstance(out, Tensor)  # no lse was asked for
        return out

    return kind(forward, leaves if grads else {}, inputs.dout)
