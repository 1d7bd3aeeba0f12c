"""Factors as the Hopper kernels read them: one product in bfloat16, the scale in it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.hopper.configs import columns_of
from flashbias.attention.packing import Form, Handed
from flashbias.attention.triton.pack import Factors, by_group, packed_pair
from flashbias.attention.triton.scores import READY

__all__ = ["ReadyFactors"]


class ReadyFactors(Factors):
    """Factors that are always packed, since a product in flight cannot be multiplied by 1 / scale.

    float32 factors are packed as everywhere. Of bfloat16 ones phi_q / scale needs two parts, unless the scale is a
    power of two; float16 ones are two parts each.
    """

    @classmethod
    def of(
        cls,
        phi_q: Tensor,
        phi_k: Tensor,
        scale: float,
        dtype: torch.dtype,
        centred: bool,
        handed: Handed | None = None,
    ) -> ReadyFactors:
        """As `Factors.of`."""
        raw_q, raw_k = by_group(phi_q), by_group(phi_k)
        rank = raw_q.shape[-1]
        terms = packing.ready_products(rank, raw_q.dtype, raw_k.dtype, scale, dtype)
        width = columns_of(rank * len(terms))
        form = Form(terms, torch.bfloat16, width, width)
        is_packed = packing.is_packed(raw_q, raw_k, dtype)
        # What is handed over has the form that portable kernels read, which may be the ones of the backward pass.
        is_shared = is_packed and form == packing.form_of(rank, dtype)
        is_centred = centred and is_packed
        tiled = is_centred and packing.is_tile_centred(raw_k.shape[-2], dtype)
        tile = packing.CENTRE_TILE if tiled else raw_k.shape[-2] if is_centred else 0
        # The copy engine knows no stride of 0.
        packed_q, packed_k = packed_pair(
            raw_q, raw_k, scale, form, tile, handed if is_shared else None, every_row=True
        )  # fmt: skip
        return cls(packed_q, packed_k, raw_q, raw_k, rank, len(terms), width, width, READY.value, tiled, scale)
