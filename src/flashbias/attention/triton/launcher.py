"""Launches of kernels that have been compiled before, without all of Triton's questions.

Triton makes a key of everything that a kernel might be specialised on, layouts in shared memory among it, and hashes
that at every launch: for the eighty arguments of a kernel for Hopper the host works longer on it than on all the rest
of the launch. Here the key has what can differ between calls from one place in our code; by it the compiled kernel is
found and launched through its own interface. What has not been compiled yet goes through Triton.
"""

# Triton's own code has no annotations that say what it is.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

__all__ = ["start"]

ALIGNMENT = 16
"""Triton compiles anew for addresses, and for numbers, that are multiples of it."""

INT32 = 2**31
"""Whole numbers from here on are passed in 64 bits."""

MOST_KEYS = 4096
"""Keys that are kept: a kind may name lengths, and lengths may be new in every call."""

_compiled: dict[Hashable, CompiledKernel] = {}
_parameters: dict[int, _Parameters] = {}


class _Parameters(NamedTuple):
    """A kernel, and its parameters: all names, places of constants, of what it is specialised on, and of plain ones."""

    kernel: JITFunction
    names: tuple[str, ...]
    constants: tuple[int, ...]
    specialised: tuple[int, ...]
    plain: tuple[int, ...]

    @classmethod
    def of(cls, kernel: JITFunction) -> _Parameters:
        """As Triton knows them."""
        places = {
            kind: tuple(place for place, p in enumerate(kernel.params) if kind == (p.is_constexpr, p.do_not_specialize))
            for kind in ((False, False), (False, True))
        }
        constants = tuple(place for place, p in enumerate(kernel.params) if p.is_constexpr)
        return cls(kernel, tuple(p.name for p in kernel.params), constants, *places.values())


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, kind: Hashable = None, **named: Any) -> None:
    """Launch a kernel: what `kernel[grid](*arguments, **named)` does, in a fraction of the host's time.

    Args:
        kernel: a function of `triton.jit` or Gluon's; whatever else takes a grid and arguments is just called.
        grid: programs, in up to three dimensions.
        arguments: of the kernel, from its first parameter on.
        kind: whatever decides constants and options; default: these themselves.
        named: the kernel's other arguments, and options such as `num_warps`.
    """
    if not isinstance(kernel, JITFunction) or torch.version.hip is not None:
        kernel[grid](*arguments, **named)
        return
    parameters = _parameters.get(id(kernel))
    if parameters is None:
        parameters = _parameters[id(kernel)] = _Parameters.of(kernel)
    values = [*arguments, *map(named.__getitem__, parameters.names[len(arguments) :])]
    if kind is None:
        kind = _kind(parameters, values, named)
    key = (id(kernel), driver.active.get_current_device(), kind, *_forms(parameters, values))
    found = _compiled.get(key)
    if found is not None:
        found[(*grid, 1, 1)[:3]](*values)
        return
    made = kernel[grid](*arguments, **named)
    if isinstance(made, CompiledKernel):
        if len(_compiled) >= MOST_KEYS:
            _compiled.clear()
        _compiled[key] = made


def _kind(parameters: _Parameters, values: list[Any], named: dict[str, Any]) -> Hashable:
    """Constants and options themselves."""
    options = named.keys() - parameters.names
    return frozenset([(name, named[name]) for name in options]), *[values[place] for place in parameters.constants]


def _forms(parameters: _Parameters, values: list[Any]) -> list[Hashable]:
    """What Triton specialises on of all that is no constant."""
    forms = [_form(place, values[place], is_specialised=True) for place in parameters.specialised]
    plain = [values[place] for place in parameters.plain]
    # Whole numbers that it does not look at, all of 32 bits: what most kernels have most of.
    if set(map(type, plain)) - {int} or (plain and not -INT32 <= min(plain) <= max(plain) < INT32):
        forms += [_form(place, values[place], is_specialised=False) for place in parameters.plain]
    return forms


def _form(place: int, x: Any, *, is_specialised: bool) -> Hashable:
    """What Triton specialises on of one argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % ALIGNMENT == 0
    if type(x) is int:
        size = "int32" if -INT32 <= x < INT32 else "int64"
        return (place, size, x == 1, x % ALIGNMENT == 0) if is_specialised else (place, size)
    if x is None or isinstance(x, (float, bool)):
        return place, type(x)
    # A descriptor, whose box lies in shared memory as its size and dtype say.
    return (x.base.dtype, *x.block_shape)
