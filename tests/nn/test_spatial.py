"""Attention between points, against its formula, and what it keeps in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashbias.nn import SpatialBiasAttention, SpatialTransformerLayer

WIDTH, HEADS = 12, 3


def lively(layer: SpatialBiasAttention) -> SpatialBiasAttention:
    """Weights that differ between tokens: at the start they do not."""
    with torch.no_grad():
        torch.nn.init.normal_(layer.weight.weight, std=0.7)
    return layer


def formula(layer: SpatialBiasAttention, tokens: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer with N×N matrices."""
    heads, head_dim = layer.num_heads, layer.embed_dim // layer.num_heads
    q, k, v = (
        torch.nn.functional.linear(tokens, *pair).unflatten(-1, (heads, head_dim)).transpose(-3, -2)
        for pair in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    square = (points[..., :, None, :] - points[..., None, :, :]).square().sum(-1)
    weight = torch.log1p(torch.exp(tokens @ layer.weight.weight.mT + layer.weight.bias)).mT
    scores = q @ k.mT / math.sqrt(head_dim) - weight[..., None] * square[..., None, :, :]
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, None, :], -math.inf)
    return layer.out((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest memory that any operator hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor))
        self.nbytes = max(self.nbytes, *sizes, 0)
        return out


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_formula_with_gradients(dim: int, lead: tuple[int, ...], padded: bool) -> None:
    torch.manual_seed(dim)
    layer = lively(SpatialBiasAttention(WIDTH, HEADS, dim)).double()
    tokens = torch.randn(*lead, 11, WIDTH, dtype=torch.float64, requires_grad=True)
    points = torch.randn(*lead, 11, dim, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(11) < torch.randint(1, 12, (*lead, 1)) if padded else None
    # Rows of padding mean nothing: neither they nor what flows back from them is compared.
    upstream = torch.randn(*lead, 11, WIDTH, dtype=torch.float64)
    if mask is not None:
        upstream = upstream * mask[..., None]
    leaves = (tokens, points, *layer.parameters())
    out, expected = layer(tokens, points, mask), formula(layer, tokens, points, mask)
    for x, y in ((out, expected),) if mask is None else ((out[mask], expected[mask]),):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-11)
    found = torch.autograd.grad(out, leaves, upstream)
    for x, y in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-10 * max(1.0, float(y.abs().max())))


def test_points_shared_by_the_batch() -> None:
    layer = lively(SpatialBiasAttention(WIDTH, HEADS))
    tokens, points = torch.randn(4, 9, WIDTH), torch.randn(9, 3)
    mask = torch.arange(9) < torch.tensor([[9], [4], [7], [1]])
    shared = points.expand(4, -1, -1)
    torch.testing.assert_close(layer(tokens, points), layer(tokens, shared))
    torch.testing.assert_close(layer(tokens, points, mask)[mask], layer(tokens, shared, mask)[mask])
    assert layer.bias(tokens, points).phi_k.shape == (1, 9, 5)


@pytest.mark.parametrize("value", [0.0, 1e6, math.inf, math.nan])
def test_points_of_padding_change_nothing(value: float) -> None:
    """Meshes far from the origin, padded by anything: as accurate as without padding, forward and backward."""
    torch.manual_seed(0)
    layer = lively(SpatialBiasAttention(WIDTH, HEADS))
    tokens, points = torch.randn(2, 20, WIDTH), 1000 + torch.randn(2, 20, 3)
    mask = (torch.arange(20) < 15).expand(2, -1)
    points[:, 15:] = value
    points.requires_grad_()
    out = layer(tokens, points, mask)[:, :15]
    short = points.detach()[:, :15].requires_grad_()
    expected = layer(tokens[:, :15], short)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-6)
    (found,) = torch.autograd.grad(out.square().sum(), points)
    (wanted,) = torch.autograd.grad(expected.square().sum(), short)
    torch.testing.assert_close(found[:, :15], wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))
    assert bool((found[:, 15:] == 0).all())


