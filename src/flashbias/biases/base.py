"""`Bias`: what every bias family is, and the registry in which all of them are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from flashbias.factored import FactoredBias

__all__ = [
    "About",
    "Bias",
    "Example",
    "check_positions",
    "checked_sides",
    "position_codes",
    "query_weight",
    "registry",
    "wide_dtype",
]


@dataclass(frozen=True)
class About:
    """What a family declares about itself; documentation, command line and tests read it from here.

    Args:
        title: title of the paper that the bias comes from.
        url: where to read it.
        formula: the dense `b[h, i, j]`, as text.
        rank: width of the factors, as text; a family may depend on its input.
        exactness: one sentence: how far the factors are from the formula.
        bound: the same as a number: `|factored - formula| <= bound * (|phi_q| |phi_k|^T + |table|)` holds
            for each entry in float32; 0 means equal to the bit.
    """

    title: str
    url: str
    formula: str
    rank: str
    exactness: str
    bound: float


@dataclass(frozen=True)
class Example:
    """A small configuration of a family together with its formula, written down independently.

    The contract tests run over the examples of every registered family.

    Args:
        name: short and unique within the family.
        bias: the module.
        seqlen_q: N.
        seqlen_k: M.
        build: `build(bias, queries, keys, *inputs)` calls the module for a `range` of queries and of keys.
        dense: `dense(bias, *inputs)`, the formula in float64, `[*batch, H or 1, N, M]`; it must not touch
            the factors.
        inputs: floating point tensors to which gradients flow (coordinates, weights).
    """

    name: str
    bias: Bias
    seqlen_q: int
    seqlen_k: int
    build: Callable[..., FactoredBias]
    dense: Callable[..., Tensor]
    inputs: tuple[Tensor, ...] = ()

    def factored(
        self,
        queries: range | None = None,
        keys: range | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> FactoredBias:
        """Call the module for a range of queries and keys (default all) and for inputs (default its own)."""
        queries = range(self.seqlen_q) if queries is None else queries
        keys = range(self.seqlen_k) if keys is None else keys
        return self.build(self.bias, queries, keys, *(self.inputs if inputs is None else inputs))

    def formula(self, inputs: Sequence[Tensor] | None = None) -> Tensor:
        """The dense bias in float64, from the formula alone."""
        return self.dense(self.bias, *(self.inputs if inputs is None else inputs))


_REGISTRY: dict[str, type[Bias]] = {}


def registry() -> dict[str, type[Bias]]:
    """Return every bias family by its class name.

    Modules of this package are imported first, so a new file is found without being named anywhere.
    Families that are defined elsewhere are in it as soon as their class exists.

    Returns:
        A new dictionary, sorted by name.

    Examples:
        >>> import flashbias as fb
        >>> fb.biases.registry()["Alibi"] is fb.Alibi
        True
    """
    package = importlib.import_module(__package__ or "flashbias.biases")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


class Bias(nn.Module):
    """A bias family: a module whose call turns positions, coordinates or features into a `FactoredBias`.

    A subclass declares `about`, an `About`, and `examples()`; it is then registered under its class name.
    A class that is no family of its own says `class Name(Bias, register=False)`.

    Args:
        num_heads: number of attention heads, H.

    Raises:
        TypeError: a subclass is to be registered and lacks `about` or `examples`.
        ValueError: `num_heads` is not positive, or the name belongs to another family.
    """

    about: ClassVar[About]

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        """Put the family into the registry."""
        super().__init_subclass__(**kwargs)
        if not register:
            return
        for name, kind in (("about", About), ("examples", classmethod)):
            if not isinstance(cls.__dict__.get(name), kind):
                raise TypeError(
                    f"{cls.__name__} must declare {name!r} (a {kind.__name__}), "
                    f"or be defined as class {cls.__name__}(..., register=False)"
                )
        known = _REGISTRY.get(cls.__name__)
        if known is not None and known.__module__ != cls.__module__:
            raise ValueError(f"a bias named {cls.__name__} is already registered, by {known.__module__}")
        _REGISTRY[cls.__name__] = cls

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads must be a positive integer, got {num_heads!r}")
        self.num_heads = num_heads

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> FactoredBias:
            """Typed, because `nn.Module` leaves it open."""
            ...

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Small configurations, new modules each time, with the formula that each must equal."""
        raise NotImplementedError(f"{cls.__name__} declares no examples")

    def register_constant(self, name: str, values: Tensor) -> None:
        """Keep float64 numbers that move with the module to a device but never to another dtype.

        They are held as a buffer of their bits: `module.half()` rounds floating point buffers, and a rounded
        slope or frequency is wrong at every distant position.
        """
        bits = values.detach().to(torch.float64).contiguous().view(torch.int64)
        self.register_buffer(f"{name}_bits", bits, persistent=False)

    def constant(self, name: str) -> Tensor:
        """Return, in float64, what `register_constant` keeps."""
        return self.get_buffer(f"{name}_bits").view(torch.float64)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}"


