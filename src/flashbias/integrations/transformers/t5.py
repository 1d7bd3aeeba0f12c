"""Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (T5), https://arxiv.org/abs/1910.10683.

    b[h, i, j] = relative_attention_bias[bucket(j - i), h], one for all layers of a stack; dot products are not scaled

Exact through a table; in the decoder all keys ahead are in bucket 0, and are hidden. The first block hands the others a
table [H, T], a tensor as before, so that gradient checkpointing and sharding see what they are used to. Cross attention
has no bias: it runs through the same kernels without one, and the zeros [1, H, N, M] that it would add are not formed.
transformers attends through its AttentionInterface, so no forward is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flashbias.integrations.base import SETTINGS, Changes, Options, Plan
from flashbias.integrations.call import settings_of
from flashbias.integrations.report import AttentionEntry
from flashbias.integrations.transformers.attend import Buckets, BucketSettings, attend, table_bias
from flashbias.integrations.transformers.base import TransformersFamily
from flashbias.integrations.transformers.masks import IMPLEMENTATION

__all__ = ["T5"]

FILES = ("transformers.models.t5.modeling_t5.", "transformers.models.mt5.modeling_mt5.M")


class T5(TransformersFamily):
    """T5 and mT5: encoders, decoders, both."""

    name = "T5"
    attentions = tuple(f"{file}T5Attention" for file in FILES)
    stacks = tuple(f"{file}T5Stack" for file in FILES)
    implementation = IMPLEMENTATION
    form = "exact table"
    rank = 0

    def unsupported(self, model: nn.Module, attention: Any) -> str | None:
        """Also: buckets that are not constant beyond the largest distance."""
        return super().unsupported(model, attention) or Buckets.unsupported(*_buckets(attention))

    def plan(self, name: str, attention: Any, options: Options) -> Plan:
        """Cross attention has no table."""
        if not _is_cross(attention):
            return super().plan(name, attention, options)
        entry = AttentionEntry(name, self.name, "replaced", "no bias", 0, 0.0, "cross attention")
        return Plan(entry, lambda changes: self.change(attention, options, changes))

    def change(self, attention: Any, options: Options, changes: Changes) -> None:
        """Let the module hand out its table, or nothing."""
        if attention.has_relative_attention_bias:
            changes.set(attention, SETTINGS, BucketSettings(options.impl, Buckets(*_buckets(attention))))
            changes.set(attention, "compute_bias", partial(position_table, attention))
            return
        changes.set(attention, SETTINGS, BucketSettings(options.impl))
        if _is_cross(attention):
            changes.hook(attention.register_forward_pre_hook(without_table, with_kwargs=True))


def _buckets(attention: Any) -> tuple[int, int, bool]:
    num_buckets, max_distance = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    return num_buckets, max_distance, not attention.is_decoder


def _is_cross(attention: Any) -> bool:
    return attention.is_decoder and not attention.is_causal


def position_table(
    attention: Any,
    query_length: int,
    key_length: int,
    device: torch.device | None = None,
    past_seen_tokens: int | Tensor = 0,
) -> Tensor:
    """`T5Attention.compute_bias`: the table `[H, T]`, to be read with the last query at the last key."""
    buckets = settings_of(attention).buckets
    assert buckets is not None
    table = buckets.table(attention.relative_attention_bias)
    shift = past_seen_tokens - (key_length - query_length)
    if isinstance(shift, int) and shift == 0:
        return table
    # A cache of fixed size: its last keys are not filled yet, and the queries stand somewhere before them.
    half = table.shape[-1] // 2
    distance = torch.arange(1 - key_length, key_length, device=table.device) - shift
    return table[:, distance.clamp(-half, half) + half]


def without_table(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand cross attention an empty bias, in place of which it would form one of zeros."""
    if kwargs.get("position_bias") is None:
        kwargs = {**kwargs, "position_bias": args[0].new_empty(0)}
    return args, kwargs


def factored_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the AttentionInterface calls; `position_bias` is a table `[H, T]`, or empty."""
    settings_of(module)
    if position_bias is None or position_bias.dim() > 2:
        raise ValueError(
            f"position_bias must come from the first block of a patched stack, got "
            f"{None if position_bias is None else tuple(position_bias.shape)}; call the stack, not one of its blocks"
        )
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    out = attend(
        module,
        query,
        key,
        value,
        table_bias(position_bias, seqlen_q, seqlen_k) if position_bias.dim() == 2 else None,
        attention_mask,
        is_causal=bool(module.is_causal),
        scale=scaling,
        dropout_p=dropout,
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, factored_attention)
