"""`TimmFamily`: known versions of timm, how a replaced forward begins and ends, what a shared bias becomes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashbias.integrations.base import SETTINGS, Changes, ExactFamily, Options
from flashbias.integrations.windows import WindowSettings

__all__ = ["OffsetTable", "TimmFamily", "finish", "query_key_value"]

OLDEST = (1, 0, 31)
"""Before, some models counted offsets otherwise: LeViT in oblong images, class tokens beside relative positions."""


@dataclass(frozen=True)
class OffsetTable:
    """What a module of relative positions hands out in place of its N×M bias.

    Args:
        weight: `[offsets, H]`, with three more rows where there is a class token.
        window: height and width, in tokens.
        class_token: a class token stands before the others.
    """

    weight: Tensor
    window: Sequence[int]
    class_token: bool


class TimmFamily(ExactFamily, register=False):
    """A family with tables over windows, whose attentions compute everything in their own forward.

    Attributes:
        forward: what takes the place of an attention's forward, with the attention before its arguments.
    """

    forward: ClassVar[Callable[..., Any]]
    form = "exact table"
    rank = 0

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