# -------------------------------------------------------------------- what families share


def wide_dtype(*tensors: Tensor | float | None) -> torch.dtype:
    """Dtype in which factors are formed: float64 if an input is float64, else float32; never a half."""
    is_double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def position_codes(
    seqlen_q: int,
    seqlen_k: int,
    query_offset: int = 0,
    key_offset: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Codes of a table that is read by relative position.

    Args:
        seqlen_q: N.
        seqlen_k: M.
        query_offset: position of the first query.
        key_offset: position of the first key.
        device: where the codes live.

    Returns:
        `(code_q, code_k)`; `(None, None)`, which stands for plain positions, when the offsets are equal.
    """
    if query_offset == key_offset:
        return None, None
    starts = (query_offset, seqlen_q), (key_offset, seqlen_k)
    code_q, code_k = (torch.arange(first, first + n, dtype=torch.int32, device=device) for first, n in starts)
    return code_q, code_k


def check_positions(**positions: Tensor) -> None:
    """Check that positions are vectors of integers.

    Args:
        **positions: tensors by the names of the arguments that they are.

    Raises:
        TypeError: one is no tensor, or not of integers.
        ValueError: one is no vector.
    """
    for name, position in positions.items():
        if not isinstance(position, Tensor) or position.is_floating_point() or position.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {getattr(position, 'dtype', type(position).__name__)}")
        if position.dim() != 1:
            raise ValueError(f"{name} must be a vector, got shape {tuple(position.shape)}")


def checked_sides(name: str, sides: Sequence[int], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sides of a window or an image as a tuple of integers.

    Args:
        name: of the argument.
        sides: in tokens.
        counts: how many there may be.

    Raises:
        ValueError: another number of them, or one that is no positive integer.
    """
    try:
        found = tuple(index(side) for side in sides)
    except TypeError:  # one number for all sides, or a side that is no integer
        found = ()
    if len(found) not in counts or min(found) < 1:
        raise ValueError(f"{name} must be {' or '.join(map(str, counts))} positive integers, got {sides!r}")
    return found


def query_weight(weight: Tensor | float | None, num_heads: int, seqlen_q: int) -> Tensor | float:
    """Shape a weight so that it multiplies a query-side factor `[*batch, H or 1, N, R]`.

    Args:
        weight: None (1), a number, `[H]`, or one per query, `[*batch, H or 1, N]`.
        num_heads: H.
        seqlen_q: N.

    Returns:
        A number, `[H, 1, 1]` or `[*batch, H or 1, N, 1]`.

    Raises:
        TypeError: `weight` is a tensor of integers, or neither a tensor nor a number.
        ValueError: heads or length do not fit.
    """
    if weight is None:
        return 1.0
    if not isinstance(weight, Tensor):
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"weight must be a tensor, a number or None, got {type(weight).__name__}")
        return float(weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.dim() == 0:
        return weight
    heads = weight.shape[0] if weight.dim() == 1 else weight.shape[-2]
    if heads not in (1, num_heads) or (weight.dim() > 1 and weight.shape[-1] != seqlen_q):
        raise ValueError(
            f"weight must be a scalar, [{num_heads}] or [*batch, {num_heads} or 1, {seqlen_q}], "
            f"got shape {tuple(weight.shape)}"
        )
    return weight[:, None, None] if weight.dim() == 1 else weight[..., None]
