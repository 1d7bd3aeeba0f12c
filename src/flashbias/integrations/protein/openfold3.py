"""OpenFold3, structures of complexes, https://pypi.org/project/openfold3: triangles, and tokens with a pair bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashbias.integrations.base import Options, Plan
from flashbias.integrations.protein.pairs import (
    PairFamily,
    TriangleFamily,
    attend,
    factors_for,
    own_forward,
    triangle_forward,
)
from flashbias.integrations.report import AttentionEntry

__all__ = ["OpenFold3AtomPairBias", "OpenFold3DiffusionPairBias", "OpenFold3PairBias", "OpenFold3Triangle"]

PLACE = "openfold3.core.model.layers"
ATTENTION = "openfold3.core.model.primitives.attention.Attention"


def forward(
    mha: Any,
    q_x: Tensor,
    kv_x: Tensor,
    biases: list[Tensor] | None = None,
    use_high_precision: bool = False,
    **options: Any,
) -> Tensor:
    """`Attention.forward` with factors; without a choice of kernels, which they do not need."""
    # What calls it gives the mask, 0 where a key is seen, and the bias of the pairs.
    mask, bias = biases or (None, None)
    assert mask is not None and bias is not None, "an attention with a pair bias has been called without one"
    keep = mask == 0
    needs_grad = torch.is_grad_enabled() and (q_x.requires_grad or mha.linear_q.weight.requires_grad)
    factors = factors_for(mha, bias, keep, q_x.shape[:-2], mha.c_hidden, needs_grad=needs_grad)
    if factors is None:
        return own_forward(mha, q_x, kv_x, biases, use_high_precision=use_high_precision, **options)
    q, k, v = mha._prep_qkv(q_x, kv_x, apply_scale=False)
    dtype = q.dtype
    if use_high_precision:
        q, k, v = q.float(), k.float(), v.float()
    return mha._wrap_up(attend(mha, q, k, v, factors, keep, mha.c_hidden).to(dtype), q_x)


class OpenFold3Triangle(TriangleFamily):
    """Triangle attention."""

    name = "OpenFold3 triangle"
    attentions = (f"{PLACE}.triangular_attention.TriangleAttention",)
    inner_classes = (ATTENTION,)

    @staticmethod
    def forward(
        triangle: Any,
        x: Tensor,
        mask: Tensor | None = None,
        transpose_bias: bool = False,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """`TriangleAttention.forward` with factors."""
        out = triangle_forward(triangle, triangle.linear_z, x, mask, transpose_bias)
        return own_forward(triangle, x, mask, transpose_bias, *args, **options) if out is None else out


class OpenFold3PairBias(PairFamily):
    """Single attention of the trunk."""

    name = "OpenFold3 pair bias"
    attentions = (f"{PLACE}.attention_pair_bias.AttentionPairBias",)
    inner = hooked = "mha"
    inner_classes = (ATTENTION,)
    forward = staticmethod(forward)


class OpenFold3DiffusionPairBias(OpenFold3PairBias):
    """Single attention of the diffusion, which reads one bias at all of its steps."""

    name = "OpenFold3 diffusion"
    attentions = (f"{PLACE}.attention_pair_bias.DiffusionAttentionPairBias",)

    def is_reused(self, attention: Any) -> bool:
        """Always."""
        return True


class OpenFold3AtomPairBias(PairFamily):
    """Attention of atoms, in windows."""

    name = "OpenFold3 atoms"
    attentions = (f"{PLACE}.attention_pair_bias.CrossAttentionPairBias",)

    def plan(self, name: str, attention: Any, options: Options) -> Plan:
        """Leave it: a few dozen queries and keys have nothing that factors could save."""
        return Plan(AttentionEntry(name, self.name, "left", note="windows of atoms, too small for factors"))
