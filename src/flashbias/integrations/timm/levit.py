"""LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference, https://arxiv.org/abs/2104.01136.

    b[h, i, j] = attention_biases[h, |dy| * width + |dx|], (dy, dx) the offset between tokens i and j

Exact through a table: what belongs to a pair of distances stands at all four offsets that have them. Between two stages
an attention shrinks the image: its queries are every second token of each axis, and its keys all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashbias.factored import FactoredBias
from flashbias.integrations.call import call
from flashbias.integrations.timm.base import TimmFamily
from flashbias.integrations.windows import OffsetTable, bias_of

__all__ = ["MADE_OF", "LeViT", "LeViTDownsample", "distance_bias"]

FILE = "timm.models.levit"


MADE_OF = ("attention_biases",)
"""Path of the parameter that makes the table."""


def distance_bias(attention: Any) -> FactoredBias:
    """The bias between all tokens of an attention with `attention_biases` and a `resolution`."""
    window = attention.resolution
    return OffsetTable(all_offsets(attention.attention_biases, window), window).bias()


def all_offsets(weight: Tensor, window: Sequence[int]) -> Tensor:
    """Spread a table over distances to all offsets.

    Args:
        weight: `[H, height * width]`.
        window: height and width, in tokens.

    Returns:
        `[offsets, H]`, in the order of Swin's tables.
    """
    dy, dx = (torch.arange(1 - side, side, device=weight.device).abs() for side in window)
    return weight[:, (dy[:, None] * window[1] + dx).flatten()].mT


def forward(attention: Any, x: Tensor) -> Tensor:
    """`Attention.forward` with its own table."""
    widths = (attention.key_dim, attention.key_dim, attention.val_dim)
    query, key, value = heads_of(attention, attention.qkv(x)).split(widths, dim=-1)
    bias = bias_of(attention, x.device, partial(distance_bias, attention))
    out = call(attention, query, key, value, bias, scale=attention.scale, dropout_p=0.0)
    return project(attention, out, x.shape[-2:])


def forward_downsample(attention: Any, x: Tensor) -> Tensor:
    """`AttentionDownsample.forward` with its own table."""
    key, value = heads_of(attention, attention.kv(x)).split((attention.key_dim, attention.val_dim), dim=-1)
    query = heads_of(attention, attention.q(x))
    bias = bias_of(attention, x.device, partial(strided_bias, attention))
    out = call(attention, query, key, value, bias, scale=attention.scale, dropout_p=0.0)
    return project(attention, out, [(side - 1) // attention.stride + 1 for side in x.shape[-2:]])


def strided_bias(attention: Any) -> FactoredBias:
    """The bias of an attention whose queries are fewer than its keys."""
    return strided(distance_bias(attention), attention.resolution, attention.stride)


def strided(bias: FactoredBias, window: Sequence[int], stride: int) -> FactoredBias:
    """Keep the queries at every `stride`-th token of both axes."""
    assert bias.table is not None
    code_q, code_k = bias.codes()
    code_q = code_q.unflatten(0, tuple(window))[::stride, ::stride].flatten()
    return FactoredBias.from_table(bias.table, len(code_q), len(code_k), code_q, code_k)


def heads_of(attention: Any, projected: Tensor) -> Tensor:
    """`[B, H, N, width of a head]` of tokens `[B, N, …]`, or of images `[B, …, height, width]`."""
    if attention.use_conv:
        return projected.flatten(2).unflatten(1, (attention.num_heads, -1)).mT
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def project(attention: Any, out: Tensor, size: Sequence[int]) -> Tensor:
    """Project the output `[B, N, H, val_dim]`; `size` is that of an image."""
    out = out.flatten(-2)
    return attention.proj(out.mT.unflatten(-1, tuple(size)) if attention.use_conv else out)


class LeViT(TimmFamily):
    """LeViT, with linear layers or convolutions."""

    name = "LeViT (timm)"
    attentions = (f"{FILE}.Attention",)
    forward = staticmethod(forward)
    exact_bias = staticmethod(distance_bias)
    made_of = MADE_OF


class LeViTDownsample(TimmFamily):
    """LeViT's attentions between two stages."""

    name = "LeViT downsampling (timm)"
    attentions = (f"{FILE}.AttentionDownsample",)
    forward = staticmethod(forward_downsample)
    exact_bias = staticmethod(strided_bias)
    made_of = MADE_OF
