"""`TableFactors`: constant factors in place of a learned table, and the check that the table is still the same.

Factors are computed once, from values that a model may change later: a state_dict that is loaded, a step of an
optimiser. Each tensor that they came from is watched. Its identity, version and place in memory are compared in every
forward pass, which reads no values; only if one differs, as after a copy or a move, the values are compared with those
of the time of the compression.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashbias.constants import may_be_kept
from flashbias.factored import FactoredBias

__all__ = ["Source", "TableFactors", "sources_below"]


@dataclass
class Source:
    """A tensor that factors were computed from.

    Args:
        root: the module from which it is found.
        path: where, as in `mlp.0.weight`.
        values: what it held then.
    """

    root: nn.Module
    path: str
    values: Tensor
    stamp: tuple[Any, ...] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, root: nn.Module, path: str) -> Source:
        """Watch a tensor from now on."""
        tensor = _at(root, path)
        assert isinstance(tensor, Tensor), path
        return cls(root, path, tensor.detach().clone(), _stamp(tensor))

    def place(self) -> tuple[nn.Module, str]:
        """The module that holds it, and its name there."""
        path, _, leaf = self.path.rpartition(".")
        return self.root.get_submodule(path), leaf

    def tensor(self) -> Tensor | None:
        """What is found there now."""
        return _at(self.root, self.path)

    def is_unchanged(self) -> bool:
        """Tell whether the values are still those of the compression; they are read only where they may differ."""
        tensor = self.tensor()
        if tensor is None:
            return False
        stamp = _stamp(tensor)
        if stamp == self.stamp:
            return True
        self.values = self.values.to(tensor.device)
        if tensor.dtype != self.values.dtype or not torch.equal(tensor.detach(), self.values):
            return False
        self.stamp = stamp
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the stamp: a copy of the model has other tensors."""
        return {**self.__dict__, "stamp": None}


def sources_below(root: nn.Module, paths: Iterable[str]) -> list[Source]:
    """Watch tensors, and all floating point tensors of modules.

    Args:
        root: the module from which they are found.
        paths: of tensors and of modules; "" is the root itself.
    """
    found = []
    for path in paths:
        part = _at(root, path) if path else root
        if not isinstance(part, nn.Module):
            found.append(Source.of(root, path))
            continue
        names = (name for name, x in (*part.named_parameters(), *part.named_buffers()) if x.is_floating_point())
        found += [Source.of(root, f"{path}.{name}" if path else name) for name in names]
    return found


def _at(root: nn.Module, path: str) -> Any:
    part: Any = root
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when values do: cheap, and never equal by chance while the tensor lives."""
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.dtype


@dataclass
class TableFactors:
    """Constant factors in place of a learned table.

    Args:
        bias: the factors.
        sources: what they were computed from.
        window: height and width that they are for, in tokens; None where an attention knows one size only.
    """

    bias: FactoredBias
    sources: list[Source]
    window: tuple[int, int] | None = None

    def current(self, module: nn.Module, device: torch.device) -> FactoredBias:
        """Return the factors, if they still stand for the model's table.

        In a compiled graph the values are not checked again: a graph cannot ask for a tensor's version.

        Args:
            module: the attention.
            device: where its queries live.

        Raises:
            RuntimeError: the table has changed since, or would have to be trained.
        """
        if module.training and torch.is_grad_enabled():
            self._check_frozen(module)
        if not torch.compiler.is_compiling():
            self._check_unchanged(module)
        bias = self.bias  # another thread may move it elsewhere
        if bias.device == device:
            return bias
        if not may_be_kept():
            return bias.to(device)
        with torch.inference_mode(mode=False):
            self.bias = bias = bias.to(device)
        return bias

    def _check_frozen(self, module: nn.Module) -> None:
        for source in self.sources:
            tensor = source.tensor()
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{type(module).__name__} is in training and its table is factors, which are constants: "
                    f"{source.path!r} requires a gradient and would get none. Freeze it with requires_grad_(False), "
                    "or unpatch and patch with tables='exact', or with train_bias=True"
                )

    def _check_unchanged(self, module: nn.Module) -> None:
        for source in self.sources:
            if not source.is_unchanged():
                raise RuntimeError(
                    f"{source.path!r}, of which the table of a {type(module).__name__} is made, has changed since "
                    "patch(): its factors stand for the old values. Call flashbias.unpatch(model) and patch it again"
                )
