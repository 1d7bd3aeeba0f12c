"""Heads whose bias stays a matrix, through torch's dense kernels: the way out for what has no low rank.

Used by `MixedBias` alone. Memory is O(N·M), as the bias itself is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashbias.attention.call import Call, lse_dtype

__all__ = ["run"]

BLOCK_SCORES = 1 << 24
"""Scores that are formed at once for a log-sum-exp."""


def run(call: Call, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute `softmax(scale q k^T + matrix) v` with torch's `scaled_dot_product_attention`.

    Args:
        call: the checked request, without a bias.
        matrix: `[*batch, H or 1, N, M]`; gradients reach it.

    Returns:
        Output `[*batch, H, N, head_dim_v]`, and the log-sum-exp if the call asks for it. No kernel of torch's returns
        one beside a mask, so it costs the scores a second time.
    """
    group = call.num_heads // call.num_kv_heads
    k, v = (x.repeat_interleave(group, dim=-3) for x in (call.key, call.value))
    mask, alive = _masked(call, matrix)
    with sdpa_kernel(_backends(call, mask), set_priority=True):
        out = scaled_dot_product_attention(
            *(x.reshape(-1, *x.shape[-3:]) for x in (call.query, k, v)),
            attn_mask=_four_dimensional(mask, call.query.shape[:-3]),
            dropout_p=call.dropout_p,
            scale=call.scale,
        )
    out = out.reshape(*call.query.shape[:-1], -1)
    if alive is not None:
        out = out * alive
    return out, (_lse(call, k, mask, alive) if call.return_lse else None)


def _masked(call: Call, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bias with -inf where a pair is hidden, and which rows see anything (None: all do)."""
    dtype = call.query.dtype
    position = call.position_mask()
    keep = position if call.attn_mask is None else call.attn_mask
    if position is not None and call.attn_mask is not None:
        keep = position & call.attn_mask
    if keep is None:
        return matrix.to(dtype), None
    alive = keep.any(-1, keepdim=True)
    # A row without a key is computed on all of them, then set to zero.
    return matrix.to(dtype).masked_fill(~(keep | ~alive), -math.inf), alive


def _backends(call: Call, mask: Tensor) -> list[SDPBackend]:
    """Fastest first. cuDNN has no gradient for a mask, and fused backward passes may add in any order."""
    needs_mask_grad = mask.requires_grad and torch.is_grad_enabled()
    if call.deterministic and (needs_mask_grad or call.needs_grad()):
        return [SDPBackend.MATH]
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return rest if needs_mask_grad or call.dropout_p > 0 else [SDPBackend.CUDNN_ATTENTION, *rest]


def _four_dimensional(mask: Tensor, batch: torch.Size) -> Tensor:
    lead = mask.shape[:-3]
    if all(size == 1 for size in lead):
        return mask.reshape(1, *mask.shape[-3:]) if lead else mask[None]
    return mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _lse(call: Call, k: Tensor, mask: Tensor, alive: Tensor | None) -> Tensor:
    dtype = lse_dtype(call.query.dtype)
    rows = max(1, BLOCK_SCORES // (math.prod(call.query.shape[:-2]) * call.seqlen_k))
    keys = k.to(dtype).mT
    parts = [
        (call.scale * (q.to(dtype) @ keys) + m.to(dtype)).logsumexp(-1)
        for q, m in zip(
            call.query.split(rows, dim=-2),
            mask.expand(*mask.shape[:-2], call.seqlen_q, call.seqlen_k).split(rows, dim=-2),
            strict=True,
        )
    ]
    lse = torch.cat(parts, dim=-1)
    return lse if alive is None else lse.masked_fill(~alive[..., 0], -math.inf)
