"""A Pairformer block of AlphaFold 3 (supplement, algorithm 17), with the way of its attention left open."""

from __future__ import annotations

import torch
from benchmarks.fields.protein.model import (
    Attend,
    Form,
    TriangleAttention,
    dense_bias,
    feature_count,
    materialised,
    residue_features,
    rounded,
)
from benchmarks.fields.protein.sketch import sketched
from torch import Tensor, nn

import flashbias as fb
from flashbias.integrations.protein import pair_bias_attention

__all__ = ["PairBiasAttention", "Pairformer", "TriangleProduct"]


class TriangleProduct(nn.Module):
    """Triangle multiplication about outgoing edges; on transposed pairs, about incoming ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_edges, self.gates = (nn.Linear(channels, 2 * channels, bias=False) for _ in range(2))
        self.out, self.gate = (nn.Linear(channels, channels, bias=False) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        """The update of `[B, N, N, c]`."""
        z = self.norm(z)
        a, b = (self.to_edges(z) * self.gates(z).sigmoid()).movedim(-1, 1).chunk(2, dim=1)
        return self.out(self.norm_out((a @ b.mT).movedim(1, -1))) * self.gate(z).sigmoid()


class PairBiasAttention(nn.Module):
    """Attention over single tokens with a bias from their pairs; attributes as of `TriangleAttention`."""

    def __init__(self, single: int, channels: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.sketch = 0
        self.form: Form = "matrix"
        self.factor_dtype = torch.float32
        self.attend: Attend = materialised
        self.norm, self.norm_pairs = nn.LayerNorm(single), nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(single, 3 * single, bias=False)
        self.to_bias = nn.Linear(channels, heads, bias=False)
        self.gate, self.out = nn.Linear(single, single), nn.Linear(single, single, bias=False)
        self.student = fb.NeuralBias(feature_count(channels, heads), heads, rank)

    def matrix(self, z: Tensor) -> Tensor:
        """`[B, H, N, N]`."""
        return self.to_bias(z).movedim(-1, 1)

    def factors(self, z: Tensor) -> fb.FactoredBias:
        """`[B, H, N, R]` twice."""
        if self.sketch:
            return rounded(sketched(z, self.to_bias, self.sketch), self.factor_dtype)
        return rounded(self.student(residue_features(z, self.to_bias)), self.factor_dtype)

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        """The update of `[B, N, c_s]`."""
        s, z = self.norm(s), self.norm_pairs(z)
        q, k, v = self.to_qkv(s).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        if self.form == "factors":
            out = pair_bias_attention(q, k, v, self.factors(z))
        else:
            out = self.attend(q, k, v, dense_bias(self, z, q.dtype))
        return self.out(out.transpose(1, 2).flatten(-2) * self.gate(s).sigmoid())


class _Transition(nn.Module):
    """Norm, four times as wide, gated by SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 8 * channels, bias=False), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(self.norm(x)).chunk(2, dim=-1)
        return self.narrow(nn.functional.silu(a) * b)


class Pairformer(nn.Module):
    """One block: pairs `[B, N, N, c]` and tokens `[B, N, c_s]`.

    Args:
        channels: c.
        single: c_s.
        heads: of the triangle attentions.
        single_heads: of the attention of tokens.
        rank: of the factors.
        whole: False leaves out triangle products and transitions, so that the three attentions remain.
        reach: of the tables beside the factors of the triangle attentions; 0 for none.
    """

    def __init__(
        self, channels: int, single: int, heads: int, single_heads: int, rank: int, whole: bool, reach: int = 0
    ) -> None:
        super().__init__()
        self.products = nn.ModuleList(TriangleProduct(channels) for _ in range(2 * whole))
        self.start, self.end = (TriangleAttention(channels, heads, channels // heads) for _ in range(2))
        for triangle in (self.start, self.end):
            triangle.student = triangle.new_student(rank, (256, 256), reach)
        self.tokens = PairBiasAttention(single, channels, single_heads, rank)
        self.transitions = nn.ModuleList(_Transition(width) for width in (channels, single) if whole)

    def use(
        self,
        form: Form,
        triangle: Attend,
        tokens: Attend,
        sketch: int = 0,
        factor_dtype: torch.dtype = torch.float32,
    ) -> Pairformer:
        """Choose the form of all biases, what computes attention where these are no factors, and which factors."""
        for module, attend in ((self.start, triangle), (self.end, triangle), (self.tokens, tokens)):
            module.form, module.attend, module.sketch, module.factor_dtype = form, attend, sketch, factor_dtype
        return self

    def half(self, dtype: torch.dtype) -> Pairformer:
        """Parameters in another dtype, but for the networks of the factors, which stay float32."""
        self.to(dtype)
        for module in (self.start, self.end, self.tokens):
            assert module.student is not None
            module.student.float()
        return self

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and pairs after the block."""
        for index, product in enumerate(self.products):
            z = z + (product(z) if index == 0 else product(z.transpose(1, 2)).transpose(1, 2))
        z = z + self.start(z)
        z = z + self.end(z.transpose(1, 2)).transpose(1, 2)
        if len(self.transitions):
            z = z + self.transitions[0](z)
        s = s + self.tokens(s, z)
        if len(self.transitions):
            s = s + self.transitions[1](s)
        return s, z
