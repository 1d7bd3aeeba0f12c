"""What `attention` and `varlen_attention` accept: arguments checked, and brought into the form of a `Call`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashbias.attention.call import DTYPES, HALF, Call, VarlenLayout
from flashbias.factored import FactoredBias, broadcast_shapes
from flashbias.mixed import MixedBias

__all__ = [
    "autocast",
    "check_bias",
    "check_kind",
    "check_mask",
    "check_tensors",
    "checked",
    "checked_layout",
    "of_one_batch",
    "shape_of",
]


def checked(
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
    """Check the arguments of `attention`, as they are named there, and make a call of them."""
    query, key, value = autocast(query, key, value)
    check_tensors(query, key, value, enable_gqa)
    query, key, value = of_one_batch(query, key, value)
    if bias is not None:
        check_kind(bias)
        check_bias(bias, query, key)
    if attn_mask is not None:
        attn_mask = check_mask(attn_mask, query, key)
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
    for name, number in (("scale", scale), ("dropout_p", dropout_p)):
        if not isinstance(number, (int, float, torch.SymFloat)):
            raise TypeError(f"{name} must be an int or a float, got {number!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive finite number, got {scale!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return Call(
        query=query,
        key=key,
        value=value,
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


def of_one_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With all batch dimensions; as they are where they have them, since a view costs time in both passes."""
    batch = broadcast_shapes(*(x.shape[:-3] for x in tensors))
    return tuple(x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:]) for x in tensors)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast like SDPA does under autocast; factors keep the dtype they come in."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast to ask for
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t.to(dtype) if t.dtype == torch.float32 or t.dtype in HALF else t for t in tensors)
    return tensors


def shape_of(value: object) -> str:
    """A tensor's shape, or the type of what is none, for a message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value))


def check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Refuse queries, keys and values that are no tensors, or do not fit together."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor)}")
        if tensor.is_nested:
            raise TypeError(f"{name} must not be a nested tensor; pack its sequences for varlen_attention")
        if tensor.dtype not in DTYPES:
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


def check_kind(bias: object) -> None:
    """Refuse what is no `FactoredBias`."""
    if isinstance(bias, MixedBias):
        raise TypeError("bias is a MixedBias, which only `attention` takes; ask for one of its `parts`")
    if isinstance(bias, torch.nn.Module):
        raise TypeError(f"bias must be a FactoredBias, got the module {type(bias)}; call it, and pass what it returns")
    if not isinstance(bias, FactoredBias):
        raise TypeError(
            f"bias must be a FactoredBias, got {type(bias)}; factor a dense bias first, with flashbias.compress "
            "(an N×M tensor is never read)"
        )


def check_bias(bias: FactoredBias | MixedBias, query: Tensor, key: Tensor) -> None:
    """Refuse a bias of other lengths, another device, or leading dimensions that do not broadcast."""
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
    # `a in (1, b)` would be False to torch.compile, where b is a symbol.
    fits = len(lead) <= len(target) and all(
        a == 1 or a == b for a, b in zip(reversed(lead), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"leading dimensions {lead} of {name} must each be 1 or equal to those of query, {tuple(target)}"
        )


def check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Check a mask of the caller's own, and expand it over the keys."""
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


def checked_layout(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    query: Tensor,
    key: Tensor,
) -> VarlenLayout:
    """Check where the sequences of `varlen_attention` lie, and find the longest ones."""
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
    for name, cu, tokens in (("cu_seqlens_q", cu_seqlens_q, query), ("cu_seqlens_k", cu_seqlens_k, key)):
        # Lengths alone tell: nothing waits for a GPU.
        if cu.shape[0] == 1 and tokens.shape[0] > 0:
            raise ValueError(f"{name} names no sequence, and there are {tokens.shape[0]} tokens")
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
