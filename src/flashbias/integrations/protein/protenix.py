"""Protenix, structures of complexes, https://pypi.org/project/protenix: triangles, and tokens with a pair bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashbias.integrations.protein.pairs import PairFamily, TriangleFamily, attend, factors_for, own_forward

__all__ = ["ProtenixPairBias", "ProtenixTriangle"]


def forward(attention: Any, q_x: Tensor, kv_x: Tensor, attn_bias: Tensor | None = None, **options: Any) -> Tensor:
    """`Attention.forward` with factors; windows of atoms are the model's own."""
    factors = None
    # A bias of fewer dimensions than the scores is one for all heads, which this model's pair bias never is.
    if attn_bias is not None and attn_bias.dim() == q_x.dim() + 1 and not options.get("n_queries"):
        needs_grad = torch.is_grad_enabled() and (q_x.requires_grad or attention.linear_q.weight.requires_grad)
        batch = torch.broadcast_shapes(q_x.shape[:-2], attn_bias.shape[:-3])
        factors = factors_for(attention, attn_bias, None, batch, attention.c_hidden, needs_grad=needs_grad)
    if factors is None:
        return own_forward(attention, q_x, kv_x, attn_bias, **options)
    projected = attention._prep_qkv(q_x=q_x, kv_x=kv_x, apply_scale=False)
    # The model leaves lower precision here, and so does this.
    with torch.autocast(q_x.device.type, enabled=False):
        q, k, v = (x.float() if x.dtype.itemsize < 4 else x for x in projected)
        out = attend(attention, q, k, v, factors, None, attention.c_hidden)
    return attention._wrap_up(out.to(projected[0].dtype), q_x)


class ProtenixTriangle(TriangleFamily):
    """Triangle attention."""

    name = "Protenix triangle"
    attentions = ("protenix.model.triangular.triangular.TriangleAttention",)
    inner_classes = ("protenix.model.triangular.layers.Attention",)


class ProtenixPairBias(PairFamily):
    """Single attention of the trunk and of the diffusion."""

    name = "Protenix pair bias"
    attentions = ("protenix.model.modules.transformer.AttentionPairBias",)
    inner = hooked = "attention"
    inner_classes = ("protenix.model.modules.primitives.Attention",)
    windows = ("protenix.model.modules.transformer.AtomTransformer",)
    forward = staticmethod(forward)

    def is_reused(self, attention: Any) -> bool:
        """In the diffusion, whose attentions are conditioned on single features."""
        return attention.has_s
