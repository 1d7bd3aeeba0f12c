"""Self-attention between points in space, which pays more to what is near: meshes, particles, molecules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashbias.attention import attention
from flashbias.biases import SquaredDistance
from flashbias.biases.base import wide_dtype
from flashbias.factored import FactoredBias

__all__ = ["SpatialBiasAttention", "SpatialTransformerLayer"]


class SpatialBiasAttention(nn.Module):
    """Multi-head self-attention with a learned, token-wise penalty on squared distances.

    Formula: `softmax(q_i . k_j / sqrt(head_dim) - w_hi * ||x_i - x_j||^2)`, with `w_hi = softplus(linear(token_i))[h]`.

    Each token learns, per head, how far it looks: with a weight w attention fades over a length of `1 / sqrt(w)`, and
    a weight of 0 is attention without a bias. Use it for tokens that are points: the nodes of a mesh, particles,
    residues. The bias is exact in `dim + 2` columns, so that memory is linear in N, forward and backward.

    The weights begin at `init_weight` for every token and head. That is a number per squared unit of length: scale
    the points to about unit size, or choose it to suit them.

    Args:
        embed_dim: E, width of the tokens, a multiple of `num_heads`.
        num_heads: H.
        dim: dimensions of the space.
        bias: let the projections of queries, keys, values and output add a constant.
        dropout: probability of dropping an attention weight, in training.
        init_weight: every weight w at the start, positive.
        impl: implementation, as in `flashbias.attention`.

    Attributes:
        qkv: projection to queries, keys and values, one after the other.
        weight: projection of a token to its H weights, before softplus.
        out: projection of the heads' outputs.

    Raises:
        ValueError: a size that is not positive, `embed_dim` that is no multiple of `num_heads`, `dropout` outside
            [0, 1), or `init_weight` that is not positive and finite.

    Supports:
        Gradients to tokens, points and parameters; autocast; any leading batch dimensions. Weights, points and the
        factors made of them are float32 at least.

    Examples:
        >>> import torch
        >>> from flashbias.nn import SpatialBiasAttention
        >>> layer = SpatialBiasAttention(embed_dim=32, num_heads=4, dim=3)
        >>> tokens, points = torch.randn(2, 500, 32), torch.rand(2, 500, 3)
        >>> layer(tokens, points).shape
        torch.Size([2, 500, 32])

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, example 3.5 and the PDE solver of section 4.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim: int = 3,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        init_weight: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        if not 0.0 < init_weight < math.inf:
            raise ValueError(f"init_weight must be positive and finite, got {init_weight!r}")
        self.embed_dim, self.num_heads, self.dim = embed_dim, num_heads, dim
        self.dropout, self.init_weight, self.impl = dropout, init_weight, impl
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.weight = nn.Linear(embed_dim, num_heads)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.distance = SquaredDistance(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new projections, and set the weight of every token to `init_weight`."""
        for projection in (self.qkv, self.out):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.weight.weight)
        nn.init.constant_(self.weight.bias, self.init_weight + math.log(-math.expm1(-self.init_weight)))

    def forward(self, tokens: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            tokens: `[*batch, N, E]`.
            points: `[*batch, N, dim]`, or `[N, dim]` for the whole batch; where each token is.
            mask: `[*batch, N]` booleans, True for tokens and False for padding. Padding is seen by nobody, whatever
                points it has; its own rows of the output mean nothing.

        Returns:
            `[*batch, N, E]`.

        Raises:
            TypeError: points are not floating point, or the mask is not boolean.
            ValueError: shapes that do not fit.
        """
        self._check(tokens, points, mask)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        out = attention(
            q,
            k,
            v,
            self.bias(tokens, points, mask),
            attn_mask=None if mask is None else mask[..., None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        assert isinstance(out, Tensor)
        return self.out(out.transpose(-3, -2).flatten(-2))

    def bias(self, tokens: Tensor, points: Tensor, mask: Tensor | None = None) -> FactoredBias:
        """Make the bias alone: phi_q `[*batch, H, N, dim + 2]`, phi_k `[*batch, 1, N, dim + 2]`.

        Args:
            tokens: as in `forward`.
            points: as in `forward`.
            mask: as in `forward`.

        Returns:
            The bias of every pair of tokens; pairs with padding have some finite one.
        """
        logits = self.weight(tokens)
        weight = nn.functional.softplus(logits.to(wide_dtype(logits))).mT
        points, center = points.to(wide_dtype(points)), None
        if mask is not None:
            points, center = _without_padding(points, mask[..., None])
            center = center[..., None, :, :]
        return self.distance(points[..., None, :, :], weight=weight, center=center)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dim={self.dim}, dropout={self.dropout}"

    def _check(self, tokens: Tensor, points: Tensor, mask: Tensor | None) -> None:
        if tokens.dim() < 2 or tokens.shape[-1] != self.embed_dim:
            raise ValueError(f"tokens must be [*batch, N, {self.embed_dim}], got shape {tuple(tokens.shape)}")
        if not points.is_floating_point():
            raise TypeError(f"points must be floating point, got {points.dtype}")
        whole = (*tokens.shape[:-1], self.dim)
        if tuple(points.shape) not in (whole, whole[-2:]):
            raise ValueError(f"points must have shape {whole} or {whole[-2:]}, got {tuple(points.shape)}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True for tokens, False for padding), got {mask.dtype}")
        if mask.shape != tokens.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(tokens.shape[:-1])}, got {tuple(mask.shape)}")


class SpatialTransformerLayer(nn.Module):
    """A transformer layer between points: `SpatialBiasAttention`, then two linear layers, each after a layer norm.

    Formula: `x + attention(norm(x), points)`, and then `x + mlp(norm(x))`.

    A few of them between an encoder and a decoder of the features are a solver for fields on meshes, as in the paper's
    task on cars. Memory is linear in the number of points.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H.
        dim: dimensions of the space.
        hidden: width inside the mlp; default 4 E.
        dropout: probability of dropping an attention weight, and an entry of each branch's output, in training.
        init_weight: as in `SpatialBiasAttention`.
        impl: as in `SpatialBiasAttention`.

    Raises:
        ValueError: `hidden` is not a positive integer, and what `SpatialBiasAttention` raises.

    Examples:
        >>> import torch
        >>> from flashbias.nn import SpatialTransformerLayer
        >>> layer = SpatialTransformerLayer(embed_dim=32, num_heads=4, dim=2)
        >>> layer(torch.randn(300, 32), torch.rand(300, 2)).shape
        torch.Size([300, 32])

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, section 4.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim: int = 3,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
        init_weight: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.attention = SpatialBiasAttention(
            embed_dim, num_heads, dim, dropout=dropout, init_weight=init_weight, impl=impl
        )
        hidden = 4 * embed_dim if hidden is None else hidden
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden must be None or a positive integer, got {hidden!r}")
        self.attention_norm, self.mlp_norm = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, then transform each token.

        Args:
            tokens: `[*batch, N, E]`.
            points: as in `SpatialBiasAttention`.
            mask: as in `SpatialBiasAttention`.

        Returns:
            `[*batch, N, E]`.
        """
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens), points, mask))
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))


def _without_padding(points: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Points with padding moved to the centre of the others, and that centre: padding must not spoil its accuracy."""
    known = points.detach()
    center = torch.where(keep, known, 0.0).sum(-2, keepdim=True) / keep.sum(-2, keepdim=True).clamp(min=1)
    return torch.where(keep, points, center), center
