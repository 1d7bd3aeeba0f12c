"""`attention` and `varlen_attention`: the formula, the checks, the choice of implementation."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashbias.attention import dense, hopper, redirect, reference, sdpa, triton
from flashbias.attention.call import HALF, Call, VarlenLayout, empty_output
from flashbias.attention.groups import attend_by_groups
from flashbias.attention.plan import Plan, plan_call
from flashbias.factored import FactoredBias, broadcast_shapes
from flashbias.mixed import MixedBias

__all__ = ["Explanation", "attention", "explain", "implementations", "varlen_attention"]

logger = logging.getLogger("flashbias")

_KERNELS = {"hopper": hopper, "triton": triton}
"""Implementations that not every machine can run."""

_MODULES = {**_KERNELS, "sdpa": sdpa, "reference": reference}
"""The implementations, fastest first."""


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
        scale: factor of the dot products; default `1 / sqrt(head_dim)`.
        enable_gqa: allow fewer key and value heads than query heads (H divisible by H_kv).
        dropout_p: probability of dropping an attention weight.
        impl: "auto", "hopper", "triton", "sdpa" or "reference". A named one is used or raises; it never falls back.
        deterministic: require bitwise repeatable gradients; outputs always are. Only the backward pass of "hopper"
            adds in an order that varies, and with True leaves the work to that of "triton". Default:
            `torch.are_deterministic_algorithms_enabled()`.
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

    Example:
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
        call = _checked(
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
        _check_kind(bias)
    if isinstance(bias, MixedBias):
        _check_tensors(query, key, value, enable_gqa)
        _check_bias(bias, query, key)
        if attn_mask is not None:
            attn_mask = _check_mask(attn_mask, query, key)
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
        cu_seqlens_q: int32 `[B + 1]`, ascending, from 0 to T_q.
        cu_seqlens_k: int32 `[B + 1]`, ascending, from 0 to T_k.
        bias: factors `[H or 1, T_q, R]` and `[H or 1, T_k, R]`, packed like the tokens. A table without codes is
            read by positions within each sequence.
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

    Example:
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
            raise ValueError(f"{name} must be [tokens, heads, head_dim], got {_shape_of(tensor)}")
    if redirect.target is not None:
        return redirect.varlen_attention(
            query, key, value, cu_seqlens_q, cu_seqlens_k, bias, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
            is_causal=is_causal, causal_alignment=causal_alignment, window=window, scale=scale, enable_gqa=enable_gqa,
            dropout_p=dropout_p, impl=impl, deterministic=deterministic, return_lse=return_lse,
        )  # fmt: skip
    layout = _checked_layout(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query, key)
    if cu_seqlens_q is cu_seqlens_k and causal_alignment is None:
        causal_alignment = "top_left"
    call = _checked(
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


# -------------------------------------------------------------------- choice of implementation


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and why not the others.

    Args:
        impl: the implementation that runs.
        reasons: for each implementation None if it could run, else what stands against it.
        plan: predicted times of the bias's form, of a dense bias and of no bias; None where there is no bias, or
            nothing to predict from.
        no_plan: why there is a bias and no plan, else None.
    """

    impl: str
    reasons: dict[str, str | None]
    plan: Plan | None = None
    no_plan: str | None = None

    def __str__(self) -> str:
        """One line for each implementation, the chosen one marked; then the plan, or why there is none."""
        lines = []
        for name, reason in self.reasons.items():
            mark = "->" if name == self.impl else "  "
            lines.append(f"{mark} {name}: {reason or ('chosen' if name == self.impl else 'possible, slower')}")
        if self.plan is not None:
            lines.append(str(self.plan))
        if self.no_plan is not None:
            lines.append(self.no_plan)
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None = None,
    *,
    impl: str = "auto",
    return_lse: bool = False,
    **options: object,
) -> Explanation:
    """Say which implementation `attention` would take for these arguments, why not the others, and what it would cost.

    Where the call has a bias, its time is predicted and set beside that of a dense bias, and of none (`plan`).

    Args:
        query: as in `attention`.
        key: as in `attention`.
        value: as in `attention`.
        bias: as in `attention`.
        impl: "auto", or a name to ask about.
        return_lse: as in `attention`.
        **options: the other keywords of `attention`.

    Returns:
        An `Explanation`; print it.

    Raises:
        NotImplementedError: the named implementation cannot do the call.

    Example:
        >>> import torch, flashbias as fb
        >>> q = torch.randn(1, 2, 16, 8)
        >>> print(fb.explain(q, q, q).impl)
        sdpa
    """
    defaults: dict[str, object] = {
        "attn_mask": None,
        "is_causal": False,
        "causal_alignment": None,
        "window": None,
        "scale": None,
        "enable_gqa": False,
        "dropout_p": 0.0,
        "deterministic": None,
    }
    unknown = set(options) - set(defaults)
    if unknown:
        raise TypeError(f"explain got unknown keywords {sorted(unknown)}; allowed are {sorted(defaults)}")
    call = _checked(query, key, value, bias, return_lse=return_lse, **(defaults | options))  # type: ignore[arg-type]
    chosen = _choose(call, impl)
    plan, no_plan = plan_call(call)
    return replace(chosen, plan=plan, no_plan=no_plan)


