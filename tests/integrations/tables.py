"""What learned tables as factors owe, in models of all libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.integrations.suite import relative
from torch import Tensor

from flashbias.factored import FactoredBias
from flashbias.integrations import call, patch, unpatch

TOL = 1e-2


def smooth(model: Any) -> Any:
    """Fill the tables with wide bells, which have a low rank; random ones have none."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("attention_biases"):
            height, width = owner.resolution
            bell = torch.exp(-((grid(height, width, 0, 0) / 12) ** 2))
            parameter.data.copy_(bell.flatten() * torch.linspace(1, 3, len(parameter))[:, None])
        elif name.endswith("relative_position_bias_table"):
            height, width = owner.window_size
            bell = torch.exp(-((grid(2 * height - 1, 2 * width - 1, height - 1, width - 1) / 12) ** 2))
            slopes = torch.linspace(1, 3, parameter.shape[1])
            parameter.data[: bell.numel()] = bell.flatten()[:, None] * slopes
    return model


def grid(height: int, width: int, y: float, x: float) -> Tensor:
    """Distance of each place from one of them."""
    return torch.hypot(torch.arange(float(height))[:, None] - y, torch.arange(float(width))[None, :] - x)


def features(model: Any, images: Tensor) -> Tensor:
    out = model.forward_features(images) if hasattr(model, "forward_features") else model(images)[0]
    return out


def calls_of(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Query, key, value, bias, scale and output of each attention."""
    seen, original = [], call.attention

    def watch(query: Tensor, key: Tensor, value: Tensor, bias: FactoredBias, **options: Any) -> Any:
        out = original(query, key, value, bias, **options)
        seen.append((query, key, value, bias, options["scale"], out))
        return out

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(call, "attention", watch)
        features(model, images)
    return seen


def keeps_its_certificates(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check each attention against the one with the exact table, on its own queries, keys and values."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = features(model, images)
    patch(other)
    report = patch(model, tol=TOL, tables="factors")
    assert len(report.replaced) == len(report)
    assert all((entry.form, entry.rank == 0) == ("factors", False) for entry in report), report
    assert 0 < report.certificate <= TOL
    found, exact = calls_of(model, images, monkeypatch), calls_of(other, images, monkeypatch)
    assert len(found) == len(exact) == len(report)
    for (query, key, value, bias, scale, out), (*_, table, _, _), entry in zip(found, exact, report, strict=True):
        assert bias.table is None
        assert table.table is not None
        scores = scale * query.double() @ key.double().mT
        truth = (scores + table.dense(torch.float64)).softmax(-1) @ value.double()
        diameter = torch.cdist(value.double(), value.double()).amax((-2, -1))[..., None]
        moved = (out - truth).norm(dim=-1) / diameter
        assert entry.certificate is not None
        assert 0 < float(moved.max()) <= entry.certificate + 1e-5
    with torch.no_grad():
        assert 0 < relative(features(model, images), expected) < 0.3


def notices_changes(model: Any, images: Tensor, how: str) -> None:
    """Check that factors never outlive the table that they were made from."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        patch(model, tol=TOL, tables="factors")
        features(model, images)
        model.load_state_dict(other.state_dict())  # the same values
        features(model, images)
        tables = [n for n, _ in model.named_parameters() if "bias_table" in n or "bias_mlp" in n]
        other.get_parameter(tables[0]).add_(0.1)
        if how == "in place":
            model.get_parameter(tables[0]).add_(0.1)
        else:
            model.load_state_dict(other.state_dict(), assign=how == "assigned")
        with pytest.raises(RuntimeError, match=r"has changed since patch\(\): .* Call flashbias.unpatch"):
            features(model, images)
        unpatch(model)
        assert torch.equal(features(model, images), features(other, images))
        patch(model, tol=TOL, tables="factors")
        features(model, images)
