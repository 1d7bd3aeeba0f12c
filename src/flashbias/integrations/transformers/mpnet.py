"""MPNet: Masked and Permuted Pre-training for Language Understanding, https://arxiv.org/abs/2004.09297.

    b[h, i, j] = relative_attention_bias[bucket(j - i), h], one for all layers

Exact through a table. The encoder hands its layers the table [H, 257] where it used to hand them [B, H, N, N].
transformers attends in the module itself, so the module's forward is replaced.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashbias.integrations.base import SETTINGS, Changes, Options
from flashbias.integrations.call import Settings
from flashbias.integrations.transformers.attend import Buckets, attend, table_bias
from flashbias.integrations.transformers.base import TransformersFamily

__all__ = ["MPNet"]

FILE = "transformers.models.mpnet.modeling_mpnet"
NUM_BUCKETS, MAX_DISTANCE = 32, 128
"""What the model uses, whatever the size of its embedding."""


class MPNet(TransformersFamily):
    """MPNet encoders."""

    name = "MPNet"
    attentions = (f"{FILE}.MPNetSelfAttention",)
    stacks = (f"{FILE}.MPNetEncoder",)
    decodes = False
    form = "exact table"
    rank = 0

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Also: an embedding smaller than the buckets that the model reads."""
        for encoder in self.stacks_of(model):
            rows = encoder.config.relative_attention_num_buckets
            if rows < NUM_BUCKETS:
                return f"config.relative_attention_num_buckets={rows}: the model reads {NUM_BUCKETS} buckets"
        return super().unsupported(model, attention)

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        changes.set(attention, SETTINGS, Settings(options.impl))
        changes.set(attention, "forward", partial(forward, attention))

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Also: let the encoder hand out the table."""
        super().prepare(model, changes)
        for encoder in self.stacks_of(model):
            buckets = Buckets(NUM_BUCKETS, MAX_DISTANCE, bidirectional=True)
            changes.set(encoder, "compute_position_bias", partial(position_table, encoder, buckets))


def position_table(encoder: Any, buckets: Buckets, hidden_states: Tensor) -> Tensor:
    """The bias of all layers, `[H, 257]`."""
    return buckets.table(encoder.relative_attention_bias)


def forward(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor]:
    """`MPNetSelfAttention.forward` with the table of its encoder."""
    heads = (*hidden_states.shape[:-1], -1, attention.attention_head_size)
    query, key, value = (
        project(hidden_states).view(heads).transpose(1, 2) for project in (attention.q, attention.k, attention.v)
    )
    seqlen = hidden_states.shape[1]
    out = attend(
        attention,
        query,
        key,
        value,
        None if position_bias is None else table_bias(position_bias, seqlen, seqlen),
        attention_mask,
        is_causal=False,
        scale=1.0 / math.sqrt(attention.attention_head_size),
        dropout_p=attention.dropout.p,
    )
    return (attention.o(out.flatten(2)),)
