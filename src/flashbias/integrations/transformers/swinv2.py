"""Swin Transformer V2: Scaling Up Capacity and Resolution, https://arxiv.org/abs/2111.09883.

    score[h, i, j] = min(exp(logit_scale_h), 100) * cos(q_i, k_j)
    b[h, i, j]     = 16 * sigmoid(mlp(offset(i, j)))_h  - 200 where a shift brought i and j together

Exact through a table: the network is asked once for each offset, as the model does, and gradients reach it. The scale
of a head multiplies the normalised queries. transformers adds the mask of -100 twice, and what it does is what counts.
In every second layer that mask joins as factors of rank 3 (`biases/regions.py`). transformers attends in the module
itself, so the module's forward is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashbias.integrations.transformers.windows import WindowedFamily
from flashbias.integrations.windows import OffsetTable, attend_in_windows, cosine_operands, sigmoid_table, split_heads

__all__ = ["SwinV2"]

FILE = "transformers.models.swinv2.modeling_swinv2"
PENALTY = 200.0


def table(attention: Any) -> OffsetTable:
    """The table of an attention's network."""
    values = attention.continuous_position_bias_mlp(attention.relative_coords_table)
    return OffsetTable(sigmoid_table(values), attention.window_size)


def forward(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor]:
    """`Swinv2SelfAttention.forward` with the table of its network."""
    projections = (attention.query, attention.key, attention.value)
    query, key, value = (split_heads(project(hidden_states), attention.attention_head_size) for project in projections)
    out = attend_in_windows(
        attention,
        *cosine_operands(query, key, attention.logit_scale),
        value,
        partial(table, attention),
        attention_mask,
        penalty=PENALTY,
        scale=1.0,
        dropout_p=attention.dropout.p,
    )
    return (out,)


class SwinV2(WindowedFamily):
    """Swin V2 encoders, and the models and backbones around them."""

    name = "SwinV2"
    attentions = (f"{FILE}.Swinv2SelfAttention",)
    stacks = (f"{FILE}.Swinv2Encoder",)
    layers = (f"{FILE}.Swinv2Layer",)
    forward = staticmethod(forward)
    table = staticmethod(table)
    made_of = ("continuous_position_bias_mlp", "relative_coords_table")
