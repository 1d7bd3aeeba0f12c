"""Learned tables of transformers as factors: the promise, what is refused, and that nothing goes stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.integrations.suite import relative, snapshot
from tests.integrations.tables import TOL, features, keeps_its_certificates, notices_changes, smooth
from tests.integrations.transformers.test_beit import beit
from tests.integrations.transformers.test_data2vec import data2vec
from tests.integrations.transformers.test_swin import swin
from tests.integrations.transformers.test_swinv2 import swinv2
from torch import Tensor, nn
from transformers import MPNetConfig, MPNetModel

from flashbias.integrations import patch, supports, unpatch

MODELS: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "Swin": (swin, (37, 43)),
    "SwinV2": (swinv2, (37, 43)),
    "BEiT": (beit, (20, 32)),
    "Data2VecVision": (data2vec, (20, 32)),
}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    return smooth(make()), torch.randn(2, 3, *size)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_keeps_its_certificate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps_its_certificates(*made(name), monkeypatch)


def test_taken_back_to_the_bit_and_foreseen() -> None:
    for name in ("Swin", "SwinV2", "BEiT"):
        model, images = made(name)
        with torch.no_grad():
            expected, before = features(model, images), snapshot(model)
            keys = list(model.state_dict())
            foreseen = supports(model, tol=TOL, tables="factors")
            assert snapshot(model) == before
            assert patch(model, tol=TOL, tables="factors") == foreseen
            assert list(model.state_dict()) == keys
            features(model, images)
            unpatch(model)
            assert snapshot(model) == before
            assert torch.equal(features(model, images), expected)


def test_a_table_without_low_rank_stays_exact() -> None:
    torch.manual_seed(0)
    model, images = swin(image_size=28, window_size=14, depths=[2], num_heads=[2]), torch.randn(1, 3, 28, 28)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter, std=8.0)
    with torch.no_grad():
        expected = features(model, images)
        report = patch(model, tables="factors")
        assert {entry.form for entry in report} == {"exact table"}
        for entry in report:
            assert entry.certificate == 0.0
            assert entry.note.startswith("no factors: ")
        assert relative(features(model, images), expected) < 1e-5


def test_a_table_for_any_length_stays_exact() -> None:
    config = MPNetConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    entry = patch(MPNetModel(config), tables="factors").entries[0]
    assert (entry.form, entry.note) == ("exact table", "the number of tokens varies, so the table stays")


def test_images_of_another_size_keep_the_table() -> None:
    model, _ = made("BEiT")
    images = torch.randn(1, 3, 16, 40)
    with torch.no_grad():
        expected = model(images, interpolate_pos_encoding=True)[0]
        report = patch(model, tol=TOL, tables="factors")
        assert all("exact table for others" in entry.note for entry in report)
        assert relative(model(images, interpolate_pos_encoding=True)[0], expected) < 1e-5


@pytest.mark.parametrize("name", ["Swin", "SwinV2", "BEiT"])
@pytest.mark.parametrize("how", ["in place", "state_dict", "assigned"])
def test_a_table_that_changes_is_noticed(name: str, how: str) -> None:
    notices_changes(*made(name), how)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies(how: str) -> None:
    model, images = made("SwinV2")
    with torch.no_grad():
        patch(model, tol=TOL, tables="factors")
        patched = features(model, images)
        other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(features(other, images), patched)
        with pytest.raises(RuntimeError, match=r"has changed since patch\(\)"):
            features(model, images)


def test_training_needs_frozen_tables() -> None:
    model, images = made("Swin")
    patch(model, tol=TOL, tables="factors")
    model.train()
    with pytest.raises(RuntimeError, match=r"requires a gradient and would get none\. Freeze it"):
        features(model, images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_position_bias_table" not in name)
    features(model, images).sum().backward()
    assert model.get_parameter("encoder.layers.0.blocks.0.attention.q_proj.weight").grad is not None


def test_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    model, images = smooth(swin(depths=[2], num_heads=[2])), torch.randn(1, 3, 37, 43)
    patch(model, tol=TOL, tables="factors")
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
        assert relative(compiled(images)[0], model(images)[0]) < 1e-6


@pytest.mark.parametrize("ask", [patch, supports])
def test_bad_options(ask: Callable[..., Any]) -> None:
    model, _ = made("Swin")
    with pytest.raises(ValueError, match="tables must be 'exact' or 'factors', got 'dense'"):
        ask(model, tables="dense")
    for train_bias in (False, True):
        with pytest.raises(ValueError, match="which is on the meta device; load the model's weights first"):
            ask(nn.Module.to(swin(), "meta"), tables="factors", train_bias=train_bias)
    name, table = next((n, p) for n, p in model.named_parameters() if n.endswith("relative_position_bias_table"))
    table.data[3] = torch.nan
    attention = name.removesuffix(".relative_position_bias.relative_position_bias_table")
    with pytest.raises(ValueError, match=rf"needs finite values, and '.*table' of '{attention}' has {table.shape[1]} "):
        ask(model, tables="factors")
