"""Constant factors in place of a table: where they are moved to, and what is left there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import flashbias as fb
from flashbias.integrations.factors import TableFactors

ELSEWHERE = torch.device("meta")


def factors() -> TableFactors:
    return TableFactors(fb.FactoredBias(torch.randn(2, 5, 3), torch.randn(2, 5, 3)), sources=[])


def test_factors_follow_the_queries_once() -> None:
    found = factors()
    moved = found.current(nn.Identity(), ELSEWHERE)
    assert moved.device == ELSEWHERE
    assert found.current(nn.Identity(), ELSEWHERE) is moved


def test_factors_that_an_evaluation_moved_can_be_trained_with() -> None:
    """Kernels keep them for the backward pass, which takes no tensors of inference mode."""
    found = factors()
    with torch.inference_mode():
        found.current(nn.Identity(), ELSEWHERE)
    assert not found.current(nn.Identity(), ELSEWHERE).phi_q.is_inference()


def test_factors_that_a_transform_moved_are_not_kept() -> None:
    found = factors()

    def of(x: Tensor) -> Tensor:
        found.current(nn.Identity(), ELSEWHERE)
        return x.square().sum()

    torch.func.grad(of)(torch.randn(3))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(found.current(nn.Identity(), ELSEWHERE).phi_q)
