"""BLOOM: A 176B-Parameter Open-Access Multilingual Language Model, https://arxiv.org/abs/2211.05100.

    b[h, i, j] = slope_h * position[j], position counted without padding; ALiBi up to a constant of the row

Rank 1, from the model's own `alibi` [B * H, 1, M]: padding on the left or in the middle is counted as the model counts
it, and its rounding to the model's dtype is part of the model. transformers attends in the module, so the module's
forward is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout

from flashbias.integrations.base import Changes, Options
from flashbias.integrations.transformers.attend import attend, per_key
from flashbias.integrations.transformers.base import TransformersFamily

__all__ = ["Bloom"]

FILE = "transformers.models.bloom.modeling_bloom"


class Bloom(TransformersFamily):
    """BLOOM language models."""

    name = "BLOOM"
    attentions = (f"{FILE}.BloomAttention",)
    stacks = (f"{FILE}.BloomModel",)
    form = "exact factors"
    rank = 1

    def unsupported(self, model: nn.Module, attention: Any) -> str | None:
        """Also: an output projection that is summed in slices."""
        if attention.pretraining_tp > 1 and attention.slow_but_exact:
            return f"config.slow_but_exact=True with config.pretraining_tp={attention.pretraining_tp}"
        return super().unsupported(model, attention)

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        super().change(attention, options, changes)
        changes.set(attention, "forward", partial(forward, attention))


def forward(
    attention: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`BloomAttention.forward` with `alibi` as the key's factor."""
    query, key, value = attention._reshape(attention.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, attention.layer_idx)
    out = attend(
        attention,
        query,
        key,
        value,
        per_key(alibi.view(query.shape[0], attention.num_heads, -1), query.shape[-2]),
        attention_mask,
        is_causal=True,
        scale=attention.inv_norm_factor,
        dropout_p=attention.attention_dropout.p,
    )
    out = attention.dense(out.flatten(2))
    return residual + dropout(out, attention.hidden_dropout, attention.training), None
