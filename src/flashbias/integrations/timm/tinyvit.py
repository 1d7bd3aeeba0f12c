"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers, https://arxiv.org/abs/2207.10666.

    b[h, i, j] = attention_biases[h, |dy| * width + |dx|], (dy, dx) the offset between tokens i and j of a window

The table is LeViT's, and exact as there (`levit.py`). Windows are not shifted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashbias.integrations.call import call
from flashbias.integrations.timm.base import TimmFamily
from flashbias.integrations.timm.levit import MADE_OF, distance_bias
from flashbias.integrations.windows import bias_of

__all__ = ["TinyViT"]


def forward(attention: Any, x: Tensor) -> Tensor:
    """`Attention.forward` with its own table."""
    projected = attention.qkv(attention.norm(x)).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    widths = (attention.key_dim, attention.key_dim, attention.val_dim)
    query, key, value = projected.split(widths, dim=-1)
    bias = bias_of(attention, x.device, partial(distance_bias, attention))
    out = call(attention, query, key, value, bias, scale=attention.scale, dropout_p=0.0)
    return attention.proj(out.flatten(-2))


class TinyViT(TimmFamily):
    """TinyViT."""

    name = "TinyViT (timm)"
    attentions = ("timm.models.tiny_vit.Attention",)
    forward = staticmethod(forward)
    exact_bias = staticmethod(distance_bias)
    made_of = MADE_OF
