"""Attention whose scores are multiplied by a factored bias."""

from __future__ import annotations

import math

from torch import Tensor

from flashbias.attention.api import attention
from flashbias.attention.checks import autocast, check_tensors
from flashbias.factored import FactoredBias

__all__ = ["multiplicative_attention"]


def multiplicative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention whose scores are multiplied, not added to, by a factored matrix.

    Formula: `softmax((scale * q k^T) * b) v` with `b = phi_q phi_k^T`, elementwise product. It equals attention of
    `q' = [q * phi_q[:, 1] | … | q * phi_q[:, R]]` with `k'` likewise, since
    `(q_i . k_j) b_ij = sum_r (q_i phi_q[i, r]) . (k_j phi_k[j, r])`.

    Cost: queries and keys become R times as wide, in memory and in matrix work of the scores. It pays for small R
    only (about `R <= sqrt(S / head_dim^2 + 1)`, S the on-chip memory in elements: 2 to 4 at head_dim 64), and the
    kernels need `head_dim * R <= 256`; beyond that `auto` takes torch SDPA.

    Args:
        query: `[*batch, H, N, head_dim]`.
        key: `[*batch, H_kv, M, head_dim]`.
        value: `[*batch, H_kv, M, head_dim_v]`.
        bias: factors of b, without a table.
        attn_mask: as in `attention`.
        is_causal: as in `attention`.
        causal_alignment: as in `attention`.
        window: as in `attention`.
        scale: as in `attention`; default `1 / sqrt(head_dim)` of the head_dim given.
        enable_gqa: as in `attention`; needs a phi_k that is shared by the heads of a group (head dimension 1).
        dropout_p: as in `attention`.
        impl: as in `attention`.
        deterministic: as in `attention`.
        return_lse: as in `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError: bias is not a FactoredBias.
        ValueError: bias has a table, per-head ranks, or does not fit the queries; and what `attention` raises.
        NotImplementedError: as in `attention`.

    Examples:
        >>> import torch, flashbias as fb
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4)
        >>> b = fb.FactoredBias(torch.rand(2, 5, 2), torch.rand(2, 5, 2))
        >>> out = fb.multiplicative_attention(q, k, v, b)
        >>> torch.allclose(out, ((q @ k.mT) / 2 * b.dense()).softmax(-1) @ v, atol=1e-5)
        True

    Reference:
        "FlashBias", https://arxiv.org/abs/2505.12044, section on multiplicative bias.
    """
    if not isinstance(bias, FactoredBias):
        raise TypeError(f"bias must be a FactoredBias, got {type(bias)}")
    if bias.table is not None or bias.ranks is not None:
        raise ValueError(f"bias must be plain factors without a table or per-head ranks, got {bias}")
    query, key, value = autocast(query, key, value)
    check_tensors(query, key, value, enable_gqa)
    if (bias.seqlen_q, bias.seqlen_k) != (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"bias is for {bias.seqlen_q} queries and {bias.seqlen_k} keys, "
            f"query and key have {query.shape[-2]} and {key.shape[-2]}"
        )
    for side, phi, x in (("q", bias.phi_q, query), ("k", bias.phi_k, key)):
        heads, name = phi.shape[-3], {"q": "query", "k": "key"}[side]
        if heads != 1 and heads != x.shape[-3]:
            raise ValueError(
                f"phi_{side} has {heads} heads, {name} has {x.shape[-3]}; phi_{side} must have as many or 1"
            )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    return attention(
        _widen(query, bias.phi_q),
        _widen(key, bias.phi_k),
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        impl=impl,
        deterministic=deterministic,
        return_lse=return_lse,
    )


def _widen(x: Tensor, phi: Tensor) -> Tensor:
    """`[..., N, D]` and `[..., N, R]` to `[..., N, R * D]`, the columns of every `x * phi[:, r]`."""
    return (x[..., None, :] * phi[..., :, None].to(x.dtype)).flatten(-2)
