"""Learned tables of timm, trained as factors."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests.integrations import learned
from tests.integrations.suite import relative
from tests.integrations.tables import features, smooth
from tests.integrations.timm.test_beit import beit
from tests.integrations.timm.test_swin import swin
from tests.integrations.timm.test_tables import levit, swinv2
from torch import Tensor, nn

from flashbias.integrations import patch, unpatch

MODELS: dict[str, Any] = {
    "Swin": (swin, (36, 44)),
    "BEiT": (beit, (20, 32)),
    "BEiT, one table": (partial(beit, tables="shared"), (20, 32)),
    "LeViT": (levit, (80, 96)),
}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    return smooth(make()), torch.randn(2, 3, *size)


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name: str) -> None:
    learned.shows_its_factors(made(name)[0])


@pytest.mark.parametrize("name", MODELS)
def test_learns(name: str) -> None:
    learned.learns_through_factors(*made(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learned.has_the_gradients_of_the_formula(*made(name), monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_converts_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learned.converts_back(*made(name), monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_untrained(name: str) -> None:
    learned.comes_back_to_the_bit(*made(name))


@pytest.mark.parametrize("name", MODELS)
def test_saving(name: str) -> None:
    learned.saves_and_loads(*made(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_table_can_express_comes_back_whole(dtype: torch.dtype) -> None:
    """Factors of another table, plus constants of rows: they are lost, and nothing else is but the table's rounding."""
    (model, images), other = made("Swin"), made("Swin")[0]
    with torch.no_grad():
        for table in learned.tables_of(other).values():
            table.add_(torch.randn_like(table))
        expected, before = features(other, images), features(model, images)
        learned.patched(model)
        for name, module in learned.factors_of(model).items():
            dense = other.get_submodule(name.rpartition(".")[0])._get_rel_pos_bias()[0]
            constants = 5 * torch.randn(*dense.shape[:2], 1)
            eye = torch.eye(dense.shape[-1]).expand(len(dense), -1, -1).clone()
            module.phi_q, module.phi_k, module.ranks = nn.Parameter(dense + constants), nn.Parameter(eye), None
        for table in learned.tables_of(model).values():
            table.data = table.data.to(dtype)
        report = unpatch(model)
        assert len(report) == 4
        least, most = (0.0, 1e-5) if dtype == torch.float32 else (1e-4, 0.02)
        assert all(least < entry.residual < most for entry in report), report
        assert relative(before, expected) > 1e-3
        if dtype == torch.float32:
            assert relative(features(model, images), expected) < 1e-5


def test_least_squares() -> None:
    """No step of the table, however small, comes closer to the factors."""
    model, images = made("LeViT")
    learned.patched(model)
    learned.train(model, images, share=0.1)
    factors = {name: module().dense(torch.float64).detach() for name, module in learned.factors_of(model).items()}
    unpatch(model.double())
    for name, wanted in factors.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        table = owner.attention_biases.detach().requires_grad_()
        left = learned.centred(wanted - table[:, owner.attention_bias_idxs]).square().sum()
        (slope,) = torch.autograd.grad(left, table)
        # The factors were widened from float32 by unpatch as they were here, so that only rounding is left.
        assert float(slope.abs().max()) < 1e-9 * float(left.detach())
        assert float(left.detach()) > 1e-6


def test_one_table_has_one_set_of_factors() -> None:
    model, _ = made("BEiT, one table")
    learned.patched(model)
    assert list(learned.factors_of(model)) == ["rel_pos_bias.relative_position_bias_table"]


def test_beside_a_shared_table_the_own_one_is_written() -> None:
    model, images = made("BEiT")
    learned.patched(model)
    shared = model.rel_pos_bias.relative_position_bias_table
    before = shared.detach().clone()
    learned.train(model, images)
    names = [f"blocks.{number}.attn.relative_position_bias_table" for number in range(2)]
    assert [entry.name for entry in unpatch(model)] == names
    assert torch.equal(shared, before)


def test_frozen_tables_stay_frozen_afterwards() -> None:
    model, images = made("Swin")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    learned.patched(model)
    features(model, images).sum().backward()
    assert all(module.phi_q.grad is not None for module in learned.factors_of(model).values())
    unpatch(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_trains_alone() -> None:
    model, images = made("Swin")
    learned.patched(model)
    other = copy.deepcopy(model)
    learned.train(other, images)
    assert len(unpatch(model)) == 0
    assert len(unpatch(other)) == 4


def test_networks_keep_their_table() -> None:
    torch.manual_seed(0)
    model: Any = swinv2().train()
    report = patch(model, **learned.LEARNED)
    assert {entry.form for entry in report} == {"exact table"}
    assert all(entry.note.startswith("made by a network, no learned table") for entry in report)
    features(model, torch.randn(1, 3, 40, 40)).sum().backward()
    grad = model.layers[0].blocks[0].attn.cpb_mlp[0].weight.grad
    assert grad is not None
    assert float(grad.abs().max()) > 0


def test_a_constant_table_stays() -> None:
    model, _ = made("Swin")
    tables = learned.tables_of(model)
    with torch.no_grad():
        next(iter(tables.values())).fill_(0.5)
    first, *others = patch(model, **learned.LEARNED)
    assert (first.form, "rank 0 learn nothing" in first.note) == ("exact table", True)
    assert {entry.form for entry in others} == {"learned factors"}
    assert [table.requires_grad for table in tables.values()] == [True, False, False, False]


def test_a_table_of_another_size_is_refused() -> None:
    model, images = made("Swin")
    learned.patched(model)
    learned.train(model, images)
    model.set_input_size(img_size=(28, 28), window_size=7)
    with pytest.raises(RuntimeError, match=r"has the shape \(169, 2\), and its factors were learned for \(81, 2\)"):
        unpatch(model)
    model.set_input_size(img_size=(40, 40), window_size=5)
    assert len(unpatch(model)) == 4


def test_replaced_factors_are_noticed() -> None:
    model, _ = made("Swin")
    learned.patched(model)
    name, module = next(iter(learned.factors_of(model).items()))
    owner = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, "relative_position_bias_table" + learned.SUFFIX, copy.deepcopy(module))
    with pytest.raises(RuntimeError, match=r"was replaced after patch\(\): undo that first"):
        unpatch(model)
    setattr(owner, "relative_position_bias_table" + learned.SUFFIX, module)
    assert len(unpatch(model)) == 0
