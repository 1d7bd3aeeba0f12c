"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030.

    b[h, i, j] = relative_position_bias_table[offset(i, j), h]  - 100 where a shift brought i and j together

Exact through a table; in every second layer the shift's mask joins it as factors of rank 3 (`biases/regions.py`).
transformers attends through its AttentionInterface, but spreads the mask over images, heads and pairs before, so the
module's forward is replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashbias.integrations.transformers.windows import WindowedFamily
from flashbias.integrations.windows import attend_in_windows, split_heads

__all__ = ["Swin"]

FILE = "transformers.models.swin.modeling_swin"
PENALTY = 100.0


def forward(
    attention: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`SwinAttention.forward` with its own table."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (split_heads(project(hidden_states), attention.head_dim) for project in projections)
    table = attention.relative_position_bias
    out = attend_in_windows(
        attention,
        query,
        key,
        value,
        table.relative_position_bias_table,
        table.window_size,
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
