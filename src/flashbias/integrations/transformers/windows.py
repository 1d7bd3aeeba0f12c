"""What vision models share: tables over offsets in a window, the mask of shifted windows, and the layout of windows.

Shifted windows. In place of their masks `[windows, N, N]` the layers hand out which region each token is in,
`[windows, N]`; `flashbias.biases.regions` says which regions these are, and how they become factors of rank 3, shared
by all heads and images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashbias.biases.base import wide_dtype
from flashbias.biases.regions import region_factors, shifted_window_regions
from flashbias.biases.window import WindowBias
from flashbias.factored import FactoredBias
from flashbias.integrations.base import SETTINGS, Changes, Options, known_class
from flashbias.integrations.transformers.attend import Settings, attend, settings_of
from flashbias.integrations.transformers.base import TransformersFamily

__all__ = ["Window", "WindowSettings", "WindowedFamily", "attend_in_windows", "split_heads"]

REGIONS = 4
"""Of a window: both axes are shifted, and each has two sides."""


class Window:
    """How a model's own table of offsets is read as a relative table.

    Args:
        window: height and width, in tokens.
        class_token: a class token stands before the others.
    """

    def __init__(self, window: tuple[int, int], class_token: bool = False) -> None:
        self.size = window
        self.rows, self.code_q, self.code_k = _rows_and_codes(*window, class_token)

    def bias(self, weight: Tensor) -> FactoredBias:
        """Read a table.

        Args:
            weight: `[offsets, H]`, with three more rows where there is a class token.

        Returns:
            A table in float32 at least, rank 0, differentiable with respect to `weight`.
        """
        if self.rows.device != weight.device:
            self.rows, self.code_q, self.code_k = (x.to(weight.device) for x in (self.rows, self.code_q, self.code_k))
        table = weight.to(wide_dtype(weight))[self.rows].mT.contiguous()
        return FactoredBias.from_table(table, len(self.code_q), len(self.code_k), self.code_q, self.code_k)


@torch.compiler.assume_constant_result
def _rows_and_codes(height: int, width: int, class_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Which row of the model's table each entry of a `WindowBias` table is, and the codes of queries and keys."""
    with torch.device("cpu"), torch.no_grad():
        numbered = WindowBias(1, (height, width), class_token)
        numbered.weight.copy_(torch.arange(len(numbered.weight))[:, None])
        bias = numbered()
    assert bias.table is not None
    return bias.table[0].long(), *bias.codes()


@dataclass
class WindowSettings(Settings):
    """Settings of an attention over windows.

    Args:
        window: how its table is read.
    """

    window: Window | None = None


class WindowedFamily(TransformersFamily, register=False):
    """A family whose layers cut the image into windows, every second layer after a shift.

    Attributes:
        layers: full names of the layers' classes; they make the masks.
        forward: what takes the place of an attention's forward, with the attention before its arguments.
    """

    layers: ClassVar[tuple[str, ...]]
    forward: ClassVar[Callable[..., Any]]
    decodes = False
    form = "exact table"
    rank = 0

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
        changes.set(attention, SETTINGS, WindowSettings(options.impl, window=Window(self.window_of(attention))))
        changes.set(attention, "forward", partial(self.forward, attention))

    @abstractmethod
    def window_of(self, attention: Any) -> tuple[int, int]:
        """Height and width of the windows of an attention."""

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
    return shifted_window_regions((height, width), window, shift, device)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """`[B, N, H * head_dim]` to `[B, H, N, head_dim]`."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend_in_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    *,
    penalty: float,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Compute the attention of a patched module in all windows of all images.

    Args:
        module: the attention, patched.
        query: `[images * windows, H, N, head_dim]`.
        key: likewise.
        value: likewise.
        weight: the table of offsets, `[offsets, H]`.
        mask: what `regions_of` gave the layer, or None.
        penalty: what the model takes off the score of a pair from two regions.
        scale: factor of the dot products.
        dropout_p: probability of dropping an attention weight in training.

    Returns:
        `[images * windows, N, H * head_dim]`.

    Raises:
        ValueError: `mask` comes from somewhere else.
    """
    settings = settings_of(module)
    assert isinstance(settings, WindowSettings) and settings.window is not None
    bias = settings.window.bias(weight)
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be what the patched layer makes, [windows, N], got {tuple(mask.shape)}; "
                "call the layer, not its attention"
            )
        query, key, value = (x.unflatten(0, (-1, len(mask))) for x in (query, key, value))
        numbers = torch.arange(REGIONS, device=mask.device)
        # 100 and 200 are exact in bfloat16, which needs the fewest columns.
        bias = bias + region_factors(mask[:, None], mask[:, None], numbers, penalty, torch.bfloat16)
    out = attend(module, query, key, value, bias, None, is_causal=False, scale=scale, dropout_p=dropout_p).flatten(-2)
    return out if mask is None else out.flatten(0, 1)
