"""The machinery, on a family of toys: what it promises holds for every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashbias.integrations import AttentionEntry, Family, patch, supports, unpatch
from flashbias.integrations.base import _REGISTRY, SETTINGS, Changes, Options, Plan


class ToyAttention(nn.Module):
    def __init__(self, kind: str = "biased") -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OtherToyAttention(ToyAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.weight


class ToyModel(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ToyAttention(kind) for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def doubled(attention: ToyAttention, x: Tensor) -> Tensor:
    return 2 * x * attention.weight


class Toy(Family, register=False):
    name = "Toy"
    attentions = (f"{ToyAttention.__module__}.ToyAttention",)

    def is_biased(self, attention: nn.Module) -> bool:
        return attention.kind != "plain"

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        return "kind='odd'" if attention.kind == "odd" else None

    def plan(self, name: str, attention: nn.Module, options: Options) -> Plan:
        if attention.kind == "high rank":
            return Plan(AttentionEntry(name, self.name, "left", note=f"no rank keeps tol={options.tol}"))
        entry = AttentionEntry(name, self.name, "replaced", "low rank", 3, options.tol / 2)
        return Plan(entry, lambda changes: self.change(attention, options, changes))

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        changes.set(attention, SETTINGS, options)
        changes.set(attention, "forward", partial(doubled, attention))
        if attention.kind == "breaks":
            raise RuntimeError("half way")

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        changes.hook(model.register_forward_pre_hook(lambda module, args: (args[0] + 1,)))


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY, "Toy", Toy())


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {k: dict(v) if isinstance(v, dict) else id(v) for k, v in module.__dict__.items()}
        for name, module in model.named_modules()
    }


X = torch.tensor([1.0, 2.0])


def test_replaces_leaves_and_says_so() -> None:
    model = ToyModel("biased", "plain", "high rank")
    report = patch(model, tol=0.01)
    assert torch.equal(model(X), 2 * (X + 1))
    assert [entry.name for entry in report.replaced] == ["layers.0"]
    assert [entry.name for entry in report.left] == ["layers.2"]
    assert report.certificate == 0.005
    assert str(report).splitlines() == [
        "ToyModel: 1 attention replaced, 1 left, 0 unsupported",
        "attention  family  status    form      rank  certificate  note",
        "layers.0   Toy     replaced  low rank     3      5.0e-03",
        "layers.2   Toy     left                                   no rank keeps tol=0.01",
    ]


def test_unpatch_restores_everything() -> None:
    model = ToyModel("biased", "high rank")
    model.layers[0].__dict__["note"] = note = ["of the user"]
    before = attributes(model)
    patch(model)
    assert attributes(model) != before
    unpatch(model)
    assert attributes(model) == before
    assert model.layers[0].note is note
    assert torch.equal(model(X), X)
    patch(model)
    assert torch.equal(model(X), 2 * (X + 1))


def test_a_copy_is_unpatched_by_itself() -> None:
    model = ToyModel("biased")
    patch(model)
    other = copy.deepcopy(model)
    unpatch(other)
    assert torch.equal(other(X), X)
    assert torch.equal(model(X), 2 * (X + 1))


def test_a_failure_half_way_changes_nothing() -> None:
    model = ToyModel("biased", "breaks")
    before = attributes(model)
    with pytest.raises(RuntimeError, match="half way"):
        patch(model)
    assert attributes(model) == before


def test_supports_finds_what_patch_would_refuse() -> None:
    model = ToyModel("biased", "odd", "odd")
    before = attributes(model)
    report = supports(model)
    assert [entry.note for entry in report.unsupported] == ["kind='odd'"] * 2
    with pytest.raises(NotImplementedError, match=r"'layers.1' \(and 1 more\) is not supported: kind='odd'"):
        patch(model)
    assert attributes(model) == before


def test_no_bias_anywhere() -> None:
    model = ToyModel("plain")
    assert len(supports(model)) == 0
    assert str(supports(model)) == "ToyModel: 0 attentions replaced, 0 left, 0 unsupported"
    with pytest.raises(ValueError, match=r"no attention with a bias that is known here, got ToyModel; known are .*Toy"):
        patch(model)


def test_a_forward_of_its_own_is_not_replaced() -> None:
    model = ToyModel("biased")
    model.layers[0] = OtherToyAttention()
    with pytest.raises(NotImplementedError, match="OtherToyAttention overrides the forward of ToyAttention"):
        patch(model)
    model = ToyModel("biased")
    model.layers[0].forward = partial(doubled, model.layers[0])
    with pytest.raises(NotImplementedError, match="already replaced on the instance; patch before"):
        patch(model)


def test_what_was_replaced_since_is_not_overwritten() -> None:
    model = ToyModel("biased")
    patch(model)
    mine = model.layers[0].forward
    model.layers[0].forward = lambda x: mine(x) + 5
    before = attributes(model)
    with pytest.raises(RuntimeError, match="'forward' of a ToyAttention was replaced after patch"):
        unpatch(model)
    assert attributes(model) == before
    model.layers[0].forward = mine
    unpatch(model)


@pytest.mark.parametrize("again", [patch, supports])
def test_twice_in_whole_and_in_part(again: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(ToyModel("biased"), nn.Identity())
    patch(model[0])
    with pytest.raises(ValueError, match="model is patched already, in its part '0', got Sequential; unpatch it first"):
        again(model)
    with pytest.raises(ValueError, match="model is patched already, got ToyModel; unpatch it first"):
        again(model[0])
    with pytest.raises(ValueError, match="model is patched already, got ToyAttention"):
        again(model[0].layers[0])
    with pytest.raises(ValueError, match="model is not patched, got Sequential; its part '0' is: unpatch that"):
        unpatch(model)
    unpatch(model[0])
    assert patch(model).replaced[0].name == "0.layers.0"


def test_unpatch_without_patch() -> None:
    with pytest.raises(ValueError, match=r"model is not patched, got ToyModel$"):
        unpatch(ToyModel("biased"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": 0.0}, ValueError, r"tol must be a number in \(0, 1\), got 0.0"),
        ({"tol": "small"}, ValueError, "tol must be a number"),
        ({"impl": "fast"}, ValueError, r"impl must be 'auto' or one of \[.*'sdpa'.*\], got 'fast'"),
        ({"train_bias": 1}, TypeError, "train_bias must be a bool, got 1"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for call in (patch, supports):
        with pytest.raises(error, match=message):
            call(ToyModel("biased"), **options)


@pytest.mark.parametrize("call", [patch, unpatch, supports])
def test_bad_model(call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        call({})


def test_an_implementation_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashbias.integrations.patching.implementations", lambda: {"triton": "no GPU", "sdpa": None})
    with pytest.raises(NotImplementedError, match="impl='triton' cannot run on this machine: no GPU"):
        patch(ToyModel("biased"), impl="triton")


def test_two_families_of_one_name() -> None:
    with pytest.raises(ValueError, match="a family named 'Toy' is already registered, by "):
        type("Toy", (Toy,), {"__module__": "elsewhere"}, register=True)


def test_no_model_library_is_loaded_without_such_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("flashbias.integrations.base.importlib.import_module", loaded.append)
    assert len(supports(ToyModel("biased"))) == 1
    assert loaded == []
