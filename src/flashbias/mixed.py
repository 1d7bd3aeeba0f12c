"""`MixedBias`: heads in groups, some factored and some dense, for one call of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flashbias.constants import on_device
from flashbias.factored import FactoredBias

__all__ = ["MixedBias"]


@dataclass(frozen=True, eq=False)
class MixedBias:
    """An additive bias whose heads are held in different forms.

    Heads of one layer differ: some have rank 1, some have no low rank at all. Those that are cheaper as a matrix stay
    one, and `attention` hands them to torch's dense kernel; the others go through the factored path.

    Args:
        parts: for each group a `FactoredBias`, or a dense tensor `[*batch, heads of the group, N, M]`.
        heads: for each group the heads that it holds, in the order of its head dimension; every head once. A part whose
            head dimension is 1 is shared by its group.
        report: how it was found and what it promises, optional.

    Raises:
        TypeError: a part is neither a `FactoredBias` nor a floating point tensor.
        ValueError: groups and parts do not fit together, in heads, lengths, batch dimensions or device, or a head is
            missing or named twice.

    Examples:
        >>> import torch, flashbias as fb
        >>> low_rank = fb.FactoredBias(torch.randn(2, 8, 1), torch.randn(2, 8, 1))
        >>> bias = fb.MixedBias((low_rank, torch.randn(1, 8, 8)), heads=((0, 2), (1,)))
        >>> q = k = v = torch.randn(1, 3, 8, 4)
        >>> out = fb.attention(q, k, v, bias)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.dense())
        >>> torch.allclose(out, dense, atol=1e-6)
        True
    """

    parts: tuple[FactoredBias | Tensor, ...]
    heads: tuple[tuple[int, ...], ...]
    report: Any = None

    def __post_init__(self) -> None:
        """Check that every head is held once, and that lengths agree."""
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "heads", tuple(tuple(int(h) for h in group) for group in self.heads))
        if len(self.parts) != len(self.heads) or not self.parts:
            raise ValueError(f"parts and heads must have one entry per group, got {len(self.parts)} and {self.heads}")
        for part, group in zip(self.parts, self.heads, strict=True):
            _check_part(part, group)
        named = sorted(h for group in self.heads for h in group)
        if named != list(range(len(named))):
            raise ValueError(f"heads must name each of 0 … {len(named) - 1} once, got {self.heads}")
        lengths = {tuple(_shape(part)[-2:]) for part in self.parts}
        if len(lengths) > 1:
            raise ValueError(f"parts must have the same N and M, got {sorted(lengths)}")
        batches = [tuple(_shape(part)[:-3]) for part in self.parts]
        try:
            torch.broadcast_shapes(*batches)
        except RuntimeError:
            raise ValueError(f"batch dimensions of parts {batches} do not broadcast: each must be equal or 1") from None
        devices = {str(part.device) for part in self.parts}
        if len(devices) > 1:
            raise ValueError(f"parts must be on one device, got {sorted(devices)}")

    @property
    def num_heads(self) -> int:
        """Number of heads, H."""
        return sum(len(group) for group in self.heads)

    @property
    def shape(self) -> torch.Size:
        """Shape `[*batch, H, N, M]` of the whole bias."""
        batch = torch.broadcast_shapes(*(_shape(part)[:-3] for part in self.parts))
        return torch.Size((*batch, self.num_heads, *_shape(self.parts[0])[-2:]))

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes held by all parts."""
        return sum(part.nbytes for part in self.parts)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Form the N×M matrix of every head, `[*batch, H, N, M]`. For tests and small sizes only."""
        batch = self.shape[:-3]
        matrices = []
        for part, group in zip(self.parts, self.heads, strict=True):
            matrix = part.dense(dtype) if isinstance(part, FactoredBias) else part
            matrices.append(matrix.expand(*batch, len(group), *matrix.shape[-2:]))
        common = dtype or reduce(torch.promote_types, (m.dtype for m in matrices))
        return torch.cat([m.to(common) for m in matrices], dim=-3).index_select(-3, self.order())

    def order(self) -> Tensor:
        """`[H]`: where each head stands when the groups are laid one after the other."""
        laid = [h for group in self.heads for h in group]
        return on_device(tuple(sorted(range(len(laid)), key=laid.__getitem__)), self.device)

    def to(self, *args: Any, **kwargs: Any) -> MixedBias:
        """Move or cast like `Tensor.to`."""
        return replace(self, parts=tuple(part.to(*args, **kwargs) for part in self.parts))

    def detach(self) -> MixedBias:
        """The same values, cut from the autograd graph."""
        return replace(self, parts=tuple(part.detach() for part in self.parts))

    def __repr__(self) -> str:
        """Groups and their forms, never values."""
        groups = ", ".join(
            f"{list(group)}: {part!r}" if isinstance(part, FactoredBias) else f"{list(group)}: dense {part.dtype}"
            for part, group in zip(self.parts, self.heads, strict=True)
        )
        return f"MixedBias(shape={tuple(self.shape)}, {groups})"


def _shape(part: FactoredBias | Tensor) -> torch.Size:
    return part.shape


def _check_part(part: object, group: Sequence[int]) -> None:
    if isinstance(part, FactoredBias):
        heads = part.num_heads
    elif isinstance(part, Tensor) and part.is_floating_point():
        if part.dim() < 3:
            raise ValueError(f"a dense part must be [*batch, heads, N, M], got shape {tuple(part.shape)}")
        heads = part.shape[-3]
    else:
        found = part.dtype if isinstance(part, Tensor) else type(part)
        raise TypeError(f"parts must be FactoredBias or floating point tensors, got {found}")
    if not group or heads not in (1, len(group)):
        raise ValueError(f"a part of {heads} heads cannot serve the group {tuple(group)}")


def _flatten(bias: MixedBias) -> tuple[list[Any], tuple[tuple[int, ...], ...]]:
    return list(bias.parts), bias.heads


def _unflatten(parts: Any, heads: tuple[tuple[int, ...], ...]) -> MixedBias:
    """Rebuild without checks: a transform may have put placeholders into the leaves."""
    bias = object.__new__(MixedBias)
    for name, value in (("parts", tuple(parts)), ("heads", heads), ("report", None)):
        object.__setattr__(bias, name, value)
    return bias


pytree.register_pytree_node(MixedBias, _flatten, _unflatten, serialized_type_name="flashbias.MixedBias")
