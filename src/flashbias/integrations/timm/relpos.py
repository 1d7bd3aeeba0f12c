"""Models with timm's modules of relative positions: MaxViT, CoAtNet, ViT with relative positions.

    RelPosBias     b[h, i, j] = relative_position_bias_table[offset(i, j), h], as in Swin; with a class token as in BEiT
    RelPosBiasTf   b[h, i, j] = relative_position_bias_table[h, dy, dx], (dy, dx) the place of key j minus that of i
    RelPosMlp      b[h, i, j] = gain * act(mlp(log offset(i, j)))_h, and 0 for a class token

Exact through a table. MaxViT (https://arxiv.org/abs/2204.01697) attends in windows and in grids of as many tokens,
CoAtNet (https://arxiv.org/abs/2106.04803) between all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from flashbias.biases.base import wide_dtype
from flashbias.factored import FactoredBias
from flashbias.integrations.base import Changes, around, known_class
from flashbias.integrations.call import call
from flashbias.integrations.factors import sources_below
from flashbias.integrations.tables import StaticTable
from flashbias.integrations.timm.base import TimmFamily, finish, query_key_value
from flashbias.integrations.windows import OffsetTable, bias_of

__all__ = ["MaxViT", "RelPosViT", "offset_table"]

TABLE, TABLE_TF, NETWORK = (f"timm.layers.pos_embed_rel.RelPos{kind}" for kind in ("Bias", "BiasTf", "Mlp"))
CHANNELS_FIRST = "timm.models.maxxvit.Attention2d"
CLASS_ROWS = 3
"""Rows of a table that belong to the class token; they are the last."""


def offset_table(rel_pos: Any) -> OffsetTable:
    """In place of the `get_bias` of one of timm's modules of relative positions: its table."""
    class_token = bool(getattr(rel_pos, "prefix_tokens", 0))
    if known_class(rel_pos, (TABLE,)):
        weight = rel_pos.relative_position_bias_table
    elif known_class(rel_pos, (TABLE_TF,)):
        weight = rel_pos.relative_position_bias_table.flip(1, 2).flatten(1).mT
    else:
        values = rel_pos.mlp(rel_pos.rel_coords_log).flatten(0, 1)
        values = rel_pos.bias_act(values.to(wide_dtype(values)))
        values = values if rel_pos.bias_gain is None else rel_pos.bias_gain * values
        weight = pad(values, (0, 0, 0, CLASS_ROWS * class_token))
    return OffsetTable(weight, rel_pos.window_size, class_token)


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, shared: OffsetTable | None) -> Tensor:
    """Attend with the table of the attention, or else of the model.

    Args:
        attention: has `rel_pos`, which may be None, `scale` and `attn_drop`.
        query: `[B, H, N, head_dim]`.
        key: likewise.
        value: likewise.
        shared: the table that the model hands out to all attentions, or None.

    Returns:
        `[B, N, H * head_dim]`.

    Raises:
        ValueError: `shared` comes from somewhere else.
    """
    if not isinstance(shared, OffsetTable | None):
        raise ValueError(
            f"shared_rel_pos must come from a patched model, got {type(shared).__name__}; "
            "call the model, not one of its blocks"
        )

    def exact() -> FactoredBias | None:
        table = shared if attention.rel_pos is None else offset_table(attention.rel_pos)
        return None if table is None else table.bias()

    bias = bias_of(attention, query.device, exact)
    out = call(attention, query, key, value, bias, scale=attention.scale, dropout_p=attention.attn_drop.p)
    return out.flatten(-2)


def unknown(rel_pos: Any) -> str | None:
    """Say why the bias of a module of relative positions is not known, None if it is."""
    kind, cls = type(rel_pos), known_class(rel_pos, (TABLE, TABLE_TF, NETWORK))
    if cls is None:
        return f"its relative positions are a {kind.__name__}; known are RelPosBias, RelPosBiasTf and RelPosMlp"
    if any(getattr(kind, method) is not getattr(cls, method) for method in ("forward", "get_bias")):
        return f"{kind.__name__} overrides what makes the bias of {cls.__name__}"
    return None


