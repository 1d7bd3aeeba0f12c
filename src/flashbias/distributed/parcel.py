"""Several tensors in one message: one buffer of bytes, each tensor a view of its part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.distributed.traffic import ALIGNMENT

__all__ = ["Parcel"]


@dataclass(frozen=True)
class Parcel:
    """Shapes and dtypes of the tensors in a message.

    Args:
        shapes: one for each tensor.
        dtypes: likewise.

    Examples:
        >>> import torch
        >>> parcel = Parcel.like([torch.arange(3), torch.ones(2, 2)])
        >>> parcel.unpack(parcel.pack([torch.arange(3), torch.ones(2, 2)]))[1].shape
        torch.Size([2, 2])
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def like(cls, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Parcel:
        """A parcel for such tensors, all of one dtype if it is given."""
        return cls(tuple(tuple(x.shape) for x in tensors), tuple(dtype or x.dtype for x in tensors))

    @property
    def offsets(self) -> list[int]:
        """Where each tensor begins, and last the size of the whole."""
        offsets = [0]
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = offsets[-1] + math.prod(shape) * dtype.itemsize
            offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        return offsets

    @property
    def nbytes(self) -> int:
        """Size of the message."""
        return self.offsets[-1]

    def empty(self, device: torch.device) -> Tensor:
        """A buffer for the message. It is never empty: an empty message would be left out by some backends."""
        return torch.empty(max(self.nbytes, ALIGNMENT), dtype=torch.uint8, device=device)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy tensors into a new buffer."""
        buffer = self.empty(tensors[0].device)
        for view, x in zip(self.unpack(buffer), tensors, strict=True):
            view.copy_(x)
        return buffer

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer, as views of it."""
        return [
            buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for shape, dtype, start in zip(self.shapes, self.dtypes, self.offsets, strict=False)
        ]
