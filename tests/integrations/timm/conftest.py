"""Imports timm where torchvision is not installed.

timm cannot be imported without torchvision, of which the models under test use nothing; and the torchvision of package
indexes loads beside the torch that is built for CUDA only. Where it is absent, names stand in for it while timm is
imported, and are gone afterwards: another library that asks finds no torchvision.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

ABSENT = "torchvision"


class Name(type):
    """A class without contents; whatever is asked of it is the name that was asked for."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Names(ModuleType):
    """A module in which every name is a class without contents."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})


class StandIn:
    """Finds and makes the modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == ABSENT else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


@contextmanager
def standing_in() -> Iterator[None]:
    finder = StandIn()
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.partition(".")[0] == ABSENT]:
            del sys.modules[name]


if find_spec(ABSENT) is None:
    with standing_in():
        importlib.import_module("timm")