def static_table(rel_pos: Any) -> StaticTable:
    """Read the table of one of timm's modules of relative positions."""
    return StaticTable(offset_table(rel_pos).bias(), sources_below(rel_pos, [""]))


# -------------------------------------------------------------------- MaxViT and CoAtNet


def forward_last(attention: Any, x: Tensor, shared_rel_pos: OffsetTable | None = None) -> Tensor:
    """`AttentionCl.forward`, channels last."""
    query, key, value = split(attention, attention.qkv(x).flatten(1, -2))
    out = attend(attention, query, key, value, shared_rel_pos)
    return finish(attention, out.unflatten(1, x.shape[1:-1]))


def forward_first(attention: Any, x: Tensor, shared_rel_pos: OffsetTable | None = None) -> Tensor:
    """`Attention2d.forward`, channels first."""
    query, key, value = split(attention, attention.qkv(x).flatten(2).mT)
    out = attend(attention, query, key, value, shared_rel_pos)
    return finish(attention, out.mT.unflatten(-1, x.shape[2:]))


def split(attention: Any, projected: Tensor) -> Iterable[Tensor]:
    """Split tokens `[B, N, 3 * H * head_dim]` into queries, keys and values `[B, H, N, head_dim]`."""
    if attention.head_first:
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    return projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class MaxViT(TimmFamily):
    """MaxViT, CoAtNet, and the models between them."""

    name = "MaxViT (timm)"
    attentions = ("timm.models.maxxvit.AttentionCl", CHANNELS_FIRST)

    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one attention."""
        return static_table(attention.rel_pos)

    def is_biased(self, attention: Any) -> bool:
        """Some attend without relative positions."""
        return attention.rel_pos is not None

    def unsupported(self, model: nn.Module, attention: Any) -> str | None:
        """Also: a module that forms another bias."""
        return unknown(attention.rel_pos) or super().unsupported(model, attention)

    @staticmethod
    def forward(attention: Any, x: Tensor, shared_rel_pos: OffsetTable | None = None) -> Tensor:
        """The forward of either class."""
        is_first = known_class(attention, (CHANNELS_FIRST,)) is not None
        return (forward_first if is_first else forward_last)(attention, x, shared_rel_pos)


# -------------------------------------------------------------------- ViT with relative positions


def forward(attention: Any, x: Tensor, shared_rel_pos: OffsetTable | None = None) -> Tensor:
    """`RelPosAttention.forward` with the table of the block, or of the model."""
    query, key, value = query_key_value(attention, x)
    return finish(attention, attend(attention, attention.q_norm(query), attention.k_norm(key), value, shared_rel_pos))


class RelPosViT(TimmFamily):
    """ViT with relative positions, per block or one for all."""

    name = "ViT with relative positions (timm)"
    attentions = ("timm.models.vision_transformer_relpos.RelPosAttention",)
    models = ("timm.models.vision_transformer_relpos.VisionTransformerRelPos",)
    forward = staticmethod(forward)

    def found_in(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Without either module there is no bias."""
        return ((name, found) for name, found in super().found_in(model) if self._rel_pos_of(model, found))

    def unsupported(self, model: nn.Module, attention: Any) -> str | None:
        """Also: a module that forms another bias."""
        reasons = (unknown(rel_pos) for rel_pos in self._rel_pos_of(model, attention))
        return next(filter(None, reasons), None) or super().unsupported(model, attention)

    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one block, or of the model."""
        return static_table(self._rel_pos_of(model, attention)[0])

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Let the module that would form the bias of all blocks hand out its table."""
        models: list[Any] = [module for module in model.modules() if known_class(module, self.models) is not None]
        for found in models:
            if found.shared_rel_pos is not None:
                changes.set(found.shared_rel_pos, "get_bias", partial(offset_table, found.shared_rel_pos))

    def _rel_pos_of(self, model: nn.Module, attention: Any) -> list[Any]:
        """What makes the bias of one block: its own module, and that which it shares with the others of its ViT."""
        shared = [found.shared_rel_pos for found in around(model, attention, self.models)]
        return [rel_pos for rel_pos in (attention.rel_pos, *shared) if rel_pos is not None]
