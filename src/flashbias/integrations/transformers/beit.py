"""BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254.

    b[h, i, j] = relative_position_bias_table[offset(i, j), h], with a row each for class token to patch, patch to class
                 token, class token to itself; one table for each layer, one for all, or both

Exact through a table. For an image of another size the model stretches its table, and then reads it as before; so does
the patched one. The modules that would form the bias hand out the stretched table instead, and transformers adds its
mask to that as it did to the bias. transformers attends through its AttentionInterface, so no attention's forward is
replaced.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AttentionInterface, AttentionMaskInterface

from flashbias.factored import FactoredBias
from flashbias.integrations.base import Changes, around, known_class
from flashbias.integrations.call import settings_of
from flashbias.integrations.factors import sources_below
from flashbias.integrations.learned import LearnedTable
from flashbias.integrations.tables import StaticTable, TableFamily
from flashbias.integrations.transformers.attend import attend
from flashbias.integrations.transformers.base import TransformersFamily
from flashbias.integrations.transformers.masks import key_mask
from flashbias.integrations.windows import OffsetTable

__all__ = ["Beit", "PatchFamily", "PositionBias", "bias_within"]

FILE = "transformers.models.beit.modeling_beit"
IMPLEMENTATION = "factored_position_bias"
"""Attention implementation of patched models."""

TABLE = "relative_position_bias_table"
"""Parameter of the modules that form the bias."""

CLASS_ROWS = 3
"""Rows of a table that belong to the class token; they are the last."""


@dataclass(frozen=True)
class Padding:
    """What takes the place of the mask until it is added to the bias.

    Args:
        mask: as `masks.key_mask` returns it.
    """

    mask: Tensor


@dataclass(frozen=True)
class PositionBias:
    """What takes the place of the N×M bias on its way through the model: its table, and the mask that is added to it.

    Args:
        weight: `[offsets + 3, H]`.
        window: height and width of the image in patches.
        mask: as `masks.key_mask` returns it; None hides nothing.
    """

    weight: Tensor
    window: tuple[int, int]
    mask: Tensor | None = None

    def __add__(self, other: PositionBias | Padding | Tensor) -> PositionBias:
        """Add a mask, the caller's own of four dimensions, or a table for the same image that has its mask already."""
        if isinstance(other, Padding):
            return PositionBias(self.weight, self.window, other.mask)
        if isinstance(other, Tensor):
            return PositionBias(self.weight, self.window, other)
        return PositionBias(self.weight + other.weight.to(self.weight.device), self.window, other.mask)

    def factored(self) -> FactoredBias:
        """The bias."""
        return OffsetTable(self.weight, self.window, class_token=True).bias()


class PatchFamily(TableFamily, TransformersFamily, register=False):
    """A family that attends to all patches of an image and a class token at once.

    Attributes:
        biases: full names of the classes of the modules that form the bias.
    """

    biases: ClassVar[tuple[str, ...]]
    decodes = False
    factors_note = "for images of the size that the model is made for; exact table for others"
    learned_note = "the certificate holds until they are trained; images of another size are refused"

    @abstractmethod
    def own_bias(self, model: nn.Module, attention: Any) -> nn.Module | None:
        """The module that forms the bias of one attention, None without one."""

    @abstractmethod
    def shared_bias(self, stack: Any) -> nn.Module | None:
        """The module that forms the bias of all attentions of a stack, None without one."""

    def static_table(self, model: nn.Module, attention: Any) -> StaticTable:
        """Read the table of one attention, for images of the size that the model is made for."""
        stacks = around(model, attention, self.stacks)
        found = (self.own_bias(model, attention), *(self.shared_bias(stack) for stack in stacks))
        modules: list[Any] = [module for module in found if module is not None]
        height, width = size = (int(modules[0].window_size[0]), int(modules[0].window_size[1]))
        biases = [position_bias(module, size, dim_size=height * width + 1) for module in modules]
        total = functools.reduce(PositionBias.__add__, biases)
        sources = [source for module in modules for source in sources_below(module, [TABLE])]
        return StaticTable(total.factored(), sources, size)

    def is_biased(self, attention: Any) -> bool:
        """Without either option there are absolute positions alone."""
        config = attention.config
        return config.use_relative_position_bias or config.use_shared_relative_position_bias

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Also: a module that forms another bias."""
        for module in model.modules():
            cls = known_class(module, self.biases)
            if cls is not None and type(module).forward is not cls.forward:
                return f"{type(module).__name__} overrides the forward of {cls.__name__}"
        return super().unsupported(model, attention)

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Also: let the modules that would form the bias hand out its table."""
        super().prepare(model, changes)
        for module in model.modules():
            if known_class(module, self.biases) is not None:
                changes.set(module, "forward", partial(position_bias, module))


