"""Falcon with ALiBi (falcon-rw), https://arxiv.org/abs/2311.16867.

    b[h, i, j] = slope_h * position[j] / sqrt(head_dim), position counted without padding

The division is Falcon's own: it adds ALiBi before scaling. Rank 1, from the model's own `alibi` [B * H, 1, M], which is
rounded to bfloat16 whatever the model's dtype. Falcon without ALiBi has no bias. transformers attends in the module, so
the module's forward is replaced. Its eager path adds ALiBi twice, in the mask and beside it; the default path, which is
the one reproduced, once.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashbias.integrations.base import Changes, Options
from flashbias.integrations.transformers.attend import attend, per_key
from flashbias.integrations.transformers.base import TransformersFamily

__all__ = ["Falcon"]

FILE = "transformers.models.falcon.modeling_falcon"


class Falcon(TransformersFamily):
    """Falcon language models with `config.alibi`."""

    name = "Falcon"
    attentions = (f"{FILE}.FalconAttention", f"{FILE}.FalconFlashAttention2")
    stacks = (f"{FILE}.FalconModel",)
    form = "exact factors"
    rank = 1

    def is_biased(self, attention: Any) -> bool:
        """Falcon's other position code is rotary."""
        return bool(attention.config.alibi)

    def unsupported(self, model: nn.Module, attention: Any) -> str | None:
        """Also: the eager path, whose result is another one."""
        if attention.config._attn_implementation == "eager":
            return "attn_implementation='eager' adds ALiBi twice in transformers; load the model with 'sdpa'"
        return super().unsupported(model, attention)

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        super().change(attention, options, changes)
        changes.set(attention, "forward", partial(forward, attention))


def forward(
    attention: Any,
    hidden_states: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`FalconAttention.forward` with `alibi / sqrt(head_dim)` as the key's factor."""
    fused = attention._split_heads(attention.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in fused)
    if layer_past is not None:
        key, value = layer_past.update(key, value, attention.layer_idx)
    bias = alibi.reshape(query.shape[0], attention.num_heads, -1) / math.sqrt(attention.head_dim)
    if attention_mask is not None and attention_mask.dim() == 4:
        # The model has added ALiBi to a mask of four dimensions; what it hides, it hides with the least number.
        attention_mask = attention_mask[:, :1] > torch.finfo(attention_mask.dtype).min
    out = attend(
        attention,
        query,
        key,
        value,
        per_key(bias, query.shape[-2]),
        attention_mask,
        is_causal=True,
        scale=attention.inv_norm_factor,
        dropout_p=attention.attention_dropout.p,
    )
    return attention.dense(out.flatten(2)), None
