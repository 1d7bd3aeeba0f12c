"""Families of timm whose blocks cut the image into windows, every second block after a shift."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from flashbias.integrations.base import SETTINGS, Changes, known_class
from flashbias.integrations.timm.base import TimmFamily
from flashbias.integrations.windows import shifted_regions

__all__ = ["PENALTY", "WindowedFamily"]

PENALTY = 100.0
"""What the masks of timm's blocks take off the score of a pair that a shift brought together."""


class WindowedFamily(TimmFamily, register=False):
    """A family whose blocks cut the image into windows, every second block after a shift.

    A block makes its mask `[windows, N, N]` when it is built, or, with `dynamic_mask`, for each image. Patched, it
    asks for each image, and gets regions.

    Attributes:
        blocks: full names of the blocks' classes.
    """

    blocks: ClassVar[tuple[str, ...]]

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Also: an attention without its block, a block that makes other masks."""
        around = [block for block in self._blocks_of(model) if block.attn is attention]
        if not around:
            names = " or ".join(name.rpartition(".")[2] for name in self.blocks)
            return f"{type(model).__name__} is a part of a model; patch a model with its {names}"
        for block in around:
            cls = known_class(block, self.blocks)
            if type(block).get_attn_mask is not getattr(cls, "get_attn_mask", None):
                return f"{type(block).__name__} overrides get_attn_mask"
        return super().unsupported(model, attention)

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Let the blocks of patched attentions make regions in place of masks."""
        for block in self._blocks_of(model):
            if SETTINGS not in block.attn.__dict__:
                continue
            changes.set(block, "get_attn_mask", partial(regions_of, block))
            if not block.dynamic_mask:
                changes.set(block, "dynamic_mask", True)
                changes.set(block, "set_input_size", partial(set_input_size, block))

    def _blocks_of(self, model: nn.Module) -> Iterator[Any]:
        return (module for module in model.modules() if known_class(module, self.blocks) is not None)


def regions_of(block: Any, x: Tensor | None = None, **options: Any) -> Tensor | None:
    """In place of a block's `get_attn_mask`: in which region of its window each token is.

    Args:
        block: has `window_size` and `shift_size`.
        x: `[B, height, width, dim]`, the padded image. None asks for the mask that the block keeps.
        options: device and dtype of that mask.

    Returns:
        `[windows, N]`, or None in a block without a shift.
    """
    if x is None:
        return type(block).get_attn_mask(block, **options)
    if not any(block.shift_size):
        return None
    return shifted_regions(tuple(x.shape[1:3]), tuple(block.window_size), tuple(block.shift_size), x.device)


def set_input_size(block: Any, *args: Any, **options: Any) -> None:
    """In place of the `set_input_size` of a block that keeps a mask: it gets the next one, which it has unpatched."""
    block.dynamic_mask = False
    try:
        type(block).set_input_size(block, *args, **options)
    finally:
        block.dynamic_mask = True
