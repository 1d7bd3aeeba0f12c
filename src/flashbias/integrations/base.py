"""`Family`: what a family of models is, the registry of families, and changes to a model that can be taken back."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from flashbias.integrations.report import AttentionEntry

__all__ = [
    "SETTINGS",
    "Changes",
    "ExactFamily",
    "Family",
    "Options",
    "Plan",
    "Tables",
    "around",
    "families_for",
    "known_class",
]

SETTINGS = "_flashbias"
"""The attribute under which every attention that is changed keeps what its new forward needs."""

Tables = Literal["exact", "factors"]
"""What learned tables over fixed places become."""

FOLDERS = {
    "boltz": "flashbias.integrations.protein",
    "flash_abb": "flashbias.integrations.protein",
    "openfold3": "flashbias.integrations.protein",
    "protenix": "flashbias.integrations.protein",
    "timm": "flashbias.integrations.timm",
    "transformers": "flashbias.integrations.transformers",
}
"""The library that a model's classes come from, and the package that knows it. It is imported for such models only."""


@dataclass(frozen=True)
class Options:
    """The arguments of `patch`, checked."""

    tol: float = 1e-3
    impl: str = "auto"
    train_bias: bool = False
    tables: Tables = "exact"


class Changes:
    """Changes to a model's modules, written down so that they can be undone to the bit.

    What is set stands in a module's `__dict__`: `nn.Module` never sees it, so parameters, buffers and the keys of
    `state_dict` stay what they are, but for modules that are added. A deep copy of the model holds a copy of its
    changes.
    """

    def __init__(self) -> None:
        # module, attribute, whether it was there, what it was, what it is now
        self._set: list[tuple[nn.Module, str, bool, Any, Any]] = []
        self._hooks: list[RemovableHandle] = []
        # module, name, what was added; module, name, whether the parameter required a gradient
        self._added: list[tuple[nn.Module, str, nn.Module]] = []
        self._frozen: list[tuple[nn.Module, str, bool]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Give one module an attribute of its own."""
        before = module.__dict__
        self._set.append((module, name, name in before, before.get(name), value))
        module.__dict__[name] = value

    def hook(self, handle: RemovableHandle) -> None:
        """Keep the handle of a hook that was registered."""
        self._hooks.append(handle)

    def add(self, module: nn.Module, name: str, child: nn.Module) -> None:
        """Give one module a child of its own, with its parameters."""
        self._added.append((module, name, child))
        module.add_module(name, child)

    def freeze(self, module: nn.Module, name: str) -> None:
        """Keep optimisers from a parameter. Its gradient is dropped: a step would still apply it."""
        parameter = getattr(module, name)
        self._frozen.append((module, name, parameter.requires_grad))
        parameter.requires_grad_(False)
        parameter.grad = None

    def undo(self) -> None:
        """Put everything back.

        Raises:
            RuntimeError: an attribute has been replaced since by somebody else; nothing is changed then.
        """
        for module, name, _, _, value in self._set:
            if module.__dict__.get(name) is not value:
                raise RuntimeError(
                    f"{name!r} of a {type(module).__name__} was replaced after patch(): undo that first, "
                    "so that unpatch() does not overwrite it"
                )
        for module, name, child in self._added:
            if module._modules.get(name) is not child:
                raise RuntimeError(f"{name!r} of a {type(module).__name__} was replaced after patch(): undo that first")
        for handle in self._hooks:
            handle.remove()
        for module, name, _ in self._added:
            delattr(module, name)
        for module, name, required in reversed(self._frozen):
            getattr(module, name).requires_grad_(required)
        for module, name, existed, before, _ in reversed(self._set):
            if existed:
                module.__dict__[name] = before
            else:
                del module.__dict__[name]
        self._set.clear()
        self._added.clear()
        self._frozen.clear()
        self._hooks.clear()


@dataclass(frozen=True)
class Plan:
    """What is to be done with one attention.

    Args:
        entry: its line of the report.
        apply: does it, noting every change; None where the attention is left as it is.
    """

    entry: AttentionEntry
    apply: Callable[[Changes], None] | None = None


_REGISTRY: dict[str, Family] = {}


class Family(ABC):
    """A family of models: how to recognise its attentions, what is not supported, how to make one factored.

    A subclass declares `name` and `attentions`, and says what becomes of one attention in `plan`. It is registered
    when it is defined; a class that is no family of its own says `class Name(Family, register=False)`. A new file
    in one of the folders is found without being named anywhere.

    Attributes:
        name: what the report calls it.
        attentions: full names of the attention classes, as in `library.module.Class`. Names, because then
            nothing of the library is imported that the model does not use.
    """

    name: ClassVar[str]
    attentions: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        """Put the family into the registry."""
        super().__init_subclass__(**kwargs)
        if not register:
            return
        known = _REGISTRY.get(cls.name)
        if known is not None and type(known).__module__ != cls.__module__:
            raise ValueError(f"a family named {cls.name!r} is already registered, by {type(known).__module__}")
        _REGISTRY[cls.name] = cls()

    @abstractmethod
    def plan(self, name: str, attention: nn.Module, options: Options) -> Plan:
        """Say what becomes of one attention, without changing anything."""

    def plan_within(self, model: nn.Module, name: str, attention: nn.Module, options: Options) -> Plan:
        """As `plan`, for a family that must see the model around the attention."""
        return self.plan(name, attention, options)

    def is_biased(self, attention: nn.Module) -> bool:
        """Tell whether this attention takes part in a biased model; others of the class are not reported."""
        return True

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Say which configuration of this attention is not supported, None if it is."""
        return None

    def prepare(self, model: nn.Module, changes: Changes) -> None:
        """Change what is not an attention, once per model: hooks, configuration. After all attentions."""
        return

    # ---------------------------------------------------------------- what the machinery asks

    def found_in(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Walk over the attentions of this family with their names."""
        for name, module in model.named_modules():
            if known_class(module, self.attentions) is not None and self.is_biased(module):
                yield name, module

    def plans(self, model: nn.Module, options: Options) -> Iterator[Plan]:
        """Plan every attention of the model, in order."""
        for name, attention in self.found_in(model):
            reason = self._overridden(attention) or self.unsupported(model, attention)
            if reason is None:
                yield self.plan_within(model, name, attention, options)
            else:
                yield Plan(AttentionEntry(name, self.name, "unsupported", note=reason))

    def _overridden(self, attention: nn.Module) -> str | None:
        """A forward of its own would be replaced, or would ignore what is given to it."""
        cls = known_class(attention, self.attentions)
        if cls is not None and type(attention).forward is not cls.forward:
            return f"{type(attention).__name__} overrides the forward of {cls.__name__}"
        if "forward" in attention.__dict__:
            return "its forward was already replaced on the instance; patch before other libraries wrap the model"
        return None


class ExactFamily(Family, register=False):
    """A family whose bias always has the same exact form.

    Attributes:
        form: what the bias becomes, for the report.
        rank: columns of its factors.
    """

    form: ClassVar[str]
    rank: ClassVar[int]

    def plan(self, name: str, attention: nn.Module, options: Options) -> Plan:
        """Replace it by its exact form."""
        stays = options.tables == "factors" and self.form == "exact table"
        note = "the number of tokens varies, so the table stays" if stays else ""
        entry = AttentionEntry(name, self.name, "replaced", self.form, self.rank, 0.0, note)
        return Plan(entry, lambda changes: self.change(attention, options, changes))

    @abstractmethod
    def change(self, attention: Any, options: Options, changes: Changes) -> None:
        """Change one attention."""


def known_class(module: nn.Module, names: tuple[str, ...]) -> type[nn.Module] | None:
    """Return the class by one of these full names that a module is an instance of, None if there is none."""
    for cls in type(module).__mro__:
        if f"{cls.__module__}.{cls.__qualname__}" in names:
            return cls
    return None


def around(model: nn.Module, part: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """Return the modules of some classes that a part of a model lies in, the outermost first.

    Args:
        model: where to look.
        part: a module of it.
        names: full names of the classes.
    """
    candidates = (module for module in model.modules() if known_class(module, names) is not None)
    return [module for module in candidates if any(inner is part for inner in module.modules())]


def families_for(model: nn.Module) -> list[Family]:
    """Return the registered families, after importing those that the model's classes call for.

    Args:
        model: any module.

    Returns:
        All families known so far, sorted by name.
    """
    libraries = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    for library in sorted(libraries & FOLDERS.keys()):
        package = importlib.import_module(FOLDERS[library])
        for file in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{file.name}")
    return [family for _, family in sorted(_REGISTRY.items())]
