"""Gradients of wide factors that many pairs share, against attention written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED
from torch import Tensor

pytest.importorskip("triton")

from flashbias.attention.layout import flatten_heads
from flashbias.attention.triton import backward, shared
from flashbias.attention.triton.operands import Operands

SCALE = 0.25
"""A power of two: phi_q / scale is exact."""

OPEN = {"left": -1, "right": -1, "bottom_right": False}
MASKS = {
    "open": OPEN,
    "causal": OPEN | {"right": 0},
    "causal, ends aligned": OPEN | {"right": 0, "bottom_right": True},
    "window": OPEN | {"left": 20, "right": 3},
}


def kept(n: int, m: int, left: int, right: int, bottom_right: bool) -> Tensor:
    """Which pairs are seen."""
    distance = torch.arange(m) - torch.arange(n)[:, None] - (m - n if bottom_right else 0)
    return (distance <= (m + n if right < 0 else right)) & (distance >= (-m - n if left < 0 else -left))


def wanted(q: Tensor, k: Tensor, v: Tensor, phis: list[Tensor], dout: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and both gradients, in float64."""
    phi_q, phi_k = (phi.double().requires_grad_() for phi in phis)
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.mT * SCALE + phi_q @ phi_k.mT).masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse.where(lse.isfinite(), 0.0)[..., None]).exp() @ v
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (phi_q, phi_k), dout.double())


def relative_errors(
    device: str, dtype: torch.dtype, mask: dict[str, Any], n: int = 150, m: int = 90, rank: int = 40, lead: int = 6,
    heads: int = 2, kv_heads: int = 2, own: tuple[int, int] = (1, 2), head_dim: int = 24,
) -> list[float]:  # fmt: skip
    """Of the sums that the kernel adds to buffers."""
    generator = torch.Generator().manual_seed(n + rank)
    sizes = [(lead, heads, n, head_dim), (lead, kv_heads, m, head_dim), (lead, kv_heads, m, 16), (lead, heads, n, 16)]
    q, k, v, dout = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    phis = [torch.randn(*own, length, rank, generator=generator).bfloat16().float() / 8 for length in (n, m)]
    out, lse, *grads = wanted(q, k, v, phis, dout, kept(n, m, **mask))
    q, k, v, dout, phi_q, phi_k = (x.to(device) for x in (q, k, v, dout, *phis))
    ops = Operands.of(
        q, k, v, phi_q, phi_k, None, None, None, None, None, None, None, n, m, [], SCALE, mask["left"], mask["right"],
        mask["bottom_right"], 0.0,
    )  # fmt: skip
    lse2, delta = backward.rows_of(ops, dout, None, out.to(dtype).to(device), lse.float().to(device))
    factors = (flatten_heads(phi_q / SCALE).to(dtype), flatten_heads(phi_k).to(dtype))
    sums = tuple(torch.zeros(*phi.shape[:-1], 48, device=device) for phi in factors)
    shared.launch(ops, factors, (sums[0], sums[1]), dout, lse2, delta)
    made = [x[..., :rank].reshape(g.shape).double().cpu() for x, g in zip(sums, grads, strict=True)]
    assert all((x[..., rank:] == 0).all() for x in sums)
    return [float((x - g).norm() / g.norm()) for x, g in zip(made, grads, strict=True)]


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
class TestInterpreted:
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_masks(self, mask: dict[str, Any]) -> None:
        assert max(relative_errors("cpu", torch.float32, mask)) < 3e-6

    @pytest.mark.parametrize(
        "sizes",
        [
            {"n": 40, "m": 70, "rank": 17},
            {"n": 130, "m": 20, "heads": 4, "own": (1, 4)},
            {"n": 33, "m": 65, "heads": 4, "own": (6, 1), "lead": 6},
            {"n": 30, "m": 30, "rank": 1, "lead": 9, "own": (1, 1)},
        ],
        ids=str,
    )
    def test_sizes_and_sharing(self, sizes: dict[str, Any]) -> None:
        assert max(relative_errors("cpu", torch.float32, OPEN, **sizes)) < 3e-6

    def test_one_gradient_alone(self) -> None:
        """A gradient that is not asked for has no buffer."""
        x = torch.randn(2, 2, 20, 16)
        phi = torch.randn(1, 2, 20, 20)
        nothing = (None, None, None, None, None, None, None)
        ops = Operands.of(x, x, x, phi, phi, *nothing, 20, 20, [], SCALE, -1, -1, False, 0.0)
        rows = torch.zeros(2, 2, 20)
        flat = flatten_heads(phi)
        both = (torch.zeros(2, 20, 20), torch.zeros(2, 20, 20))
        shared.launch(ops, (flat, flat), both, x, rows, rows)
        for need in ((True, False), (False, True)):
            alone = tuple(torch.zeros(2, 20, 20) if needed else None for needed in need)
            shared.launch(ops, (flat, flat), (alone[0], alone[1]), x, rows, rows)
            for mine, his in zip(alone, both, strict=True):
                assert mine is None or torch.equal(mine, his)
                assert his.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")
class TestOnGpu:
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
    def test_masks(self, mask: dict[str, Any], head_dim: int) -> None:
        assert max(relative_errors("cuda", torch.bfloat16, mask, n=400, m=330, lead=40, head_dim=head_dim)) < 3e-3
