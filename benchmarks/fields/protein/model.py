"""Triangle attention whose bias is a matrix or factors, and a small predictor of distances that is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from benchmarks.fields.protein.sketch import sketched
from torch import Tensor, nn

from flashbias import FactoredBias, NeuralBias
from flashbias.integrations.protein import triangle_attention

__all__ = [
    "Attend",
    "Biased",
    "Form",
    "Predictor",
    "Student",
    "TriangleAttention",
    "dense_bias",
    "feature_count",
    "materialised",
    "residue_features",
    "rounded",
]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""`attend(q, k, v, bias)`: `[B, rows, H, N, D]` three times, and `[B, 1, H, N, N]` or None."""

SEGMENTS, WAVES = 64, 8
FARTHEST_OFFSET = 32


def materialised(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as open code writes it in plain torch: all scores are formed."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if bias is not None:
        scores += bias
    return scores.softmax(-1).to(v.dtype) @ v


Form = Literal["matrix", "factors", "product", "none"]
"""Of a bias: the matrix that a linear map makes of the pairs, factors, the matrix that is their product, or no bias."""


class Biased(Protocol):
    """An attention whose bias comes in one of these forms."""

    form: Form

    def matrix(self, z: Tensor) -> Tensor:
        """`[B, H, N, N]`."""
        ...

    def factors(self, z: Tensor) -> FactoredBias:
        """`[B, H, N, R]` twice."""
        ...


def dense_bias(attention: Biased, z: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`[B, H, N, N]`, or None."""
    if attention.form == "none":
        return None
    return attention.factors(z).dense().to(dtype) if attention.form == "product" else attention.matrix(z).to(dtype)


def residue_features(z: Tensor, project: nn.Module) -> Tensor:
    """Features of each residue for the networks that stand for a bias `project(z)`.

    Row, column and diagonal of the pair representation, its projection averaged over 64 segments of the chain, and the
    residue's place in the chain. The mean over a segment comes first, so that no projection of all pairs is formed.

    Args:
        z: `[B, N, N, c]`.
        project: a linear map from c to H channels.

    Returns:
        `[B, N, 3 c + 128 H + 16]`, float32.
    """
    batch, length = z.shape[:2]
    segment = torch.arange(length, device=z.device) * SEGMENTS // length
    mean = F.one_hot(segment, SEGMENTS).to(z.dtype)
    mean = (mean / mean.sum(0).clamp(min=1)).mT  # [segments, N]
    # bmm, because matmul would first copy the pairs.
    of_rows = torch.bmm(mean.expand(batch * length, -1, -1), z.flatten(0, 1)).unflatten(0, (batch, length))
    of_columns = torch.bmm(mean.expand(batch, -1, -1), z.flatten(2)).unflatten(2, z.shape[2:]).transpose(1, 2)
    own = z.diagonal(dim1=1, dim2=2).mT
    frequency = 2 * math.pi / torch.logspace(2, 10, WAVES, base=2, device=z.device)
    angle = torch.arange(length, device=z.device)[:, None] * frequency
    waves = torch.cat([angle.cos(), angle.sin()], dim=-1).expand(batch, -1, -1)
    # Both are [B, N, segments, c].
    averages = (of_rows.mean(2), of_columns.mean(2), own)
    projected = (project(x).flatten(2) for x in (of_rows, of_columns))
    return torch.cat([x.float() for x in (*averages, *projected, waves)], dim=-1)


def feature_count(channels: int, heads: int) -> int:
    """How many features `residue_features` gives."""
    return 3 * channels + 2 * SEGMENTS * heads + 2 * WAVES


def rounded(bias: FactoredBias, dtype: torch.dtype) -> FactoredBias:
    """The factors in another dtype, the table as it is."""
    return replace(bias, phi_q=bias.phi_q.to(dtype), phi_k=bias.phi_k.to(dtype))


class Student(nn.Module):
    """Networks that make factors of residues' features, and a learned table of offsets beside them.

    The table takes over what is sharp: a bias towards neighbours in the chain is a band, which has no low rank.

    Args:
        features: of a residue.
        heads: H.
        rank: R.
        hidden: widths of the networks' hidden layers.
        reach: the largest offset that the table tells apart; 0 for no table.
    """

    def __init__(self, features: int, heads: int, rank: int, hidden: tuple[int, ...], reach: int) -> None:
        super().__init__()
        self.networks = NeuralBias(features, heads, rank, hidden=hidden)
        self.table = nn.Parameter(torch.zeros(heads, 2 * reach + 1)) if reach else None

    def forward(self, features: Tensor) -> FactoredBias:
        """`[B, N, F]` to `[B, H, N, R]` twice, and the table."""
        return replace(self.networks(features), table=self.table)


class TriangleAttention(nn.Module):
    """AlphaFold's, about the starting node: norm, projections, bias, attention along rows, gate.

    Args:
        channels: c of the pair representation.
        heads: H.
        head_dim: D.

    Attributes:
        attend: what computes attention, unless the bias comes as factors.
        student: networks that give the bias as factors; None as long as there are none.
        sketch: rank of factors that are sketched from the pairs, in place of the student's; 0 for the student's.
        form: what the bias is; see `Form`.
        factor_dtype: to which factors are rounded.
    """

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.to_bias = nn.Linear(channels, heads, bias=False)
        self.gate = nn.Linear(channels, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, channels)
        self.attend: Attend = materialised
        self.student: Student | None = None
        self.sketch = 0
        self.form: Form = "matrix"
        self.factor_dtype = torch.float32

    def new_student(self, rank: int, hidden: tuple[int, ...], reach: int = 0) -> Student:
        """One of the right size, untrained, on the same device."""
        features = feature_count(self.to_bias.in_features, self.heads)
        return Student(features, self.heads, rank, hidden, reach).to(self.to_bias.weight.device)

    def matrix(self, z: Tensor) -> Tensor:
        """The bias of normalised pairs, `[B, H, N, N]`."""
        return self.to_bias(z).movedim(-1, 1)

    def factors(self, z: Tensor) -> FactoredBias:
        """Factors of the bias of normalised pairs, `[B, H, N, R]` twice."""
        with torch.autocast(z.device.type, enabled=False):
            if self.sketch:
                return rounded(sketched(z, self.to_bias, self.sketch), self.factor_dtype)
            assert self.student is not None
            return rounded(self.student(residue_features(z, self.to_bias)), self.factor_dtype)

    def forward(self, z: Tensor) -> Tensor:
        """The update of `[B, N, N, c]`."""
        z = self.norm(z)
        q, k, v = self.to_qkv(z).unflatten(-1, (3, self.heads, self.head_dim)).movedim(-3, 0).transpose(-3, -2)
        if self.form == "factors":
            out = triangle_attention(q, k, v, self.factors(z))
            assert isinstance(out, Tensor)
        else:
            bias = dense_bias(self, z, q.dtype)
            out = self.attend(q, k, v, None if bias is None else bias[:, None])
        return self.out(out.transpose(-3, -2).flatten(-2) * self.gate(z).sigmoid())


class Predictor(nn.Module):
    """Distances between residues, from the sequence and the distances among some of them.

    Pairs begin as the sum of both residues' types, their offset along the chain and, where both are landmarks, the bin
    of their distance. Blocks of triangle attention about both nodes, and of a transition, follow: nothing else moves
    information between pairs, so that all of it passes through attention with a bias.

    Args:
        bins: how many classes of distance.
        channels: c.
        heads: of each attention.
        blocks: how many.
    """

    def __init__(self, bins: int, channels: int = 64, heads: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(20, channels), nn.Embedding(20, channels)
        self.offset = nn.Embedding(2 * FARTHEST_OFFSET + 1, channels)
        self.known = nn.Embedding(bins + 1, channels)
        self.attentions = nn.ModuleList(
            TriangleAttention(channels, heads, channels // heads) for _ in range(2 * blocks)
        )
        self.transitions = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
            )
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, bins))

    def triangles(self) -> list[TriangleAttention]:
        """All attentions: about the starting and the ending node of each block in turn."""
        return [module for module in self.attentions if isinstance(module, TriangleAttention)]

    def forward(self, types: Tensor, known: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Classify all pairs.

        Args:
            types: `[B, N]`, of residues.
            known: `[B, N, N]`, bin of the distance, or the number of bins where it is hidden.
            seen: a list to which the normalised pairs that each attention reads are appended.

        Returns:
            Logits `[B, N, N, bins]`, symmetric.
        """
        place = torch.arange(types.shape[1], device=types.device)
        offset = (place - place[:, None]).clamp(-FARTHEST_OFFSET, FARTHEST_OFFSET) + FARTHEST_OFFSET
        z = self.left(types)[:, :, None] + self.right(types)[:, None] + self.offset(offset) + self.known(known)
        triangles = self.triangles()
        for block, transition in enumerate(self.transitions):
            for attention, ending in zip(triangles[2 * block :], (False, True), strict=False):
                pairs = z.transpose(1, 2) if ending else z
                if seen is not None:
                    seen.append(attention.norm(pairs))
                update = attention(pairs)
                z = z + (update.transpose(1, 2) if ending else update)
            z = z + transition(z)
        return self.head(z + z.transpose(1, 2))