class Beit(PatchFamily):
    """BEiT encoders, and the models and backbones around them."""

    name = "BEiT"
    attentions = (f"{FILE}.BeitAttention",)
    stacks = (f"{FILE}.BeitModel",)
    biases = (f"{FILE}.BeitRelativePositionBias",)
    implementation = IMPLEMENTATION

    def own_bias(self, model: nn.Module, attention: Any) -> nn.Module | None:
        """It belongs to the layer around the attention."""
        layers: list[Any] = [part for part in model.modules() if getattr(part, "attention", None) is attention]
        return layers[0].relative_position_bias if layers else None

    def shared_bias(self, stack: Any) -> nn.Module | None:
        """It belongs to the model."""
        return stack.shared_position_bias


def position_bias(
    module: Any,
    window_size: tuple[int, int],
    interpolate_pos_encoding: bool = False,
    dim_size: int | None = None,
) -> PositionBias:
    """In place of the forward of `BeitRelativePositionBias`: the table in place of the bias.

    Args:
        module: has `window_size` and `relative_position_bias_table`.
        window_size: height and width of the image in patches.
        interpolate_pos_encoding: whether the model would stretch the bias to `dim_size` tokens too.
        dim_size: number of tokens, which is that of the bias already.

    Returns:
        The bias, without a mask.

    Raises:
        ValueError: the bias would have to be stretched, because `dim_size` is another number.
    """
    height, width = size = (int(window_size[0]), int(window_size[1]))
    if interpolate_pos_encoding and dim_size != height * width + 1:
        raise ValueError(f"dim_size must be {height * width + 1} for {height} x {width} patches, got {dim_size}")
    return PositionBias(stretched(module, size), size)


def stretched(module: Any, size: tuple[int, int]) -> Tensor:
    """The model's table for an image of `size` patches, `[offsets + 3, H]`."""
    weight = module.relative_position_bias_table
    offsets, class_rows = weight[:-CLASS_ROWS], weight[-CLASS_ROWS:]
    old_height, old_width, height, width = (2 * side - 1 for side in (*module.window_size, *size))
    # transformers takes the table for one of width x height, also where the two differ: a part of the model.
    if (old_width, old_height) == (height, width):
        return weight
    grid = offsets.reshape(1, old_width, old_height, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(height, width), mode="bilinear")
    return torch.cat([grid.permute(0, 2, 3, 1).flatten(0, 2), class_rows])


def bias_within(module: nn.Module, position: PositionBias, device: torch.device) -> FactoredBias:
    """The bias of a patched attention: factors for the size of image that they are for, or else its exact form.

    Args:
        module: the attention.
        position: what came through the model.
        device: where the queries live.

    Raises:
        ValueError: an image of another size, while factors are trained in place of the table.
        RuntimeError: as `TableFactors.current`.
    """
    factors = settings_of(module).factors
    if isinstance(factors, LearnedTable) and factors.window != position.window:
        # The table has not seen the training: its bias would be another than that of the factors.
        raise ValueError(
            f"learned factors are for {factors.window} patches, got an image of {position.window}; "
            "flashbias.unpatch(model) writes them to the table, which the model stretches"
        )
    if factors is None or factors.window != position.window:
        return position.factored()
    return factors.current(module, device)


def padding(*args: Any, **kwargs: Any) -> Padding:
    """What transformers gets when it asks for a mask."""
    return Padding(key_mask(*args, **kwargs))


def factored_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the AttentionInterface calls; `attention_mask` is a `PositionBias`."""
    if not isinstance(attention_mask, PositionBias):
        raise ValueError(
            f"attention_mask must come from a patched layer, got {type(attention_mask).__name__}; "
            "call the model, not its attention"
        )
    out = attend(
        module,
        query,
        key,
        value,
        bias_within(module, attention_mask, query.device),
        attention_mask.mask,
        is_causal=False,
        scale=scaling,
        dropout_p=dropout,
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, factored_attention)
AttentionMaskInterface.register(IMPLEMENTATION, padding)
