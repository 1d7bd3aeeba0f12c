"""Boltz-1 and Boltz-2, structures of complexes, https://pypi.org/project/boltz: triangles, and tokens with a pair bias.

Boltz-2 makes the biases of its diffusion once for all steps, Boltz-1 keeps them in a cache: their factors are reused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashbias.integrations.protein.pairs import PairFamily, TriangleFamily, attend, factors_for, own_forward

__all__ = ["Boltz1PairBias", "Boltz2PairBias", "BoltzTriangle"]


def forward_1(
    attention: Any,
    s: Tensor,
    z: Tensor,
    mask: Tensor,
    multiplicity: int = 1,
    to_keys: Any = None,
    model_cache: dict[str, Tensor] | None = None,
) -> Tensor:
    """`AttentionPairBias.forward` of Boltz-1 with factors."""
    out = None
    if to_keys is None:
        tokens = attention.norm_s(s) if attention.initial_norm else s
        out = attend_tokens(attention, tokens, tokens, _projected(attention, z, model_cache), mask)
    return own_forward(attention, s, z, mask, multiplicity, to_keys, model_cache) if out is None else out


def forward_2(attention: Any, s: Tensor, z: Tensor, mask: Tensor, k_in: Tensor, multiplicity: int = 1) -> Tensor:
    """`AttentionPairBias.forward` of Boltz-2 with factors."""
    out = attend_tokens(attention, s, k_in, attention.proj_z(z), mask) if s.shape == k_in.shape else None
    return own_forward(attention, s, z, mask, k_in, multiplicity) if out is None else out


def attend_tokens(attention: Any, s: Tensor, k_in: Tensor, bias: Tensor, mask: Tensor) -> Tensor | None:
    """Attention of tokens, gated and projected; None where the model's own code has to run.

    Args:
        attention: of either version, patched.
        s: `[B * samples, N, C]`, queries, after their norm.
        k_in: `[B * samples, N, C]`, keys and values.
        bias: `[B, H, N, N]`, shared by the samples of one protein.
        mask: `[B * samples or 1, N]`, 1 where a token is valid.

    Returns:
        `[B * samples, N, C]`.
    """
    heads, width, batch = attention.num_heads, attention.head_dim, (bias.shape[0], s.shape[0] // bias.shape[0])
    keep = (mask.float() == 1)[:, None, None]
    keep = keep[None] if keep.shape[0] == 1 else keep.unflatten(0, batch)
    inputs_need_grad = torch.is_grad_enabled() and (s.requires_grad or attention.proj_q.weight.requires_grad)
    factors = factors_for(attention, bias[:, None], keep, batch, width, needs_grad=inputs_need_grad)
    if factors is None:
        return None
    projected = attention.proj_q(s), attention.proj_k(k_in), attention.proj_v(k_in)
    q, k, v = (x.float().unflatten(-1, (heads, width)).unflatten(0, batch).transpose(-2, -3) for x in projected)
    # The model leaves lower precision here, and so does this.
    with torch.autocast(s.device.type, enabled=False):
        out = attend(attention, q, k, v, factors, keep, width)
    out = out.flatten(0, 1).flatten(-2).to(projected[2].dtype)
    return attention.proj_o(attention.proj_g(s).sigmoid() * out)


def _projected(attention: Any, z: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
    """The bias, from the model's cache and into it as the model does."""
    if cache is None:
        return attention.proj_z(z)
    if "z" not in cache:
        cache["z"] = attention.proj_z(z)
    return cache["z"]


class BoltzTriangle(TriangleFamily):
    """Triangle attention of both versions."""

    name = "Boltz triangle"
    attentions = ("boltz.model.layers.triangular_attention.attention.TriangleAttention",)
    inner_classes = ("boltz.model.layers.triangular_attention.primitives.Attention",)


class Boltz1PairBias(PairFamily):
    """Single attention of Boltz-1, of its trunk and of its diffusion."""

    name = "Boltz-1 pair bias"
    attentions = ("boltz.model.layers.attention.AttentionPairBias",)
    windows = ("boltz.model.modules.transformers.AtomTransformer",)
    forward = staticmethod(forward_1)

    def is_reused(self, attention: Any) -> bool:
        """In the diffusion, whose attentions come without a norm of their own."""
        return not attention.initial_norm


class Boltz2PairBias(PairFamily):
    """Single attention of Boltz-2, of its trunk and of its diffusion."""

    name = "Boltz-2 pair bias"
    attentions = ("boltz.model.layers.attentionv2.AttentionPairBias",)
    windows = ("boltz.model.modules.transformersv2.AtomTransformer",)
    forward = staticmethod(forward_2)

    def is_reused(self, attention: Any) -> bool:
        """In the diffusion, whose attentions are given their bias ready made."""
        return not attention.compute_pair_bias
