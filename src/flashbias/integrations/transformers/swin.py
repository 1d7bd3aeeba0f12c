"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030.

    b[h, i, j] = relative_position_bias_table[offset(i, j), h]  - 100 where a shift brought i and j together

Exact through a table; in every second layer the shift's mask joins it as factors of rank 3 (`biases/regions.py`).
transformers attends through its AttentionInterface, but spreads the mask over images, heads and pairs before, so the
module's forward is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashbias.integrations.transformers.windows import WindowedFamily
from flashbias.integrations.windows import OffsetTable, attend_in_windows, split_heads

__all__ = ["Swin"]

FILE = "transformers.models.swin.modeling_swin"
PENALTY = 100.0


def table(attention: Any) -> OffsetTable:
    """The table of an attention."""
    position = attention.relative_position_bias
    return OffsetTable(position.relative_position_bias_table, position.window_size)


def forward(
    attention: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`SwinAttention.forward` with its own table."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (split_heads(project(hidden_states), attention.head_dim) for project in projections)
    out = attend_in_windows(
        attention,
        query,
        key,
        value,
        partial(table, attention),
        attention_mask,
        penalty=PENALTY,
        scale=attention.scaling,
        dropout_p=attention.attention_dropout,
    )
    return attention.o_proj(out), None


class Swin(WindowedFamily):
    """Swin encoders, and the models and backbones around them."""

    name = "Swin"
    attentions = (f"{FILE}.SwinAttention",)
    stacks = (f"{FILE}.SwinEncoder",)
    layers = (f"{FILE}.SwinLayer",)
    forward = staticmethod(forward)
    table = staticmethod(table)
    made_of = ("relative_position_bias.relative_position_bias_table",)
