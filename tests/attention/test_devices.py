"""Kernels run where their tensors lie, whichever GPU is the current one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED
from torch import Tensor

import flashbias as fb
from flashbias.attention import registration


class Elsewhere(Tensor):
    """A tensor of this machine that says it lies on the second GPU."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_kernels_are_launched_on_the_device_of_the_queries(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device, and a model that is spread over GPUs never sets it."""
    current, launched_on = [0], []

    def exchange(device: int) -> int:
        before, current[0] = current[0], device
        return before

    def launch(*_: Any) -> None:
        launched_on.append(current[0])

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(registration, "_module", lambda impl, which: SimpleNamespace(launch=launch))
    query, key, value = (x.as_subclass(Elsewhere) for x in torch.randn(3, 1, 2, 6, 8))
    shared = (None,) * 9 + (6, 6, [], 0.3, -1, -1, False, 0.0, "triton")
    if which == "forward":
        registration._forward(query, key, value, *shared)  # type: ignore[arg-type]
    else:
        out, lse = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6)
        registration._backward(out, None, out, lse, [True] * 3 + [False] * 3, query, key, value, *shared)  # type: ignore[arg-type]
    assert launched_on == [1] and current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("tokens", [49, 300])
def test_a_gpu_that_is_not_the_current_one(impl: str, tokens: int) -> None:
    def results(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = [(2, 4, tokens, 64)] * 3 + [(4, tokens, 3), (1, tokens, 3)]
        leaves = [torch.randn(shape).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
        q, k, v, phi_q, phi_k = leaves
        out = fb.attention(q, k, v, fb.FactoredBias(phi_q, phi_k), is_causal=True, impl=impl, deterministic=True)
        assert isinstance(out, Tensor)
        return [out, *torch.autograd.grad(out.float().sin().sum(), leaves)]

    assert torch.cuda.current_device() == 0
    for found, wanted in zip(results("cuda:1"), results("cuda:0"), strict=True):
        assert found.device == torch.device("cuda:1") and torch.equal(found.cpu(), wanted.cpu())
    assert torch.cuda.current_device() == 0
