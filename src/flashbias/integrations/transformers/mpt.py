"""MPT, MosaicML's pretrained transformers, https://www.databricks.com/blog/mpt-7b; ALiBi from https://arxiv.org/abs/2108.12409.

    b[h, i, j] = slope_h * (j + 1 - M)        ALiBi up to a constant of the row

Rank 1, from the model's own `position_bias` [H, 1, max_seq_len], of which the last M entries are read. Padding shifts
all keys of a row alike. transformers attends in the module, so the module's forward is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from flashbias.integrations.base import Changes, Options
from flashbias.integrations.transformers.attend import attend, per_key
from flashbias.integrations.transformers.base import TransformersFamily

__all__ = ["Mpt"]

FILE = "transformers.models.mpt.modeling_mpt"


class Mpt(TransformersFamily):
    """MPT language models."""

    name = "MPT"
    attentions = (f"{FILE}.MptAttention",)
    stacks = (f"{FILE}.MptModel",)
    form = "exact factors"
    rank = 1

    def unsupported(self, model: nn.Module, attention: Any) -> str | None:
        """Also: a scale that turns dot products around."""
        if not attention.softmax_scale > 0:
            return f"config.attn_config.softmax_scale={attention.softmax_scale}: must be positive"
        return super().unsupported(model, attention)

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        super().change(attention, options, changes)
        changes.set(attention, "forward", partial(forward, attention))


def forward(
    attention: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`MptAttention.forward` with `position_bias` as the key's factor."""
    projected = attention.Wqkv(hidden_states)
    if attention.clip_qkv:
        projected = projected.clamp(-attention.clip_qkv, attention.clip_qkv)
    heads = (*hidden_states.shape[:-1], attention.n_heads, attention.head_dim)
    query, key, value = (part.reshape(heads).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    seqlen_k = key.shape[-2]
    if seqlen_k > position_bias.shape[-1]:
        raise ValueError(
            f"the model's bias ends at config.max_seq_len={position_bias.shape[-1]} and there are {seqlen_k} keys; "
            "set model.config.max_seq_len higher"
        )
    out = attend(
        attention,
        query,
        key,
        value,
        per_key(position_bias[:, 0, -seqlen_k:], query.shape[-2]),
        attention_mask,
        is_causal=True,
        scale=attention.softmax_scale,
        dropout_p=attention.attn_dropout_p,
    )
    return attention.out_proj(out.flatten(2)), None
