"""What learned tables owe that are trained as factors, in models of all libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.integrations.suite import relative, snapshot
from tests.integrations.tables import TOL, calls_of, features
from torch import Tensor, nn

from flashbias.decompose import LowRankBias
from flashbias.factored import FactoredBias
from flashbias.integrations import PatchReport, UnpatchReport, call, patch, supports, unpatch, unpatched_state_dict

SUFFIX = "_flashbias_factors"
LEARNED: dict[str, Any] = {"tol": TOL, "tables": "factors", "train_bias": True}
TABLES = ("relative_position_bias_table", "attention_biases")


def patched(model: Any) -> PatchReport:
    report = patch(model, **LEARNED)
    assert {entry.form for entry in report} == {"learned factors"}, report
    return report


def factors_of(model: nn.Module) -> dict[str, LowRankBias]:
    """The trained factors, by the names of their tables."""
    named = model.named_modules()
    return {name.removesuffix(SUFFIX): module for name, module in named if isinstance(module, LowRankBias)}


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(TABLES)}


def train(model: Any, images: Tensor, steps: int = 4, share: float = 0.02) -> list[float]:
    """Move nothing but the factors, towards what the model gives with them the other way round.

    Args:
        share: how far the first step moves them, relative to their norm.

    Returns:
        The losses.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for module in factors_of(model).values():
            module.phi_q.neg_()
        target = features(model, images)
        for module in factors_of(model).values():
            module.phi_q.neg_().requires_grad_()
            module.phi_k.requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained), list[float]()
    for _ in range(steps):
        loss = (features(model, images) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            slopes = [parameter.grad for parameter in trained if parameter.grad is not None]
            optimizer.param_groups[0]["lr"] = share * norm(trained) / norm(slopes)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def norm(tensors: list[Any]) -> float:
    return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).norm())


