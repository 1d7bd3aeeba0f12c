"""Lengths that only a GPU reaches: positions to 2^20, offsets past 2^31, memory in proportion to N."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.attention import packing

pytestmark = pytest.mark.gpu

MILLION = 2**20


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: fb.FactoredBias, rows: Tensor, dtype: torch.dtype, causal: bool
) -> Tensor:
    """Some rows of the output with the dense bias, every step in `dtype`; the bias is rounded once."""
    scores = q[..., rows, :].to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5
    scores = scores + (bias.phi_q[..., rows, :].double() @ bias.phi_k.double().mT).to(dtype)
    if causal:
        scores = scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows[:, None], -torch.inf)
    return scores.softmax(-1) @ v.to(dtype)


def assert_rows_close(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: fb.FactoredBias, rows: Tensor, causal: bool
) -> None:
    """At most twice eager's error, plus two roundings of the result."""
    exact = exact_rows(q, k, v, bias, rows, torch.float64, causal)
    eager = exact_rows(q, k, v, bias, rows, q.dtype, causal)
    error, allowed = ((x.double() - exact).norm().item() for x in (out[..., rows, :], eager))
    assert error <= 2 * allowed + torch.finfo(q.dtype).eps * exact.norm().item()


def alibi(n: int, slopes: list[float]) -> fb.FactoredBias:
    slope = torch.tensor(slopes, device="cuda")[:, None, None]
    return fb.FactoredBias(slope.expand(-1, n, 1), torch.arange(float(n), device="cuda")[None, :, None])


@pytest.mark.parametrize("n", [packing.TILE_CENTRE_FROM, packing.TILE_CENTRE_FROM + 77, MILLION], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alibi_at_long_range(n: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=dtype) for _ in range(3))
    # A dense float16 bias, the measure of the error, overflows past 65504.
    bias = alibi(n, [0.7071067 if dtype == torch.bfloat16 else 0.05, 0.001])
    out = fb.attention(q, k, v, bias, is_causal=True, impl="triton")
    rows = torch.tensor([0, 1, 127, 128, n // 2, n - 2, n - 1], device="cuda")
    assert_rows_close(out, q, k, v, bias, rows, causal=True)


def test_a_million_points_forward_and_backward() -> None:
    """One head, head_dim 64, rank 5."""
    n = MILLION
    leaves = [torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    factors = [torch.randn(1, n, 5, device="cuda", requires_grad=True) for _ in range(2)]
    bias = fb.FactoredBias(*factors)
    out = fb.attention(*leaves, bias, impl="triton")
    rows = torch.tensor([0, n // 3, n - 1], device="cuda")
    assert_rows_close(out.detach(), *(x.detach() for x in leaves), bias.detach(), rows, causal=False)  # type: ignore[union-attr]
    dout = torch.zeros_like(out)  # type: ignore[arg-type]
    dout[..., rows, :] = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    dq, dk, dv, dphi_q, dphi_k = torch.autograd.grad(out, [*leaves, *factors], dout)  # type: ignore[arg-type]
    exact = [x.detach().double().requires_grad_() for x in (*leaves, *factors)]
    wide = fb.FactoredBias(exact[3], exact[4])
    right = torch.autograd.grad(
        exact_rows(*exact[:3], wide, rows, torch.float64, False), exact, dout[..., rows, :].double()
    )
    for found, wanted in zip((dq, dk, dv, dphi_q, dphi_k), right, strict=True):
        assert (found.double() - wanted).norm() <= 0.02 * wanted.norm()


def test_offsets_beyond_32_bits() -> None:
    """Keys of more than 2^31 elements: the last head is what it is alone."""
    heads, m = 40, MILLION
    q = torch.randn(1, heads, 16, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, heads, m, 64, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    bias = fb.FactoredBias(torch.randn(heads, 16, 2, device="cuda"), torch.randn(1, m, 2, device="cuda"))
    last = fb.FactoredBias(bias.phi_q[-1:], bias.phi_k)
    whole = fb.attention(q, k, k, bias, impl="triton")
    alone = fb.attention(q[:, -1:], k[:, -1:], k[:, -1:], last, impl="triton")
    torch.testing.assert_close(whole[:, -1:], alone, atol=1e-3, rtol=1e-2)  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [5, 16, 96])
def test_memory_beyond_no_bias_is_a_few_times_the_factors(rank: int, dtype: torch.dtype) -> None:
    n = 16_384

    def peak(bias: fb.FactoredBias | None) -> int:
        q, k, v = (torch.randn(1, 4, n, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fb.attention(q, k, v, bias, impl="triton").sum().backward()  # type: ignore[union-attr]
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    phi_q, phi_k = (torch.randn(4, n, rank, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    bias = fb.FactoredBias(phi_q, phi_k)
    peak(None)
    without = peak(None)
    assert peak(bias) <= without + 3 * bias.nbytes
