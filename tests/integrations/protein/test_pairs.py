"""Factors in the forward pass, on an attention of its own: what needs none of the packages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.integrations.protein.suite import HEADS, LENGTH, TOL, rough_pairs, smooth_pairs
from torch import Tensor, nn

from flashbias.integrations.base import SETTINGS
from flashbias.integrations.protein import pair_bias_calls, pairs

WIDTH = 8


def attention(reuse: bool = True) -> nn.Module:
    module = nn.Identity()
    module.__dict__[SETTINGS] = pairs.PairSettings("auto", name="here", tol=TOL, reuse=reuse)
    return module


def bias(draw: Any = smooth_pairs) -> Tensor:
    """`[2, 1, H, N, N]`."""
    return draw(2, 1, channels=HEADS).movedim(-1, -3)


def find(module: nn.Module, matrix: Tensor, keep: Tensor | None = None) -> Any:
    return pairs.factors_for(module, matrix, keep, (2, 3), WIDTH, needs_grad=False)


@pytest.fixture
def compressions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found, original = [], pairs.compressed

    def counted(*args: Any, **options: Any) -> Any:
        found.append(args)
        return original(*args, **options)

    monkeypatch.setattr(pairs, "compressed", counted)
    return found


def test_factors_keep_the_tolerance() -> None:
    module, matrix = attention(), bias()
    error = find(module, matrix).dense() - matrix
    # Constants of a row do not matter; the rest moves the output by tanh(spread / 4) at most.
    spread = (error.amax(-1) - error.amin(-1)).max()
    assert 0 < torch.tanh(spread / 4) <= TOL
    calls = pair_bias_calls(module)["here"]
    assert (calls.factored, calls.dense, calls.reason) == (1, 0, "")
    assert 0 < calls.rank < LENGTH // 2 and 0 < calls.certificate <= TOL


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_equal_values_are_compressed_once(mode: Any, compressions: list[Any]) -> None:
    module = attention()
    with mode():
        matrix = bias()
        first = find(module, matrix)
        assert find(module, matrix.clone()) is first
        assert len(compressions) == 1
        matrix[1, 0, 2, 3, 4] += 0.1
        assert find(module, matrix) is not first
        assert len(compressions) == 2
    assert pair_bias_calls(module)["here"].factored == 3


def test_another_mask_is_another_compression(compressions: list[Any]) -> None:
    module, matrix = attention(), bias()
    keep = torch.ones(2, 3, 1, 1, LENGTH, dtype=torch.bool)
    for mask in (None, keep, keep.clone()):
        find(module, matrix, mask)
    assert len(compressions) == 2
    keep[..., 100:] = False
    # What nobody reads is no part of it, and may be anything.
    assert find(module, matrix.index_fill(-1, torch.arange(100, LENGTH), 1e4), keep) is not None
    assert len(compressions) == 3


def test_nothing_is_kept_unless_asked_for(compressions: list[Any]) -> None:
    module, matrix = attention(reuse=False), bias()
    find(module, matrix)
    find(module, matrix)
    assert len(compressions) == 2
    assert module.__dict__[SETTINGS].last is None


def test_refusals(compressions: list[Any]) -> None:
    module = attention()
    assert find(module, bias(rough_pairs)) is None
    assert find(module, bias(rough_pairs)) is None
    calls = pair_bias_calls(module)["here"]
    assert (calls.factored, calls.dense, len(compressions)) == (0, 2, 1)
    assert calls.reason.startswith("no factors keep 0.001 up to rank ")


def test_gradients_are_for_the_model() -> None:
    module, matrix = attention(), bias().requires_grad_()
    assert find(module, matrix) is None
    assert pair_bias_calls(module)["here"].reason == "the bias needs a gradient"
    with torch.no_grad():
        assert find(module, matrix) is not None


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="finite"):
        find(attention(), bias() / 0)
    with pytest.raises(ValueError, match="no patched attention with a bias of its pairs, got Linear"):
        pair_bias_calls(nn.Linear(2, 2))


def test_copies_count_for_themselves() -> None:
    module = attention()
    twin = copy.deepcopy(module)
    find(twin, bias())
    assert (pair_bias_calls(module)["here"].factored, pair_bias_calls(twin)["here"].factored) == (0, 1)
