"""Attention of a sequence with a bias of its positions, against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashbias as fb
from flashbias.biases import RelativeBuckets
from flashbias.biases.alibi import alibi_slopes
from flashbias.nn import BiasedSelfAttention

WIDTH, HEADS = 12, 3


def formula(layer: BiasedSelfAttention, tokens: Tensor, dense: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer with N×N matrices."""
    q, k, v = layer.qkv(tokens).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
    scores = q @ k.mT / math.sqrt(WIDTH // HEADS) + dense
    if layer.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, None, :], -math.inf)
    return layer.out((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


def alibi(length: int) -> Tensor:
    """Its formula, without factors."""
    position = torch.arange(length, dtype=torch.float64)
    return -alibi_slopes(HEADS).double()[:, None, None] * (position[:, None] - position).abs()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_formula_with_gradients(is_causal: bool, lead: tuple[int, ...], padded: bool) -> None:
    torch.manual_seed(0)
    family = fb.Alibi(HEADS, symmetric=not is_causal)
    layer = BiasedSelfAttention(WIDTH, HEADS, family, is_causal=is_causal).double()
    tokens = torch.randn(*lead, 11, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(11) < torch.randint(1, 12, (*lead, 1)) if padded else None
    upstream = torch.randn(*lead, 11, WIDTH, dtype=torch.float64)
    if mask is not None:
        upstream = upstream * mask[..., None]  # rows of padding mean nothing
    out, expected = layer(tokens, mask), formula(layer, tokens, alibi(11), mask)
    for x, y in ((out, expected),) if mask is None else ((out[mask], expected[mask]),):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-6)  # factors are float32
    leaves = (tokens, *layer.parameters())
    found, wanted = (torch.autograd.grad(x, leaves, upstream) for x in (out, expected))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-6 * max(1.0, float(y.abs().max())))


def test_a_learned_family_is_trained() -> None:
    torch.manual_seed(0)
    family = RelativeBuckets(HEADS)
    layer = BiasedSelfAttention(WIDTH, HEADS, family)
    tokens = torch.randn(2, 9, WIDTH)
    (learned,) = family.parameters()
    assert any(parameter is learned for parameter in layer.parameters())
    nn.init.normal_(learned)
    dense = family(seqlen_q=9, seqlen_k=9).dense()
    torch.testing.assert_close(layer(tokens), formula(layer, tokens, dense))
    layer(tokens).square().sum().backward()
    assert learned.grad is not None and float(learned.grad.abs().max()) > 0


def test_longer_than_anything_before_and_causal() -> None:
    """What comes later changes nothing, whatever the length."""
    torch.manual_seed(0)
    layer = BiasedSelfAttention(WIDTH, HEADS, fb.Alibi(HEADS), is_causal=True)
    tokens = torch.randn(300, WIDTH)
    torch.testing.assert_close(layer(tokens)[:70], layer(tokens[:70]), rtol=0.0, atol=1e-5)


def test_autocast() -> None:
    torch.manual_seed(0)
    layer = BiasedSelfAttention(WIDTH, HEADS, fb.Alibi(HEADS), is_causal=True)
    tokens = torch.randn(2, 30, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(tokens)
        assert out.dtype == torch.bfloat16
    exact = layer(tokens).detach()
    assert float((out - exact).detach().abs().max()) < 0.05 * float(exact.abs().max())


def test_dropout_in_training_alone_and_impl_passed_on() -> None:
    layer = BiasedSelfAttention(WIDTH, HEADS, fb.Alibi(HEADS), is_causal=True, dropout=0.5)
    tokens = torch.randn(40, WIDTH)
    torch.manual_seed(0)
    first = layer(tokens)
    assert not torch.equal(layer(tokens), first)
    layer.eval()
    assert torch.equal(layer(tokens), layer(tokens))
    layer.impl = "fastest"
    with pytest.raises(ValueError, match="impl must be"):
        layer(tokens)


def test_bad_input() -> None:
    wrong: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
        ((0, 1, fb.Alibi(1)), {}, ValueError, "embed_dim must be a positive integer, got 0"),
        ((8, 3, fb.Alibi(3)), {}, ValueError, "embed_dim must be a multiple of num_heads, got 8 and 3"),
        ((8, 2, fb.Alibi(4)), {}, ValueError, "bias must be for 1 or 2 heads, got 4"),
        ((8, 2, None), {}, TypeError, "bias must be a module that makes a FactoredBias, got NoneType"),
        ((8, 2, fb.Alibi(2)), {"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    )
    for arguments, options, kind, match in wrong:
        with pytest.raises(kind, match=match):
            BiasedSelfAttention(*arguments, **options)
    layer = BiasedSelfAttention(8, 2, fb.Alibi(2))
    tokens, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    for given, kind, match in (
        ((tokens[..., :7],), ValueError, r"tokens must be \[\*batch, N, 8\], got shape \(2, 5, 7\)"),
        ((tokens, mask.float()), TypeError, "mask must be boolean"),
        ((tokens, mask[:1]), ValueError, r"mask must have shape \(2, 5\), got \(1, 5\)"),
    ):
        with pytest.raises(kind, match=match):
            layer(*given)

    class Matrix(nn.Module):
        def forward(self, seqlen_q: int, seqlen_k: int) -> Tensor:
            return torch.zeros(seqlen_q, seqlen_k)

    with pytest.raises(TypeError, match="bias must make a FactoredBias, Matrix made a Tensor"):
        BiasedSelfAttention(8, 2, Matrix())(tokens)
