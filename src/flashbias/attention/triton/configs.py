"""Tile shapes for each pass, measured on an H200; chosen by widths, dtype and GPU, never by the exact length.

The tables hold what won on an H200 (see docs/kernels.md). Other GPUs start from the same shapes and give up
pipeline stages, then tile rows, until the tiles fit into their shared memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flashbias.attention.triton.operands import Operands

__all__ = ["Config", "choose"]

SHORT = 64
"""Sequences up to this length are one tile."""


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, depth of its load pipeline, registers of a thread at most."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


INTERPRETER = Config(32, 32, 4, 1)
"""Under the interpreter: large enough to be quick, small enough that short tests see several tiles."""

DECODE = Config(16, 64, 4, 3)
"""A few queries against many keys, split over programs."""

# head_dim up to -> half precision. Narrow heads want many programs beside each other, so registers are capped;
# wide ones want wide tiles.
_HALF = {
    "forward": {32: Config(64, 64, 4, 3, 80), 64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3)},
    "dkdv": {
        16: Config(128, 64, 4, 2),
        32: Config(64, 64, 4, 3),
        64: Config(128, 64, 4, 2),
        128: Config(64, 64, 4, 2),
    },
    "dq": {32: Config(64, 64, 4, 3, 128), 64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3)},
    "dtable": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2)},
    "window": {64: Config(64, 64, 4, 2, 168)},
}
_HALF_WIDEST = {
    "forward": Config(64, 32, 4, 2),
    "dkdv": Config(32, 64, 8, 2),
    "dq": Config(64, 32, 8, 2),
    "dtable": Config(64, 32, 8, 2),
}
# float32 products are made of three in TF32; tiles of fewer than 64 rows take the older matrix instructions, which
# need no transposed copies of float32 operands.
_SINGLE = {64: Config(64, 64, 4, 2), 128: Config(32, 32, 4, 2)}
_SINGLE_WIDEST = Config(16, 16, 8, 2)

_SHORT_FORWARD = Config(64, 64, 4, 1, 128)
"""One tile, so nothing to pipeline: the only place where a single stage is safe (see `_fitted`)."""
_SHARED_DKDV = Config(32, 64, 4, 3, 128)
_NO_BIAS_128 = Config(64, 64, 4, 3)


def choose(name: str, ops: Operands) -> Config:
    """Pick the tile shape of a pass.

    Args:
        name: "forward", "dkdv", "dq", "dtable" or "window".
        ops: the call.

    Returns:
        The configuration, made to fit the GPU.
    """
    if ops.q.device.type == "cpu":
        return INTERPRETER
    return _fitted(_best(name, ops), ops)


def _best(name: str, ops: Operands) -> Config:
    width = max(ops.block_d, ops.block_dv)
    if name == "forward" and ops.max_seqlen_q <= 16:
        return DECODE if width <= 128 and ops.is_half else replace(DECODE, block_n=16, num_stages=2)
    if not ops.is_half:
        return _lookup(_SINGLE, width) or _SINGLE_WIDEST
    if name == "forward" and max(ops.max_seqlen_q, ops.max_seqlen_k) <= SHORT and width <= 64:
        return _SHORT_FORWARD
    if name == "forward" and ops.factors is None and 64 < width <= 128:
        return _NO_BIAS_128
    if name == "dkdv" and ops.sharing_k.members > 1 and width <= 32 and ops.factors is not None:
        return _SHARED_DKDV
    config = _lookup(_HALF[name], width) or _HALF_WIDEST[name]
    # What adds to a score beside the factors needs registers of its own.
    return replace(config, maxnreg=None) if ops.has_extras else config


def _lookup(table: dict[int, Config], width: int) -> Config | None:
    return next((config for limit, config in table.items() if width <= limit), None)


def _fitted(config: Config, ops: Operands) -> Config:
    """Give up stages, then rows, until the tiles fit into shared memory.

    Two stages are kept: with one, Triton 3.6 lets a tile be overwritten while products still read it.
    """
    limit = _shared_memory(ops.q.device)
    while _bytes(config, ops) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        else:
            break
    return config


def _bytes(config: Config, ops: Operands) -> int:
    """Shared memory of a program, counted generously: resident rows, and streamed rows once for each stage."""
    block_r = 0 if ops.factors is None else ops.factors.block_r
    row = (ops.block_d + ops.block_dv + block_r) * (2 if ops.is_half else 8)
    return row * (config.block_m + config.num_stages * config.block_n)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 96 * 1024)
