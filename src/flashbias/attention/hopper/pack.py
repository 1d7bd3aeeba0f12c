"""Factors as the Hopper kernels read them: one product in bfloat16, the scale in it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.hopper.configs import columns_of
from flashbias.attention.triton.pack import Factors, by_group, packed_pair
from flashbias.attention.triton.primitives import READY

__all__ = ["ReadyFactors"]


class ReadyFactors(Factors):
    """Factors that are always packed, since a product in flight cannot be multiplied by 1 / scale.

    float32 factors are packed as everywhere. Of bfloat16 ones phi_q / scale needs two parts, unless the scale is a
    power of two; float16 ones are two parts each.
    """

    @classmethod
    def of(cls, phi_q: Tensor, phi_k: Tensor, scale: float, dtype: torch.dtype, centred: bool) -> ReadyFactors:
        """As `Factors.of`."""
        raw_q, raw_k = by_group(phi_q), by_group(phi_k)
        rank = raw_q.shape[-1]
        terms = packing.ready_products(rank, raw_q.dtype, raw_k.dtype, scale, dtype)
        centre = centred and packing.is_packed(raw_q, raw_k, dtype)
        width = columns_of(rank * len(terms))
        tile = raw_k.shape[-2] if centre else 0
        packed_q, packed_k = packed_pair(raw_q, raw_k, scale, terms, torch.bfloat16, width, tile)
        return cls(
            packed_q.contiguous(), packed_k, raw_q, raw_k, rank, len(terms), width, width, READY.value, False, scale
        )
