"""Learned tables of transformers, trained as factors."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from tests.integrations import learned
from tests.integrations.suite import relative
from tests.integrations.tables import features, smooth
from tests.integrations.transformers.test_beit import beit
from tests.integrations.transformers.test_swin import swin
from tests.integrations.transformers.test_swinv2 import swinv2
from torch import Tensor
from transformers import MPNetConfig, MPNetModel

from flashbias.integrations import patch, unpatch

square = partial(beit, image_size=24)
MODELS: dict[str, Any] = {
    "Swin": (swin, (37, 43)),
    "BEiT": (square, (24, 24)),
    "BEiT, one table": (partial(square, tables="shared"), (24, 24)),
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


def test_saved_after_unpatch_loads_elsewhere(tmp_path: Any) -> None:
    model, images = made("Swin")
    learned.patched(model)
    learned.train(model, images)
    unpatch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative(features(loaded, images), features(model, images)) < 1e-6


def test_pickled_while_patched() -> None:
    model, images = made("Swin")
    learned.patched(model)
    learned.train(model, images)
    other = pickle.loads(pickle.dumps(model))
    assert unpatch(other) == unpatch(model)
    with torch.no_grad():
        assert torch.equal(features(other, images), features(model, images))


def test_images_of_another_size_are_refused() -> None:
    """Their table is stretched, and has not seen the training."""
    model, _ = made("BEiT")
    assert all("images of another size are refused" in entry.note for entry in learned.patched(model))
    images = torch.randn(1, 3, 16, 40)
    with pytest.raises(ValueError, match=r"learned factors are for \(6, 6\) patches, got an image of \(4, 10\)"):
        model(images, interpolate_pos_encoding=True)
    unpatch(model)
    model(images, interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (swinv2, "made by a network, no learned table"),
        (beit, "stretched by the model even for images of its own size"),
        (
            lambda: MPNetModel(MPNetConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
            "the number of tokens varies",
        ),
    ],
)
def test_tables_that_stay(model: Any, note: str) -> None:
    made = smooth(model())
    before = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    report = patch(made, **learned.LEARNED)
    assert {entry.form for entry in report} == {"exact table"}
    assert all(entry.note.startswith(note) for entry in report), report
    assert {name: parameter.requires_grad for name, parameter in made.named_parameters()} == before


def test_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    model, images = smooth(swin(depths=[2], num_heads=[2])), torch.randn(1, 3, 37, 43)
    learned.patched(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    expected = model(images)[0]
    found = compiled(images)[0]
    assert relative(found.detach(), expected.detach()) < 1e-6
    found.sum().backward()
    assert all(module.phi_k.grad is not None for module in learned.factors_of(model).values())
