"""A GPT over bytes with ALiBi, whose attention carries its bias as factors or as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashbias as fb
from flashbias.nn import BiasedSelfAttention

__all__ = ["GPT", "Form", "Shape"]

Form = Literal["factored", "dense"]

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """How large a GPT is.

    Args:
        width: of the tokens.
        layers: how many.
        heads: of each.
    """

    width: int = 512
    layers: int = 8
    heads: int = 8


class CausalMatrix(nn.Module):
    """ALiBi and the causal mask as one matrix `[H, N, N]`, kept for as long as the length stays the same."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.alibi = fb.Alibi(num_heads)
        self.kept: Tensor | None = None

    def forward(self, length: int, dtype: torch.dtype) -> Tensor:
        """The matrix, rounded once."""
        if self.kept is None or self.kept.shape[-1] != length or self.kept.dtype != dtype:
            bias = self.alibi(seqlen_q=length, seqlen_k=length).dense()
            future = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
            self.kept = bias.masked_fill_(future, -torch.inf).to(dtype)
        return self.kept


class DenseSelfAttention(nn.Module):
    """`BiasedSelfAttention` with a matrix through torch's `scaled_dot_product_attention`; the same parameters."""

    def __init__(self, embed_dim: int, num_heads: int, matrix: CausalMatrix) -> None:
        super().__init__()
        self.num_heads, self.matrix = num_heads, matrix
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend: `[B, N, E]` to `[B, N, E]`."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        matrix = self.matrix(tokens.shape[-2], q.dtype).expand(len(tokens), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=matrix)
        return self.out(out.transpose(-3, -2).flatten(-2))


class Layer(nn.Module):
    """Attention, then two linear layers, each after a layer norm."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, N, E]` to `[B, N, E]`."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


class GPT(nn.Module):
    """Predicts the next byte. Positions are known to the attention alone.

    Args:
        shape: how large.
        form: of the bias. Both forms have the same parameters, by name and, from the same seed, by value.
    """

    def __init__(self, shape: Shape, form: Form) -> None:
        super().__init__()
        if form == "factored":
            alibi = fb.Alibi(shape.heads)
            attentions = [
                BiasedSelfAttention(shape.width, shape.heads, alibi, is_causal=True) for _ in range(shape.layers)
            ]
        else:
            matrix = CausalMatrix(shape.heads)
            attentions = [DenseSelfAttention(shape.width, shape.heads, matrix) for _ in range(shape.layers)]
        self.embedding = nn.Embedding(BYTES, shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, attention) for attention in attentions)
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)
        self.shape = shape

    def draw_parameters(self, seed: int) -> GPT:
        """New parameters from a seed; what is added to the tokens is smaller the more layers there are."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                is_added = name.endswith(("attention.out.weight", "mlp.2.weight"))
                std = 0.02 / math.sqrt(2 * self.shape.layers) if is_added else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, N, 256]` of the byte after each of `[B, N]`."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))
