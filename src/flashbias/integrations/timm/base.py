"""`TimmFamily`: known versions of timm, how a table is read, how a replaced forward begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashbias.factored import FactoredBias
from flashbias.integrations.base import SETTINGS, Changes, Options
from flashbias.integrations.factors import sources_below
from flashbias.integrations.tables import StaticTable, TableFamily
from flashbias.integrations.windows import WindowSettings

__all__ = ["TimmFamily", "finish", "query_key_value"]

OLDEST = (1, 0, 31)
"""Before, some models counted offsets otherwise: LeViT in oblong images, class tokens beside relative positions."""


class TimmFamily(TableFamily, register=False):
    """A family with tables over windows, whose attentions compute everything in their own forward.

    Attributes:
        forward: what takes the place of an attention's forward, with the attention before its arguments.
        exact_bias: the bias of an attention as a table.
        made_of: paths, from the attention, of what makes the table.
    """

    forward: ClassVar[Callable[..., Any]]
    exact_bias: ClassVar[Callable[[Any], FactoredBias]]
    made_of: ClassVar[tuple[str, ...]]

    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one attention."""
        return StaticTable(type(self).exact_bias(attention), sources_below(attention, self.made_of))

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Name a version that is too old."""
        return too_old(sys.modules["timm"].__version__)  # the model has brought it along

    def change(self, attention: Any, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        changes.set(attention, SETTINGS, WindowSettings(options.impl))
        changes.set(attention, "forward", partial(self.forward, attention))


def too_old(found: str) -> str | None:
    """Say that this version of timm is too old, None if it is not."""
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) >= OLDEST:
        return None
    return f"timm {'.'.join(map(str, OLDEST))} or newer is needed, found {found}; upgrade timm"


def query_key_value(attention: Any, x: Tensor) -> Tensor:
    """Project tokens as timm's attentions do.

    Args:
        attention: has `qkv` and `num_heads`; `q_bias`, `k_bias` and `v_bias` where the projection has no bias itself.
        x: `[B, N, dim]`.

    Returns:
        `[3, B, H, N, head_dim]`.
    """
    if getattr(attention, "q_bias", None) is None:
        projected = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        # Separately where the model does so: the module `qkv` may be quantised, or carry an adapter.
        apart = attention.qkv_bias_separate
        projected = attention.qkv(x) + bias if apart else linear(x, attention.qkv.weight, bias)
    return projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)


def finish(attention: Any, out: Tensor) -> Tensor:
    """Project the attention's output, `[B, N, H * head_dim]` to `[B, N, dim]`."""
    return attention.proj_drop(attention.proj(out))
