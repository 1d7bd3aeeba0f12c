"""Swin Transformer V2: Scaling Up Capacity and Resolution, https://arxiv.org/abs/2111.09883.

    score[h, i, j] = min(exp(logit_scale_h), 100) * cos(q_i, k_j)
    b[h, i, j]     = 16 * sigmoid(mlp(offset(i, j)))_h  - 100 where a shift brought i and j together

Exact through a table: the network is asked once for each offset, as the model does, and gradients reach it. In every
second block the shift's mask joins it as factors of rank 3 (`biases/regions.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashbias.factored import FactoredBias
from flashbias.integrations.timm.base import finish, query_key_value
from flashbias.integrations.timm.windows import PENALTY, WindowedFamily
from flashbias.integrations.windows import OffsetTable, attend_in_windows, cosine_operands, sigmoid_table

__all__ = ["SwinV2"]

FILE = "timm.models.swin_transformer_v2"


def table(attention: Any) -> OffsetTable:
    """The table of an attention's network."""
    values = attention.cpb_mlp(attention.relative_coords_table)
    return OffsetTable(sigmoid_table(values), attention.window_size)


def exact_bias(attention: Any) -> FactoredBias:
    """The bias of a window that is not shifted."""
    return table(attention).bias()


def forward(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`WindowAttention.forward` with the table of its network."""
    query, key, value = query_key_value(attention, x)
    out = attend_in_windows(
        attention,
        *cosine_operands(query, key, attention.logit_scale),
        value,
        partial(table, attention),
        mask,
        penalty=PENALTY,
        scale=1.0,
        dropout_p=attention.attn_drop.p,
    )
    return finish(attention, out)


class SwinV2(WindowedFamily):
    """Swin V2."""

    name = "SwinV2 (timm)"
    attentions = (f"{FILE}.WindowAttention",)
    blocks = (f"{FILE}.SwinTransformerV2Block",)
    forward = staticmethod(forward)
    exact_bias = staticmethod(exact_bias)
    made_of = ("cpb_mlp", "relative_coords_table")
