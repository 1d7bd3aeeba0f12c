"""Families of transformers whose layers cut the image into windows, every second layer after a shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashbias.integrations.base import SETTINGS, Changes, Options, known_class
from flashbias.integrations.factors import sources_below
from flashbias.integrations.tables import StaticTable, TableFamily
from flashbias.integrations.transformers.base import TransformersFamily
from flashbias.integrations.windows import OffsetTable, WindowSettings, shifted_regions

__all__ = ["WindowedFamily"]


class WindowedFamily(TableFamily, TransformersFamily, register=False):
    """A family whose layers cut the image into windows, every second layer after a shift.

    Attributes:
        layers: full names of the layers' classes; they make the masks.
        forward: what takes the place of an attention's forward, with the attention before its arguments.
        table: the table of an attention.
        made_of: paths, from the attention, of what makes the table.
    """

    layers: ClassVar[tuple[str, ...]]
    forward: ClassVar[Callable[..., Any]]
    table: ClassVar[Callable[[Any], OffsetTable]]
    made_of: ClassVar[tuple[str, ...]]
    decodes = False

    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one attention."""
        return StaticTable(type(self).table(attention).bias(), sources_below(attention, self.made_of))

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Also: a layer that makes other masks."""
        for layer in self._layers_of(model):
            cls = known_class(layer, self.layers)
            if type(layer).get_attn_mask is not getattr(cls, "get_attn_mask", None):
                return f"{type(layer).__name__} overrides get_attn_mask"
        return super().unsupported(model, attention)

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Also: let the layers hand out regions in place of masks."""
        super().prepare(model, changes)
        for layer in self._layers_of(model):
            changes.set(layer, "get_attn_mask", partial(regions_of, layer))

    def change(self, attention: Any, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        changes.set(attention, SETTINGS, WindowSettings(options.impl))
        changes.set(attention, "forward", partial(self.forward, attention))

    def _layers_of(self, model: nn.Module) -> Iterator[Any]:
        return (module for module in model.modules() if known_class(module, self.layers) is not None)


def regions_of(
    layer: Any, height: int, width: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor | None:
    """In place of a layer's `get_attn_mask`: in which region of its window each token is.

    Args:
        layer: has `window_size` and `shift_size`.
        height: of the padded image, in tokens.
        width: likewise.
        dtype: of the mask that the layer would make.
        device: where the result lives.

    Returns:
        `[windows, N]`, or None in a layer without a shift.
    """
    if layer.shift_size <= 0:
        return None
    window, shift = (layer.window_size,) * 2, (layer.shift_size,) * 2
    return shifted_regions((height, width), window, shift, device or torch.get_default_device())
