"""Triangle attention and attention with a pair bias, against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.integrations.protein import pair_bias_attention, triangle_attention
from flashbias.integrations.protein import triangle as module

B, N, H, Q, K, D, R = 2, 3, 4, 17, 13, 8, 5
RAGGED = [[13, 9, 1], [4, 13, 12]]


def draw(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def problem(rank: int = R) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the factors without the dimension of rows."""
    qkv = [draw(B, N, H, Q, D), draw(B, N, H, K, D, seed=1), draw(B, N, H, K, D, seed=2)]
    return qkv, [draw(B, H, Q, rank), draw(B, H, K, rank, seed=3)]


def lengths() -> Tensor:
    return torch.tensor(RAGGED, dtype=torch.int32).reshape(B, N, 1, 1, 1)


def valid() -> Tensor:
    return torch.arange(K) < lengths()


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and scores."""
    scores = scale * (q @ k.mT) + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return scores.softmax(-1) @ v, scores


def smooth(*shape: int, scale: float = 2.0) -> Tensor:
    """A bias `[*shape]` of low rank, another one for each head and batch element."""
    x, y = torch.linspace(-1, 1, shape[-2]), torch.linspace(-1, 1, shape[-1])
    waves = scale * torch.cos(2 * x[:, None] - 2 * y) + x[:, None] * y**2
    size = torch.linspace(0.5, 1.5, math.prod(shape[:-2])).reshape(*shape[:-2], 1, 1)
    return (size * waves).double()


def spread(v: Tensor) -> Tensor:
    """Largest distance between two values, `[*batch, H]`."""
    return (v[..., :, None, :] - v[..., None, :, :]).norm(dim=-1).amax((-2, -1))


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_factors_equal_the_formula_with_gradients(with_rows: bool, masked: bool, scale: float | None) -> None:
    (q, k, v), (phi_q, phi_k) = problem()
    given = [phi[:, None] if with_rows else phi for phi in (phi_q, phi_k)]
    keep = valid() if masked else None
    out = triangle_attention(q, k, v, fb.FactoredBias(*given), keep, scale)
    expected, _ = formula(q, k, v, (phi_q @ phi_k.mT)[:, None], keep, D**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-12)
    leaves, upstream = (q, k, v, phi_q, phi_k), torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, upstream)
    for x, y in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-11)


def test_gradients_reach_a_neural_bias() -> None:
    torch.manual_seed(0)
    network = fb.NeuralBias(in_features=6, num_heads=H, rank=R, hidden=(8,), init_std=2.0).double()
    features = draw(B, Q, 6)
    q, k, v = (draw(B, N, H, Q, D, seed=seed) for seed in range(3))
    leaves = (features, *network.parameters())
    out = triangle_attention(q, k, v, network(features))
    expected, _ = formula(q, k, v, network(features).dense()[:, None], None, D**-0.5)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-12)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, upstream)
    for x, y in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-11)


def test_masks_in_the_forms_of_the_signature() -> None:
    (q, k, v), phi = problem()
    bias = fb.FactoredBias(*phi)
    out = triangle_attention(q, k, v, bias, valid())
    assert torch.equal(triangle_attention(q, k, v, bias, valid().float()), out)
    assert torch.equal(triangle_attention(q, k, v, bias, kv_lengths=lengths()), out)
    torch.testing.assert_close(triangle_attention(q, k, v, bias, valid(), D**-0.5, False), out)


def test_a_batch_of_one_without_its_dimension() -> None:
    (q, k, v), (phi_q, phi_k) = problem()
    bias = fb.FactoredBias(phi_q[:1], phi_k[:1])
    whole = triangle_attention(q[:1], k[:1], v[:1], bias, valid()[:1])
    assert torch.equal(triangle_attention(q[0], k[0], v[0], bias, valid()[0]), whole)


@pytest.mark.parametrize("block", [1, 7 * B * N * H * K, 1 << 24])
def test_auxiliary_results(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ENTRIES", block)
    (q, k, v), (phi_q, phi_k) = problem()
    keep = valid()
    keep[1, 0] = False
    out, lse, largest = triangle_attention(q, k, v, fb.FactoredBias(phi_q, phi_k), keep, return_aux=True)
    expected, scores = formula(q, k, v, (phi_q @ phi_k.mT)[:, None], keep, D**-0.5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(largest, scores.amax(-1), rtol=0.0, atol=1e-12)
    assert bool((largest[1, 0] == -math.inf).all())
    assert bool((out[1, 0] == 0).all())
    alive = keep.any(-1).expand(B, N, H, Q)
    torch.testing.assert_close(out[alive], expected[alive], rtol=0.0, atol=1e-12)


def test_auxiliary_results_are_float32_beside_half_precision() -> None:
    q, k, v = (draw(1, 2, H, Q, D, grad=False, seed=seed).bfloat16() for seed in range(3))
    bias = fb.FactoredBias(draw(H, Q, R, grad=False).float(), draw(H, Q, R, grad=False, seed=1).float())
    out, lse, largest = triangle_attention(q, k, v, bias, return_aux=True)
    assert (out.dtype, lse.dtype, largest.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    _, scores = formula(q.double(), k.double(), v.double(), bias.dense(torch.float64), None, D**-0.5)
    torch.testing.assert_close(largest, scores.amax(-1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_a_tensor_is_compressed_within_its_tolerance(masked: bool) -> None:
    q, k, v = (draw(2, 5, 3, 40, D, grad=False, seed=seed) for seed in range(3))
    bias, keep = smooth(2, 1, 3, 40, 40), None
    if masked:
        keep = (torch.arange(40) < torch.tensor([31, 22])[:, None]).reshape(2, 1, 1, 1, 40).expand(2, 5, 1, 1, 40)
        # What no row reads is no part of the promise, and may be anything.
        bias = bias.masked_fill(~keep[:, :1], 1e4)
    out = triangle_attention(q, k, v, bias, keep, tol=1e-3)
    expected, _ = formula(q, k, v, bias, keep, D**-0.5)
    error = (out - expected).norm(dim=-1).amax(-1)
    assert bool((error <= 1e-3 * spread(v)).all())
    assert float(error.max()) > 1e-9, "an exact result would mean that nothing was compressed"


def test_a_tensor_without_low_rank_is_refused() -> None:
    q, k, v = (draw(1, 4, 2, 150, D, grad=False, seed=seed) for seed in range(3))
    with pytest.raises(fb.NotLowRankError):
        triangle_attention(q, k, v, 3 * draw(1, 1, 2, 150, 150, grad=False))


def test_gradients_beside_a_compressed_tensor() -> None:
    q, k, v = (draw(1, 4, 2, 40, D, seed=seed) for seed in range(3))
    bias = smooth(1, 1, 2, 40, 40)
    out = triangle_attention(q, k, v, bias, tol=1e-6)
    expected, _ = formula(q, k, v, bias, None, D**-0.5)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    for x, y in zip(found, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("lead", [(3,), (1,)], ids=["own", "shared"])
def test_pair_bias_equals_the_formula_with_gradients(lead: tuple[int, ...]) -> None:
    q, k, v = draw(3, H, Q, D), draw(3, H, K, D, seed=1), draw(3, H, K, 6, seed=2)
    phi_q, phi_k = draw(*lead, H, Q, R), draw(*lead, 1, K, R)
    keep = (torch.arange(K) < torch.tensor([13, 5, 9])[:, None])[:, None, None]
    out = pair_bias_attention(q, k, v, fb.FactoredBias(phi_q, phi_k), keep)
    expected, _ = formula(q, k, v, phi_q @ phi_k.mT, keep, D**-0.5)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-12)
    leaves, upstream = (q, k, v, phi_q, phi_k), torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, upstream)
    for x, y in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-11)


def test_a_tensor_of_which_nothing_is_read() -> None:
    """No key is valid, or there are no rows, queries or keys at all."""
    q, k, v = (draw(B, N, H, length, D, grad=False) for length in (Q, K, K))
    bias, lead, none = smooth(B, 1, H, Q, K), (B, N, H), torch.zeros(B, N, 1, 1, K, dtype=torch.bool)
    hidden = torch.full_like(bias, math.nan)
    assert torch.equal(triangle_attention(q, k, v, hidden, none), torch.zeros_like(q))
    assert torch.equal(triangle_attention(q, k, v, hidden, kv_lengths=torch.zeros_like(lengths())), torch.zeros_like(q))
    assert torch.equal(pair_bias_attention(q, k, v, hidden, none), torch.zeros_like(q))
    assert triangle_attention(q[..., :0, :], k, v, bias[..., :0, :]).shape == (*lead, 0, D)
    assert triangle_attention(q[:, :0], k[:, :0], v[:, :0], bias).shape == (B, 0, H, Q, D)
    assert torch.equal(triangle_attention(q, k[..., :0, :], v[..., :0, :], bias[..., :0]), torch.zeros_like(q))


def test_a_tensor_beside_an_element_without_valid_keys() -> None:
    q, k, v = (draw(2, 2, 1, 40, D, grad=False, seed=seed) for seed in range(3))
    keep = torch.ones(2, 2, 1, 1, 40, dtype=torch.bool)
    keep[1] = False
    out = triangle_attention(q, k, v, smooth(2, 1, 1, 40, 40), keep)
    expected, _ = formula(q[0], k[0], v[0], smooth(2, 1, 1, 40, 40)[0], None, D**-0.5)
    assert bool(((out[0] - expected).norm(dim=-1).amax(-1) <= 1e-3 * spread(v[0])).all())
    assert bool((out[1] == 0).all())


@pytest.mark.parametrize("lead", [(2, 1), (1, 1), ()], ids=str)
def test_a_pair_bias_tensor_shared_by_samples(lead: tuple[int, ...]) -> None:
    """Samples of a diffusion model: `[batch, samples, H, N, D]`, one bias for all samples of an element."""
    q, k, v = (draw(2, 3, H, 40, D, grad=False, seed=seed) for seed in range(3))
    bias = smooth(*lead, H, 40, 40)
    keep = (torch.arange(40) < torch.tensor([33, 25])[:, None]).reshape(2, 1, 1, 1, 40)
    out = pair_bias_attention(q, k, v, bias, keep)
    expected, _ = formula(q, k, v, bias, keep, D**-0.5)
    assert bool(((out - expected).norm(dim=-1).amax(-1) <= 1e-3 * spread(v)).all())


def test_bad_input() -> None:
    (q, k, v), phi = problem()
    bias, tensor = fb.FactoredBias(*phi), smooth(B, 1, H, Q, K)

    def fails(kind: type[Exception], match: str, *given: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            triangle_attention(*given, **options)

    fails(TypeError, "bias must be a FactoredBias or a tensor, got NoneType", q, k, v, None)
    fails(NotImplementedError, "return_aux=True needs bias as a FactoredBias", q, k, v, tensor, return_aux=True)
    fails(ValueError, "needs a gradient", q, k, v, tensor.requires_grad_())
    fails(ValueError, r"bias must have shape \(2, 1, 4, 17, 13\)", q, k, v, tensor[:, :, :1])
    fails(ValueError, "phi_q of bias", q, k, v, fb.FactoredBias(*(x[:, None].expand(B, N, -1, -1, -1) for x in phi)))
    fails(ValueError, r"mask must have shape \(2, 3, 1, 1, 13\)", q, k, v, bias, valid()[:, :1])
    fails(ValueError, "kv_lengths must have shape", q, k, v, bias, kv_lengths=lengths()[..., 0])
    fails(ValueError, "give one of them", q, k, v, bias, valid(), kv_lengths=lengths())
    fails(ValueError, "q must have 5 dimensions", q[0, 0], k, v, bias)
    fails(ValueError, "tol", q.detach(), k.detach(), v.detach(), tensor.detach(), tol=2.0)
    with pytest.raises(ValueError, match=r"bias must be \[\*batch, 4, 17, 13\]"):
        pair_bias_attention(q, k, v, tensor.detach().mT)
