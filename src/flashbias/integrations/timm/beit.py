"""BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254.

    b[h, i, j] = relative_position_bias_table[offset(i, j), h], with a row each for class token to patch, patch to class
                 token, class token to itself; one table for each block, one for all, or both

Exact through a table. The module that would form the bias of all blocks hands out its table instead; where a block has
one too, the two are added, entry by entry. BEiT v2 (https://arxiv.org/abs/2208.06366) is the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashbias.integrations.base import Changes, around, known_class
from flashbias.integrations.call import call
from flashbias.integrations.factors import sources_below
from flashbias.integrations.tables import StaticTable
from flashbias.integrations.timm.base import TimmFamily, finish, query_key_value
from flashbias.integrations.windows import OffsetTable, bias_of

__all__ = ["Beit"]

FILE = "timm.models.beit"
MODELS, SHARED = (f"{FILE}.Beit",), (f"{FILE}.RelativePositionBias",)


def forward(attention: Any, x: Tensor, shared_rel_pos_bias: OffsetTable | None = None) -> Tensor:
    """`Attention.forward` with the table of the block, of the model, or both."""
    query, key, value = query_key_value(attention, x)
    table = table_of(attention, checked(shared_rel_pos_bias))
    bias = bias_of(attention, x.device, lambda: None if table is None else table.bias())
    out = call(attention, query, key, value, bias, scale=attention.scale, dropout_p=attention.attn_drop.p)
    return finish(attention, out.flatten(-2))


def checked(shared: OffsetTable | None) -> OffsetTable | None:
    """What a patched model hands to its blocks.

    Raises:
        ValueError: `shared` comes from somewhere else.
    """
    if isinstance(shared, OffsetTable | None):
        return shared
    raise ValueError(
        f"shared_rel_pos_bias must come from a patched model, got {type(shared).__name__}; "
        "call the model, not one of its blocks"
    )


def table_of(attention: Any, shared: OffsetTable | None) -> OffsetTable | None:
    """The table of a block.

    Args:
        attention: has a `relative_position_bias_table`, or None for one.
        shared: the table of all blocks, or None.
    """
    own = attention.relative_position_bias_table
    if shared is None:
        return None if own is None else OffsetTable(own, attention.window_size, class_token=True)
    weight = shared.weight if own is None else own + shared.weight
    return OffsetTable(weight, shared.window, class_token=True)


def shared_table(module: Any) -> OffsetTable:
    """In place of the forward of `RelativePositionBias`: the table in place of the bias."""
    return OffsetTable(module.relative_position_bias_table, module.window_size, class_token=True)


def shared_of(model: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The module with the table that a block shares with the others of its BEiT, of which a model may have several."""
    within = [model, *around(model, attention, MODELS)][-1]
    return next((module for module in within.modules() if known_class(module, SHARED) is not None), None)


def shared_beside(model: nn.Module, attention: nn.Module) -> OffsetTable | None:
    """Its table."""
    shared = shared_of(model, attention)
    return None if shared is None else shared_table(shared)


class Beit(TimmFamily):
    """BEiT, v1 and v2."""

    name = "BEiT (timm)"
    attentions = (f"{FILE}.Attention",)
    forward = staticmethod(forward)

    def found_in(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Without either table there are absolute positions alone."""
        for name, attention in super().found_in(model):
            if table_of(attention, shared_beside(model, attention)) is not None:
                yield name, attention

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Also: a module that forms another bias."""
        for module in model.modules():
            cls = known_class(module, SHARED)
            if cls is not None and type(module).forward is not cls.forward:
                return f"{type(module).__name__} overrides the forward of {cls.__name__}"
        return super().unsupported(model, attention)

    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one block, and of the model."""
        shared = shared_of(model, attention)
        table = table_of(attention, shared_beside(model, attention))
        assert table is not None, "found_in() keeps attentions with a table"
        modules = [m for m in (attention, shared) if m is not None and m.relative_position_bias_table is not None]
        sources = [source for module in modules for source in sources_below(module, ["relative_position_bias_table"])]
        return StaticTable(table.bias(), sources)

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Let the module that would form the bias of all blocks hand out its table."""
        for module in model.modules():
            if known_class(module, SHARED) is not None:
                changes.set(module, "forward", partial(shared_table, module))
