"""A bias in groups of heads: each group attends by itself, the outputs are laid together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from flashbias.constants import on_device
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__all__ = ["attend_by_groups"]

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, Tensor])


def attend_by_groups(
    attend: Callable[[Tensor, Tensor, Tensor, FactoredBias | Tensor, Tensor | None], Result],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: MixedBias,
    attn_mask: Tensor | None,
) -> Result:
    """Run each group of heads with its own part of the bias.

    Args:
        attend: attention of some heads, `(query, key, value, part, attn_mask)`.
        query: `[*batch, H, N, head_dim]`.
        key: `[*batch, H_kv, M, head_dim]`.
        value: `[*batch, H_kv, M, head_dim_v]`.
        bias: of H heads.
        attn_mask: as in `attention`.

    Returns:
        What `attend` returns, heads in their own order.

    Raises:
        ValueError: the bias has another number of heads than the query.
    """
    num_heads, num_kv_heads = query.shape[-3], key.shape[-3]
    if bias.num_heads != num_heads:
        raise ValueError(f"bias has {bias.num_heads} heads and query {num_heads}; must be equal")
    results = []
    for part, group in zip(bias.parts, bias.heads, strict=True):
        heads = on_device(group, query.device)
        kv_heads = on_device(tuple(h // max(1, num_heads // max(1, num_kv_heads)) for h in group), query.device)
        mask = attn_mask
        if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.index_select(-3, heads)
        q, k, v = (x.index_select(-3, h) for x, h in ((query, heads), (key, kv_heads), (value, kv_heads)))
        results.append(attend(q, k, v, part, mask))
    order = bias.order()
    if isinstance(results[0], tuple):
        outs, lses = zip(*results, strict=True)
        out, lse = torch.cat(outs, dim=-3), torch.cat(lses, dim=-2)
        return out.index_select(-3, order), lse.index_select(-2, order)  # type: ignore[return-value]
    return torch.cat(results, dim=-3).index_select(-3, order)  # type: ignore[return-value]