def implementations() -> dict[str, str | None]:
    """List the implementations, fastest first, and what keeps each from running on this machine.

    Returns:
        A dict from name to None (it can run) or to the reason why it cannot.

    Example:
        >>> import flashbias as fb
        >>> fb.implementations()["reference"] is None
        True
    """
    return {name: _unavailable(name) for name in _MODULES}


def _unavailable(name: str, device: torch.device | None = None) -> str | None:
    return _KERNELS[name].unavailable(device) if name in _KERNELS else None


def _choose(call: Call, impl: str) -> Explanation:
    if impl != "auto" and impl not in _MODULES:
        raise ValueError(f"impl must be 'auto' or one of {sorted(_MODULES)}, got {impl!r}")
    reasons = {name: _obstacle(name, call) for name in _MODULES}
    possible = [name for name, reason in reasons.items() if reason is None]
    if possible[:2] == ["hopper", "triton"] and hopper.is_slower(call):
        possible = possible[1:]
    if call.query.device.type == "cpu" and "sdpa" in possible:
        # Kernels run on CPU tensors only through Triton's interpreter, for tests.
        possible = ["sdpa", *(name for name in possible if name != "sdpa")]
    if impl == "auto":
        return Explanation(possible[0], reasons)
    if reasons[impl] is not None:
        raise NotImplementedError(
            f"impl={impl!r} cannot do this call: {reasons[impl]}; impl='auto' would take {possible[0]!r}"
        )
    return Explanation(impl, reasons)


def _obstacle(name: str, call: Call) -> str | None:
    return _unavailable(name, call.query.device) or _MODULES[name].unsupported(call)


def _chosen(call: Call, impl: str) -> str:
    """As `_choose`, without asking those that cannot change the answer; it asks all where that is to be told."""
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        chosen = _choose(call, impl)
        logger.debug("attention %s takes %s\n%s", tuple(call.query.shape), chosen.impl, chosen)
        return chosen.impl
    if impl in _MODULES and _obstacle(impl, call) is None:
        return impl
    if impl == "auto" and call.query.device.type != "cpu":
        first = next(name for name in _MODULES if _obstacle(name, call) is None)
        is_overtaken = first == "hopper" and hopper.is_slower(call) and _obstacle("triton", call) is None
        return "triton" if is_overtaken else first
    return _choose(call, impl).impl


def _run(call: Call, impl: str) -> Tensor | tuple[Tensor, Tensor]:
    chosen = _chosen(call, impl)
    out, lse = empty_output(call) if call.is_empty else _MODULES[chosen].run(call)
    return _result(call, out, lse)


def _run_dense(call: Call, matrix: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    return _result(call, *(empty_output(call, matrix) if call.is_empty else dense.run(call, matrix)))


def _result(call: Call, out: Tensor, lse: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if call.return_lse:
        assert lse is not None
        return out, lse
    return out


# -------------------------------------------------------------------- checks


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    causal_alignment: str | None,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    enable_gqa: bool,
    dropout_p: float,
    deterministic: bool | None,
    return_lse: bool,
    varlen: VarlenLayout | None = None,
) -> Call:
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value, enable_gqa)
    if bias is not None:
        _check_kind(bias)
        _check_bias(bias, query, key)
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, query, key)
    left, right = _check_window(window, is_causal)
    banded = left is not None or right is not None
    same_length = query.shape[-2] == key.shape[-2] and varlen is None
    if causal_alignment not in (None, "top_left", "bottom_right"):
        raise ValueError(f"causal_alignment must be 'top_left' or 'bottom_right', got {causal_alignment!r}")
    if banded and causal_alignment is None and not same_length:
        raise ValueError(
            f"causal_alignment must be given for a causal mask or window over {query.shape[-2]} queries and "
            f"{key.shape[-2]} keys: 'top_left' (as SDPA) or 'bottom_right' (as FlashAttention)"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if not (isinstance(scale, (int, float, torch.SymFloat)) and 0 < scale < math.inf):
        raise ValueError(f"scale must be a positive finite number, got {scale!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    batch = broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    return Call(
        query=_expanded(query, batch),
        key=_expanded(key, batch),
        value=_expanded(value, batch),
        bias=bias,
        attn_mask=attn_mask,
        window_left=left,
        window_right=right,
        bottom_right=causal_alignment == "bottom_right",
        scale=scale,
        dropout_p=float(dropout_p),
        deterministic=deterministic,
        return_lse=return_lse,
        varlen=varlen,
    )


def _expanded(x: Tensor, batch: torch.Size) -> Tensor:
    """The tensor with all batch dimensions; as it is where it has them, since a view costs time in both passes."""
    return x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:])


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast like SDPA does under autocast; factors keep the dtype they come in."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t.to(dtype) if t.dtype == torch.float32 or t.dtype in HALF else t for t in tensors)
    return tensors


