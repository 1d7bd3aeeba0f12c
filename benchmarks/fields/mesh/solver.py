"""A transformer between points, and the ways in which its attention can be computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, softplus

from flashbias import attention
from flashbias.nn import SpatialBiasAttention, SpatialTransformerLayer

__all__ = ["NARROWEST", "WAYS", "Solver", "SurfaceAttention", "Way", "dense_attention", "flex_attention"]

NARROWEST = 300.0
"""Heads begin with weights between 1 and this: they look over lengths from 1 to 0.06."""


@dataclass(frozen=True)
class Way:
    """One way of computing the attention of a solver.

    Args:
        prepare: what all layers share, from the points `[B, N, 3]`.
        attend: the heads' outputs, from q, k, v `[B, H, N, d]`, weights `[B, H, N]` and what is prepared; None for the
            layer as it is.
        learns: whether the weights get a gradient.
    """

    prepare: Callable[[Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None
    learns: bool = True


class SurfaceAttention(SpatialBiasAttention):
    """`SpatialBiasAttention` that can be computed in other ways, with the same parameters.

    Args:
        embed_dim: E.
        num_heads: H.
        way: how.
    """

    def __init__(self, embed_dim: int, num_heads: int, way: Way) -> None:
        super().__init__(embed_dim, num_heads)
        self.way = way
        weights = torch.logspace(0, math.log10(NARROWEST), num_heads)
        nn.init.normal_(self.weight.weight, std=1 / math.sqrt(embed_dim))
        self.weight.bias.data.copy_(weights + torch.log(-torch.expm1(-weights)))

    def forward(self, tokens: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; `points` are what the way has prepared."""
        if self.way.attend is None:
            return super().forward(tokens, points, mask)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        weight = softplus(self.weight(tokens).float()).mT
        out = self.way.attend(q, k, v, weight if self.way.learns else weight.detach(), points)
        return self.out(out.transpose(-3, -2).flatten(-2))


class Solver(nn.Module):
    """Point and potential to density: an encoder, transformer layers, a decoder.

    Args:
        way: how attention is computed.
        width: E.
        heads: H.
        layers: of the transformer.
        hidden: width inside the layers' mlp.
    """

    def __init__(self, way: Way, width: int = 128, heads: int = 8, layers: int = 4, hidden: int = 256) -> None:
        super().__init__()
        self.way = way
        self.encoder = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(SpatialTransformerLayer(width, heads, hidden=hidden) for _ in range(layers))
        for layer in self.layers:
            layer.attention = SurfaceAttention(width, heads, way)
        self.decoder = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, points: Tensor, potential: Tensor) -> Tensor:
        """Density `[B, N]`, from points `[B, N, 3]` and potential `[B, N]`."""
        prepared = self.way.prepare(points)
        tokens = self.encoder(torch.cat([points, potential[..., None]], -1))
        for layer in self.layers:
            tokens = layer(tokens, prepared)
        return self.decoder(tokens)[..., 0]


# -------------------------------------------------------------------- ways


def _points(points: Tensor) -> Tensor:
    return points


def square_distances(points: Tensor) -> Tensor:
    """`[B, 1, N, N]`, in the dtype of an autocast region if there is one: half the memory of float32."""
    kind = points.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else points.dtype
    square = points.new_empty(*points.shape[:-1], points.shape[-2], dtype=dtype)
    for rows, some in zip(square.split(1024, -2), points.split(1024, -2), strict=True):
        rows.copy_((some[..., :, None, :] - points[..., None, :, :]).square().sum(-1))
    return square[..., None, :, :]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The fastest kernel of torch that reads a matrix: cuDNN's, or where it cannot, the memory-efficient one."""
    if q.device.type == "cpu":
        return scaled_dot_product_attention(q, k, v, bias)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
        return scaled_dot_product_attention(q, k, v, bias)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, points: Tensor) -> Tensor:
    """FlexAttention, which computes the bias from the points in place."""
    return _flex(q.device.type)(q, k, v, weight, *(x.contiguous() for x in points.unbind(-1)))


@cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    """Compiled on a GPU, for that is where it has a kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            dx, dy, dz = x[b, i] - x[b, j], y[b, i] - y[b, j], z[b, i] - z[b, j]
            return score - weight[b, h, i] * (dx * dx + dy * dy + dz * dz)

        out: Any = flex_attention(q, k, v, score_mod)
        return out

    return run if device_type == "cpu" else torch.compile(run, dynamic=False, fullgraph=True)


def _without(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, points: Tensor) -> Tensor:
    """The same kernel as with factors."""
    out = attention(q, k, v)
    assert isinstance(out, Tensor)  # no lse was asked for
    return out


def _matrix(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    """A bias for every pair and head, of the queries' dtype."""
    return dense_attention(q, k, v, -weight.to(q.dtype)[..., None] * square.to(q.dtype))


WAYS = {
    "factors": Way(_points, None),
    "no bias": Way(_points, _without),
    "matrix": Way(square_distances, _matrix, learns=False),
    "matrix, learned": Way(square_distances, _matrix),
    "flex": Way(_points, flex_attention, learns=False),
    "flex, learned": Way(_points, flex_attention),
}
"""The best dense kernel, cuDNN's, has no gradient to the matrix: `matrix` trains all but the weights."""
