"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030.

    b[h, i, j] = relative_position_bias_table[offset(i, j), h]  - 100 where a shift brought i and j together

Exact through a table; in every second block the shift's mask joins it as factors of rank 3 (`biases/regions.py`). S3
(https://arxiv.org/abs/2111.14725) is built of the same blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashbias.factored import FactoredBias
from flashbias.integrations.timm.base import finish, query_key_value
from flashbias.integrations.timm.windows import PENALTY, WindowedFamily
from flashbias.integrations.windows import OffsetTable, attend_in_windows

__all__ = ["Swin"]

FILE = "timm.models.swin_transformer"


def table(attention: Any) -> OffsetTable:
    """The table of an attention."""
    return OffsetTable(attention.relative_position_bias_table, attention.window_size)


def exact_bias(attention: Any) -> FactoredBias:
    """The bias of a window that is not shifted."""
    return table(attention).bias()


def forward(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`WindowAttention.forward` with its own table."""
    query, key, value = query_key_value(attention, x)
    out = attend_in_windows(
        attention,
        query,
        key,
        value,
        partial(table, attention),
        mask,
        penalty=PENALTY,
        scale=attention.scale,
        dropout_p=attention.attn_drop.p,
    )
    return finish(attention, out)


class Swin(WindowedFamily):
    """Swin and S3."""

    name = "Swin (timm)"
    attentions = (f"{FILE}.WindowAttention",)
    blocks = (f"{FILE}.SwinTransformerBlock",)
    forward = staticmethod(forward)
    exact_bias = staticmethod(exact_bias)
    made_of = ("relative_position_bias_table",)