def shows_its_factors(model: Any) -> None:
    """Check what an optimiser sees, and that tables get nothing from it."""
    before = list(model.state_dict())
    for table in tables_of(model).values():
        table.grad = torch.ones_like(table)
    foreseen = supports(model, **LEARNED)
    assert list(model.state_dict()) == before
    assert patched(model) == foreseen
    names = {name for name, _ in model.named_parameters()}
    assert factors_of(model)
    for name, module in factors_of(model).items():
        assert {f"{name}{SUFFIX}.phi_q", f"{name}{SUFFIX}.phi_k"} <= names
        assert module.phi_q.requires_grad
        assert module.phi_q.dtype == torch.float32
    values = {name: table.detach().clone() for name, table in tables_of(model).items()}
    starts = {name: module.phi_q.detach().clone() for name, module in factors_of(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    sum(module().dense().square().sum() for module in factors_of(model).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(table, values[name]) for name, table in tables_of(model).items())
    assert not any(torch.equal(module.phi_q, starts[name]) for name, module in factors_of(model).items())


def learns_through_factors(model: Any, images: Tensor) -> None:
    patched(model)
    starts = {name: copy.deepcopy(module) for name, module in factors_of(model).items()}
    losses = train(model.train(), images)
    assert losses[-1] < 0.99 * losses[0], losses
    for name, module in factors_of(model).items():
        assert relative(module.phi_q.detach(), starts[name].phi_q.detach()) > 1e-4
        assert relative(module.phi_k.detach(), starts[name].phi_k.detach()) > 1e-4


def dense_attention(query: Tensor, key: Tensor, value: Tensor, bias: FactoredBias, **options: Any) -> Tensor:
    """The formula, with the matrix that the factors make; the columns that a head does not read are zero."""
    scores = options["scale"] * query @ key.mT + bias.phi_q @ bias.phi_k.mT
    return scores.softmax(-1) @ value


def has_the_gradients_of_the_formula(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare in float64, where two ways to compute the same differ by rounding of 1e-16 a step."""
    patched(model)
    model, images = model.double(), images.double()
    other = copy.deepcopy(model)
    weights = torch.randn_like(features(model, images))
    (features(model, images) * weights).sum().backward()
    with monkeypatch.context() as dense:
        dense.setattr(call, "attention", dense_attention)
        (features(other, images) * weights).sum().backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if SUFFIX in name:
            assert parameter.grad is not None, name
            assert float(expected[name].grad.abs().max()) > 1e-6, name
            assert relative(parameter.grad, expected[name].grad) < 1e-9, name
        elif name.endswith(TABLES):
            assert parameter.grad is None, name


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def converts_back(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> UnpatchReport:
    """Check the residual against the biases themselves, and each attention's output against its certificate."""
    with torch.no_grad():
        original = features(model, images)
    report = patched(model)
    train(model, images, share=0.1)
    factors = {name: module().dense(torch.float64).detach() for name, module in factors_of(model).items()}
    with torch.no_grad():
        expected = features(model, images)
    learned = calls_of(model, images, monkeypatch)
    written = unpatch(model)
    assert sorted(entry.name for entry in written) == sorted(factors)
    assert not factors_of(model)
    with torch.no_grad():
        found = features(model, images)
    assert 0 < relative(found, expected) < relative(original, expected)
    patch(model)
    exact = calls_of(model, images, monkeypatch)
    entries = {entry.name: entry for entry in written}
    for entry, (query, key, value, _, scale, out), (*_, table, _, _) in zip(report, learned, exact, strict=True):
        # Of several tables an attention reads its own, which stands in it; else the one of the model.
        name = next((name for name in factors if name.startswith(entry.name.removesuffix(".attention"))), None)
        name = name or next(iter(factors))
        static = FactoredBias.from_table(table.table, *table.shape[-2:], *table.codes()).dense(torch.float64)
        error = factors[name] - static
        assert float(centred(error).square().mean().sqrt()) == pytest.approx(entries[name].residual, rel=1e-4)
        spread = float((error.amax(-1) - error.amin(-1)).max())
        assert float(torch.tensor(spread / 4).tanh()) == pytest.approx(entries[name].certificate, rel=1e-4)
        scores = scale * query.double() @ key.double().mT
        truth = (scores + table.dense(torch.float64)).softmax(-1) @ value.double()
        diameter = torch.cdist(value.double(), value.double()).amax((-2, -1))[..., None]
        assert 0 < float(((out - truth).norm(dim=-1) / diameter).max()) <= entries[name].certificate + 1e-5
    unpatch(model)
    return written


def comes_back_to_the_bit(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected, before = features(model, images), snapshot(model)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        values = {name: table.clone() for name, table in tables_of(model).items()}
        patched(model)
        assert snapshot(model) != before
        features(model, images)
        assert len(unpatch(model)) == 0
        assert snapshot(model) == before
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        assert all(torch.equal(table, values[name]) for name, table in tables_of(model).items())
        assert torch.equal(features(model, images), expected)


def saves_and_loads(model: Any, images: Tensor) -> None:
    other, plain = copy.deepcopy(model), copy.deepcopy(model)
    patched(model)
    patched(other)
    train(model, images)
    with torch.no_grad():
        expected = features(model, images)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{SUFFIX}\.phi_q"):
        plain.load_state_dict(state)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"' is trained as factors in this model.*unpatch\(model\), load"):
            other.load_state_dict(plain.state_dict(), strict=strict)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    converted, written = unpatched_state_dict(plain, state)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(features(other, images), expected)
        report = unpatch(other)
        assert report == unpatch(model)
    assert len(tables_of(model)) > 0
    assert all(torch.equal(table, tables_of(other)[name]) for name, table in tables_of(model).items())
    plain.load_state_dict(model.state_dict())
    assert converted.keys() == before.keys() and [entry.name for entry in written] == [entry.name for entry in report]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(converted[name], value, rtol=0, atol=1e-6 * float(1 + value.abs().max()))
