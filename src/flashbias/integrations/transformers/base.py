"""`TransformersFamily`: what changes in a model of transformers besides its attentions.

The model gets a configuration of its own, a shallow copy that asks for our masks. It must be a copy: another model may
share the object, and would be given masks that it cannot read. A hook in front of each stack refuses what a patched
model cannot give.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from flashbias.integrations.base import SETTINGS, Changes, ExactFamily, Options, known_class
from flashbias.integrations.call import Settings
from flashbias.integrations.transformers.masks import MASKS_ONLY, ready_made

__all__ = ["TransformersFamily"]


class TransformersFamily(ExactFamily, register=False):
    """A family whose attentions lie in stacks: modules that hold a `config` and hand one mask to all attentions.

    Attributes:
        stacks: full names of the stacks' classes.
        implementation: the name under which the stacks' configuration asks for masks.
        decodes: whether the stacks hide later tokens, where they do not say so themselves.
    """

    stacks: ClassVar[tuple[str, ...]]
    implementation: ClassVar[str] = MASKS_ONLY
    decodes: ClassVar[bool] = True

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Name what stands in the way: a part of a model, an option of its configuration."""
        stacks = list(self.stacks_of(model))
        if not stacks:
            names = " or ".join(name.rpartition(".")[2] for name in self.stacks)
            return f"{type(model).__name__} is a part of a model; patch a model with its {names}"
        for stack in stacks:
            if getattr(stack.config, "output_attentions", False):
                return "config.output_attentions=True: the probabilities are never formed"
            is_decoder = getattr(stack, "is_decoder", self.decodes)
            if is_decoder and getattr(stack.config, "is_causal", True) is False:
                return "config.is_causal=False: the decoder would attend to later tokens"
        return None

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        """Change one attention."""
        changes.set(attention, SETTINGS, Settings(options.impl))

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Give the stacks a configuration of their own, and put a guard in front of each."""
        stacks = list(self.stacks_of(model))
        own = {id(stack.config): _copy_for(stack.config, self.implementation) for stack in stacks}
        for module in model.modules():
            config = module.__dict__.get("config")
            if id(config) in own:
                changes.set(module, "config", own[id(config)])
        for stack in stacks:
            changes.hook(stack.register_forward_pre_hook(_Guard(stack, self.implementation), with_kwargs=True))

    def stacks_of(self, model: nn.Module) -> Iterator[Any]:
        """Walk over the stacks of a model."""
        return (module for module in model.modules() if known_class(module, self.stacks) is not None)


def _copy_for(config: Any, implementation: str) -> Any:
    own = copy.copy(config)
    # The public name would reach into configurations that the copy still shares.
    own._attn_implementation_internal = implementation
    return own


class _Guard:
    """A hook before a stack's forward: refuses attention probabilities, turns additive masks into booleans once.

    It also refuses another attention implementation where ours is called by its name: no other one can read what stands
    in place of the bias.
    """

    MASKS = ("attention_mask", "encoder_attention_mask")

    def __init__(self, stack: nn.Module, implementation: str) -> None:
        self.implementation = implementation
        parameters = list(inspect.signature(type(stack).forward).parameters)[1:]
        self.place = {name: parameters.index(name) for name in (*self.MASKS, "output_attentions") if name in parameters}

    def __call__(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = getattr(stack.config, "_attn_implementation_internal", None)
        if self.implementation not in (MASKS_ONLY, found):
            raise RuntimeError(
                f"the attention implementation of a patched {type(stack).__name__} was set to {found!r}, which cannot "
                "read its bias; call flashbias.unpatch(model), set it, and patch again"
            )
        place = self.place.get("output_attentions", len(args))
        if kwargs.get("output_attentions") or (place < len(args) and args[place]):
            raise NotImplementedError(
                f"output_attentions=True asks {type(stack).__name__} for N×M probabilities, which a patched model "
                "never forms; call flashbias.unpatch(model) first"
            )
        positional, named = list(args), dict(kwargs)
        for name in self.MASKS:
            place = self.place.get(name, len(args))
            if place < len(args):
                positional[place] = _four_dimensional(args[place])
            elif name in kwargs:
                named[name] = _four_dimensional(kwargs[name])
        return tuple(positional), named


def _four_dimensional(mask: Any) -> Any:
    return ready_made(mask) if isinstance(mask, Tensor) and mask.dim() == 4 else mask
