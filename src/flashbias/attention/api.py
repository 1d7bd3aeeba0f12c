"""`attention` and `varlen_attention`: the formula, and how a call is made of the arguments and run."""

from __future__ import annotations

from torch import Tensor

from flashbias.attention import dense, redirect
from flashbias.attention.call import Call, empty_output
from flashbias.attention.checks import (
    autocast,
    check_bias,
    check_kind,
    check_mask,
    check_tensors,
    checked,
    checked_layout,
    of_one_batch,
    shape_of,
)
from flashbias.attention.choice import IMPLEMENTATIONS, chosen
from flashbias.attention.groups import attend_by_groups
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__all__ = ["attention", "varlen_attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | MixedBias | None = None,
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
    """Compute scaled dot-product attention with a factored additive bias.

    Formula: `softmax(scale * q k^T + phi_q phi_k^T [+ table[code_k - code_q]]) v`, row by row.

    Use it wherever scores carry a bias. No N×M matrix is stored or read, forward or backward, unless
    `impl="reference"`; memory is O((N + M)(head_dim + rank)). A bias of rank 16 costs a few per cent of the time
    of attention without one.

    Args:
        query: `[*batch, H, N, head_dim]`, float16, bfloat16, float32 (or float64, on CPUs).
        key: `[*batch, H_kv, M, head_dim]`.
        value: `[*batch, H_kv, M, head_dim_v]`.
        bias: a `FactoredBias` whose batch and head dimensions are each equal to the queries' or 1. It is
            added after scaling and stays float32 if its factors are, whatever the queries are. A `MixedBias` sends
            its dense heads through torch's `scaled_dot_product_attention`, whatever `impl` says of the others.
        attn_mask: booleans that broadcast to `[*batch, H, N, M]`; True attends. A row without any True gives 0.
        is_causal: let query i attend to keys j <= i + shift only.
        causal_alignment: "top_left" (shift 0, as in SDPA) or "bottom_right" (shift M - N, as in FlashAttention).
            Must be given for a causal mask or a window when N != M; makes no difference otherwise.
        window: `(left, right)`: let query i attend to keys `i + shift - left … i + shift + right` only; None in
            a place leaves that side open. Combines with `is_causal`.
        scale: factor of the dot products, positive; default `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer key and value heads than query heads (H divisible by H_kv).
        dropout_p: probability of dropping an attention weight.
        impl: "auto", "hopper", "triton", "sdpa" or "reference". A named one is used or raises; it never falls back.
        deterministic: require bitwise repeatable gradients; outputs always are. Only the backward pass of "hopper"
            adds in an order that varies; with True it adds in one, which takes somewhat longer, or leaves the work to
            that of "triton". Default: `torch.are_deterministic_algorithms_enabled()`.
        return_lse: also return the natural log-sum-exp of the full scores, bias included.

    Returns:
        `[*batch, H, N, head_dim_v]` in the queries' dtype; with `return_lse` a tuple of it and
        `[*batch, H, N]` in float32, float64 beside float64 (-inf for rows that attend to nothing).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes, devices or values that do not fit together; the message names the argument.
        NotImplementedError: the named implementation cannot do the call, or cannot run on this machine.

    Supports:
        Gradients to query, key, value, phi_q, phi_k and table, summed over broadcast dimensions. Second
        derivatives with `impl="reference"`. `torch.compile(fullgraph=True)`, autocast, checkpointing.

    Examples:
        >>> import torch, flashbias as fb
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8)  # [batch, heads, tokens, head_dim]
        >>> bias = fb.FactoredBias(torch.randn(4, 16, 3), torch.randn(4, 16, 3))
        >>> out = fb.attention(q, k, v, bias, is_causal=True)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(
        ...     q, k, v, bias.dense().masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf))
        >>> torch.allclose(out, dense, atol=1e-5)
        True

    Reference:
        "FlashBias: Fast Computation of Attention with Bias", https://arxiv.org/abs/2505.12044, equation 3.
    """
    if redirect.target is not None:
        return redirect.attention(
            query, key, value, bias, attn_mask=attn_mask, is_causal=is_causal, causal_alignment=causal_alignment,
            window=window, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p, impl=impl,
            deterministic=deterministic, return_lse=return_lse,
        )  # fmt: skip

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bias: FactoredBias | Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        call = checked(
            query,
            key,
            value,
            None if isinstance(bias, Tensor) else bias,
            attn_mask=attn_mask,
            is_causal=is_causal,
            causal_alignment=causal_alignment,
            window=window,
            scale=scale,
            enable_gqa=enable_gqa,
            dropout_p=dropout_p,
            deterministic=deterministic,
            return_lse=return_lse,
        )
        return _run_dense(call, bias) if isinstance(bias, Tensor) else _run(call, impl)

    if isinstance(bias, Tensor):
        check_kind(bias)
    if isinstance(bias, MixedBias):
        query, key, value = autocast(query, key, value)
        check_tensors(query, key, value, enable_gqa)
        query, key, value = of_one_batch(query, key, value)
        check_bias(bias, query, key)
        if attn_mask is not None:
            attn_mask = check_mask(attn_mask, query, key)
        return attend_by_groups(attend, query, key, value, bias, attn_mask)
    return attend(query, key, value, bias, attn_mask)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: FactoredBias | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    """Compute `attention` over sequences of different lengths, packed one after the other.

    Sequence b holds queries `cu_seqlens_q[b] … cu_seqlens_q[b + 1] - 1` and keys likewise; it attends to its
    own keys only. Use it instead of padding: it costs what its tokens cost.

    Args:
        query: `[T_q, H, head_dim]`.
        key: `[T_k, H_kv, head_dim]`.
        value: `[T_k, H_kv, head_dim_v]`.
        cu_seqlens_q: int32 `[B + 1]`, ascending, from 0 to T_q. That is checked where the longest length is read from
            it; given `max_seqlen_q`, outputs and gradients of tokens that belong to no sequence are undefined.
        cu_seqlens_k: int32 `[B + 1]`, ascending, from 0 to T_k; likewise.
        bias: factors `[H or 1, T_q, R]` and `[H or 1, T_k, R]`, packed like the tokens. A table without codes is
            read by positions within each sequence; with codes for one side, the other's are positions in the pack.
        max_seqlen_q: longest query sequence; read from `cu_seqlens_q` (synchronising a GPU) if not given.
        max_seqlen_k: longest key sequence; likewise.
        is_causal: as in `attention`, sequence by sequence.
        causal_alignment: as in `attention`; must be given if `cu_seqlens_q` and `cu_seqlens_k` are not one tensor.
        window: as in `attention`.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        dropout_p: as in `attention`.
        impl: as in `attention`.
        deterministic: as in `attention`.
        return_lse: as in `attention`; the log-sum-exp is `[T_q, H]`.

    Returns:
        `[T_q, H, head_dim_v]`, or a tuple with the log-sum-exp.

    Raises:
        TypeError: `cu_seqlens` that are not int32 tensors, and what `attention` raises.
        ValueError: `cu_seqlens` of unequal length, and what `attention` raises.
        NotImplementedError: as in `attention`.

    Examples:
        >>> import torch, flashbias as fb
        >>> q, k, v = torch.randn(3, 7, 2, 8)  # 7 tokens, 2 heads
        >>> cu = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> out = fb.varlen_attention(q, k, v, cu, cu, is_causal=True)
        >>> first = fb.attention(*(x[:3].transpose(0, 1) for x in (q, k, v)), is_causal=True)
        >>> torch.allclose(out[:3], first.transpose(0, 1), atol=1e-6)
        True
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, head_dim], got {shape_of(tensor)}")
    if redirect.target is not None:
        return redirect.varlen_attention(
            query, key, value, cu_seqlens_q, cu_seqlens_k, bias, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            is_causal=is_causal, causal_alignment=causal_alignment, window=window, scale=scale, enable_gqa=enable_gqa,
            dropout_p=dropout_p, impl=impl, deterministic=deterministic, return_lse=return_lse,
        )  # fmt: skip
    layout = checked_layout(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query, key)
    if cu_seqlens_q is cu_seqlens_k and causal_alignment is None:
        causal_alignment = "top_left"
    call = checked(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        bias,
        attn_mask=None,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=return_lse,
        varlen=layout,
    )
    result = _run(call, impl)
    if isinstance(result, tuple):
        return result[0].transpose(0, 1), result[1].transpose(0, 1)
    return result.transpose(0, 1)


def _run(call: Call, impl: str) -> Tensor | tuple[Tensor, Tensor]:
    name = chosen(call, impl)
    out, lse = empty_output(call) if call.is_empty else IMPLEMENTATIONS[name].run(call)
    return _result(call, out, lse)


def _run_dense(call: Call, matrix: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return _result(call, *(empty_output(call, matrix) if call.is_empty else dense.run(call, matrix)))


def _result(call: Call, out: Tensor, lse: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if call.return_lse:
        assert lse is not None
        return out, lse
    return out