def _shape_of(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dim() < 3:
            raise ValueError(f"{name} must be [*batch, H, N, head_dim], got shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and query {query.dtype}; dtypes must be equal")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; must be on one device")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"head_dim of query is {query.shape[-1]} and of key {key.shape[-1]}; must be equal")
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError("head_dim and head_dim_v must be at least 1, got 0")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key has {key.shape[-2]} positions and value {value.shape[-2]}; must be equal")
    if key.shape[-3] != value.shape[-3]:
        raise ValueError(f"key has {key.shape[-3]} heads and value {value.shape[-3]}; must be equal")
    _check_heads(query.shape[-3], key.shape[-3], enable_gqa)
    try:
        broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        shapes = {name: tuple(tensor.shape[:-3]) for name, tensor in named.items()}
        raise ValueError(f"batch dimensions {shapes} do not broadcast; each must be equal or 1") from None


def _check_heads(num_heads: int, num_kv_heads: int, enable_gqa: bool) -> None:
    if num_heads == num_kv_heads:
        return
    if not enable_gqa:
        raise ValueError(f"query has {num_heads} heads and key {num_kv_heads}; set enable_gqa=True for grouped queries")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"query heads ({num_heads}) must be a multiple of key heads ({num_kv_heads})")


def _check_kind(bias: object) -> None:
    if isinstance(bias, MixedBias):
        raise TypeError("bias is a MixedBias, which only `attention` takes; ask for one of its `parts`")
    if not isinstance(bias, FactoredBias):
        raise TypeError(
            f"bias must be a FactoredBias, got {type(bias)}; factor a dense bias first, with flashbias.compress "
            "(an N×M tensor is never read)"
        )


def _check_bias(bias: FactoredBias | MixedBias, query: Tensor, key: Tensor) -> None:
    *lead, seqlen_q, seqlen_k = bias.shape
    if (seqlen_q, seqlen_k) != (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"bias is for {seqlen_q} queries and {seqlen_k} keys, "
            f"query and key have {query.shape[-2]} and {key.shape[-2]}"
        )
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device} and query on {query.device}; must be on one device")
    _check_broadcast("bias", tuple(lead), query.shape[:-2])


def _check_broadcast(name: str, lead: tuple[int, ...], target: torch.Size) -> None:
    fits = len(lead) <= len(target) and all(a in (1, b) for a, b in zip(reversed(lead), reversed(target), strict=False))
    if not fits:
        raise ValueError(
            f"leading dimensions {lead} of {name} must each be 1 or equal to those of query, {tuple(target)}"
        )


def _check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        found = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask)
        raise TypeError(
            f"attn_mask must be a bool tensor (True attends), got {found}; an additive bias belongs into bias"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device} and query on {query.device}; must be on one device")
    if attn_mask.dim() < 2:
        raise ValueError(f"attn_mask must have at least 2 dimensions, got shape {tuple(attn_mask.shape)}")
    target = torch.Size((*query.shape[:-1], key.shape[-2]))
    _check_broadcast("attn_mask", tuple(attn_mask.shape), target)
    return attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])


def _check_window(window: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    left, right = None, None
    if window is not None:
        if not (isinstance(window, tuple) and len(window) == 2):
            raise TypeError(f"window must be a tuple (left, right), got {window!r}")
        left, right = window
        for name, size in (("left", left), ("right", right)):
            if size is not None and not (isinstance(size, int) and size >= 0):
                raise ValueError(f"window's {name} side must be None or an integer >= 0, got {size!r}")
    if is_causal:
        right = 0
    return left, right


def _checked_layout(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    query: Tensor,
    key: Tensor,
) -> VarlenLayout:
    for name, cu, device in (
        ("cu_seqlens_q", cu_seqlens_q, query.device),
        ("cu_seqlens_k", cu_seqlens_k, key.device),
    ):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {getattr(cu, 'dtype', type(cu))}")
        if cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must have shape [B + 1], got {tuple(cu.shape)}")
        if cu.device != device:
            raise ValueError(f"{name} is on {cu.device} and the tokens on {device}; must be on one device")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have the same length, got {cu_seqlens_q.shape[0]} "
            f"and {cu_seqlens_k.shape[0]}"
        )
    if max_seqlen_q is None:
        max_seqlen_q = _longest("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    if max_seqlen_k is None:
        max_seqlen_k = _longest("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    # Kernels read starts one after the other.
    return VarlenLayout(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)


def _longest(name: str, cu: Tensor, tokens: int) -> int:
    """Longest sequence; since the values are read anyway, they are checked."""
    lengths = cu.diff()
    if int(cu[0]) != 0 or int(cu[-1]) != tokens or bool((lengths < 0).any()):
        raise ValueError(f"{name} must ascend from 0 to the number of tokens, {tokens}, got {cu.tolist()[:8]} …")
    return int(lengths.max()) if lengths.numel() else 0
