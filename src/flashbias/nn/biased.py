"""Self-attention of a sequence with a bias of its positions: ALiBi, relative buckets, their sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashbias.attention import attention
from flashbias.factored import FactoredBias

__all__ = ["BiasedSelfAttention"]


class BiasedSelfAttention(nn.Module):
    """Multi-head self-attention whose scores carry the bias of a family.

    Formula: `softmax(q_i . k_j / sqrt(head_dim) + b_hij)`, with `b` from `bias(seqlen_q=N, seqlen_k=N)`.

    Use it for language models and other sequences: with `fb.Alibi` and `is_causal=True` it is the attention of a GPT
    that reads texts longer than those it was trained on. It costs what `flashbias.attention` costs for the factors of
    the family, memory linear in N. Families whose bias is learned are trained with the layer.

    Args:
        embed_dim: E, width of the tokens, a multiple of `num_heads`.
        num_heads: H.
        bias: a module that makes the `FactoredBias` of a sequence from its length, such as `fb.Alibi(num_heads)`. It is
            part of the layer; layers may share one.
        is_causal: let each token attend to itself and to those before it only.
        linear_bias: let the projections of queries, keys, values and output add a constant.
        dropout: probability of dropping an attention weight, in training.
        impl: implementation, as in `flashbias.attention`.

    Attributes:
        qkv: projection to queries, keys and values, one after the other.
        out: projection of the heads' outputs.

    Raises:
        TypeError: `bias` is not a module.
        ValueError: a size that is not positive, `embed_dim` that is no multiple of `num_heads`, a family for another
            number of heads, or `dropout` outside [0, 1).

    Supports:
        Gradients to tokens and parameters, those of the family included; autocast; any leading batch dimensions.

    Examples:
        >>> import torch, flashbias as fb
        >>> from flashbias.nn import BiasedSelfAttention
        >>> layer = BiasedSelfAttention(embed_dim=32, num_heads=4, bias=fb.Alibi(4), is_causal=True)
        >>> layer(torch.randn(2, 500, 32)).shape
        torch.Size([2, 500, 32])

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, section 4, the language model.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: nn.Module,
        *,
        is_causal: bool = False,
        linear_bias: bool = True,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if not isinstance(bias, nn.Module):
            raise TypeError(f"bias must be a module that makes a FactoredBias, got {type(bias).__name__}")
        if getattr(bias, "num_heads", num_heads) not in (1, num_heads):
            raise ValueError(f"bias must be for 1 or {num_heads} heads, got {bias.num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.embed_dim, self.num_heads, self.is_causal = embed_dim, num_heads, is_causal
        self.dropout, self.impl = dropout, impl
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=linear_bias)
        self.out = nn.Linear(embed_dim, embed_dim, bias=linear_bias)
        self.bias = bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new projections; the family keeps what it has."""
        for projection in (self.qkv, self.out):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            tokens: `[*batch, N, E]`.
            mask: `[*batch, N]` booleans, True for tokens and False for padding. Padding is seen by nobody; its own
                rows of the output mean nothing.

        Returns:
            `[*batch, N, E]`.

        Raises:
            TypeError: the mask is not boolean, or the family made something else than a `FactoredBias`.
            ValueError: shapes that do not fit.
        """
        self._check(tokens, mask)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        bias = self.bias(seqlen_q=tokens.shape[-2], seqlen_k=tokens.shape[-2])
        if not isinstance(bias, FactoredBias):
            raise TypeError(f"bias must make a FactoredBias, {type(self.bias).__name__} made a {type(bias).__name__}")
        out = attention(
            q,
            k,
            v,
            bias,
            attn_mask=None if mask is None else mask[..., None, None, :],
            is_causal=self.is_causal,
            causal_alignment="top_left" if self.is_causal else None,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        assert isinstance(out, Tensor)
        return self.out(out.transpose(-3, -2).flatten(-2))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, is_causal={self.is_causal}, "
            f"dropout={self.dropout}"
        )

    def _check(self, tokens: Tensor, mask: Tensor | None) -> None:
        if tokens.dim() < 2 or tokens.shape[-1] != self.embed_dim:
            raise ValueError(f"tokens must be [*batch, N, {self.embed_dim}], got shape {tuple(tokens.shape)}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True for tokens, False for padding), got {mask.dtype}")
        if mask.shape != tokens.shape[:-1]:
            raise ValueError(f"mask must have shape {tuple(tokens.shape[:-1])}, got {tuple(mask.shape)}")