def test_a_batch_element_of_padding_alone() -> None:
    layer = SpatialBiasAttention(WIDTH, HEADS)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1] = False
    out = layer(torch.randn(2, 8, WIDTH), torch.randn(2, 8, 3), mask)
    torch.testing.assert_close(out[1], layer.out.bias.expand(8, -1))


@pytest.mark.parametrize("weight", [1e-4, 1.0, 50.0])
def test_weights_begin_as_asked_for(weight: float) -> None:
    layer = SpatialBiasAttention(WIDTH, HEADS, 2, init_weight=weight)
    points = torch.randn(6, 2, dtype=torch.float64)
    square = (points[:, None] - points).square().sum(-1)
    bias = layer.double().bias(torch.randn(6, WIDTH, dtype=torch.float64), points).dense()
    torch.testing.assert_close(bias, (-weight * square).expand(HEADS, 6, 6), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_tokens_leave_the_points_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = lively(SpatialBiasAttention(WIDTH, HEADS)).to(dtype)
    tokens, points = torch.randn(30, WIDTH).to(dtype), 300 + 5 * torch.randn(30, 3)
    assert layer.bias(tokens, points).phi_q.dtype == torch.float32
    exact = lively(SpatialBiasAttention(WIDTH, HEADS)).double()
    exact.load_state_dict(layer.double().state_dict())
    expected = formula(exact, tokens.double(), points.double())
    out = layer.to(dtype)(tokens, points).detach().double()
    expected = expected.detach()
    assert float((out - expected).abs().max() / expected.abs().max()) < 8 * torch.finfo(dtype).eps


def test_autocast() -> None:
    torch.manual_seed(0)
    layer = lively(SpatialBiasAttention(WIDTH, HEADS))
    tokens, points = torch.randn(2, 30, WIDTH), torch.randn(2, 30, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(tokens, points)
        assert out.dtype == torch.bfloat16
    error = (out - layer(tokens, points)).abs().max().detach()
    assert float(error) < 0.05 * float(out.detach().abs().max())


def test_dropout_in_training_alone() -> None:
    layer = SpatialBiasAttention(WIDTH, HEADS, dropout=0.5)
    tokens, points = torch.randn(40, WIDTH), torch.randn(40, 3)
    torch.manual_seed(0)
    first = layer(tokens, points)
    assert not torch.equal(layer(tokens, points), first)
    layer.eval()
    assert torch.equal(layer(tokens, points), layer(tokens, points))


def test_implementation_is_passed_on() -> None:
    layer = SpatialBiasAttention(WIDTH, HEADS, impl="reference")
    tokens, points = torch.randn(10, WIDTH), torch.randn(10, 3)
    reference = layer(tokens, points)
    layer.impl = "sdpa"
    torch.testing.assert_close(layer(tokens, points), reference)
    layer.impl = "fastest"
    with pytest.raises(ValueError, match="impl must be"):
        layer(tokens, points)


@pytest.mark.parametrize("padded", [False, True])
def test_no_matrix_of_20_000_points(padded: bool) -> None:
    """The largest tensor of a pass is that of queries, keys and values; a row of pairs in bits would be as large."""
    length = 20_000
    layer = SpatialBiasAttention(8, 1)
    tokens, points = torch.randn(length, 8), torch.randn(length, 3)
    mask = torch.arange(length) < length - 100 if padded else None
    with torch.no_grad(), LargestTensor() as largest:
        layer(tokens, points, mask)
    assert largest.nbytes <= length * 24 * 4


@pytest.mark.parametrize("padded", [False, True])
def test_no_matrix_in_the_backward_pass(padded: bool) -> None:
    length = 3_000
    layer = SpatialBiasAttention(8, 1)
    tokens, points = torch.randn(length, 8, requires_grad=True), torch.randn(length, 3, requires_grad=True)
    mask = torch.arange(length) < length - 100 if padded else None
    with LargestTensor() as largest:
        layer(tokens, points, mask).sum().backward()
    assert largest.nbytes < length * length // 8


def test_layer_is_attention_and_mlp_after_their_norms() -> None:
    torch.manual_seed(0)
    layer = SpatialTransformerLayer(WIDTH, HEADS, dim=2, hidden=7).double()
    lively(layer.attention)
    tokens, points = torch.randn(2, 9, WIDTH).double(), torch.randn(2, 9, 2).double()
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    normed = torch.nn.functional.layer_norm(tokens, (WIDTH,))
    between = tokens + formula(layer.attention, normed, points, mask)
    first, _, second = layer.mlp
    hidden = torch.nn.functional.gelu(first(torch.nn.functional.layer_norm(between, (WIDTH,))))
    assert hidden.shape == (2, 9, 7)
    expected = between + second(hidden)
    torch.testing.assert_close(layer(tokens, points, mask)[mask], expected[mask], rtol=0.0, atol=1e-11)


def test_layer_learns_what_only_places_tell() -> None:
    """The mean of a random value over the neighbourhood: without distances nothing tells who is near."""
    torch.manual_seed(0)
    points = torch.rand(4, 64, 2)
    near = (torch.cdist(points, points) < 0.25).float()
    near = near / near.sum(-1, keepdim=True)

    def train(init_weight: float, learn: bool) -> tuple[float, float]:
        """Mean squared error at new values, and that of always saying 0."""
        torch.manual_seed(1)
        layer = SpatialTransformerLayer(16, 2, dim=2, init_weight=init_weight)
        layer.attention.weight.requires_grad_(learn)
        model = torch.nn.ModuleList([torch.nn.Linear(1, 16), layer, torch.nn.Linear(16, 1)])
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(40):
            values = torch.randn(4, 64, 1)
            loss = (model[2](layer(model[0](values), points)) - near @ values).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            values = torch.randn(4, 64, 1)
            error = (model[2](layer(model[0](values), points)) - near @ values).square().mean()
        return float(error), float((near @ values).square().mean())

    error, size = train(20.0, True)
    assert error < 0.4 * size
    error, size = train(1e-9, False)
    assert error > 0.6 * size


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        layer = SpatialBiasAttention(WIDTH, HEADS, init_weight=2.0)
    layer.to_empty(device="cpu").reset_parameters()
    assert bool(torch.isfinite(layer(torch.randn(5, WIDTH), torch.randn(5, 3))).all())


def test_bad_input() -> None:
    for arguments, options, match in (
        ((0, 1), {}, "embed_dim must be a positive integer, got 0"),
        ((8, 3), {}, "embed_dim must be a multiple of num_heads, got 8 and 3"),
        ((8, 2, 2.0), {}, "dim must be a positive integer, got 2.0"),
        ((8, 2), {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ((8, 2), {"init_weight": 0.0}, "init_weight must be positive and finite, got 0.0"),
    ):
        for kind in (SpatialBiasAttention, SpatialTransformerLayer):
            with pytest.raises(ValueError, match=match):
                kind(*arguments, **options)
    with pytest.raises(ValueError, match="hidden must be None or a positive integer, got 0"):
        SpatialTransformerLayer(8, 2, hidden=0)
    layer = SpatialBiasAttention(8, 2)
    tokens, points, mask = torch.randn(2, 5, 8), torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    for given, kind, match in (
        ((tokens[..., :7], points), ValueError, r"tokens must be \[\*batch, N, 8\], got shape \(2, 5, 7\)"),
        ((tokens, points.long()), TypeError, "points must be floating point, got torch.int64"),
        ((tokens, points[..., :2]), ValueError, r"points must have shape \(2, 5, 3\) or \(5, 3\), got \(2, 5, 2\)"),
        ((tokens, points, mask.float()), TypeError, "mask must be boolean"),
        ((tokens, points, mask[:1]), ValueError, r"mask must have shape \(2, 5\), got \(1, 5\)"),
    ):
        with pytest.raises(kind, match=match):
            layer(*given)
