"""Tile shapes for each pass, measured on an H200; chosen by widths, dtype and GPU, never by the exact length.

The tables hold what won on an H200 (see docs/kernels.md). Other GPUs start from the same shapes and give up
pipeline stages, then tile rows, until the tiles fit into their shared memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from flashbias.attention.layout import next_power_of_2

if TYPE_CHECKING:
    from flashbias.attention.triton.operands import Operands

__all__ = ["SHORT", "WIDEST_SPLIT", "Config", "WalkConfig", "choose", "walk_config"]

SHORT = 64
"""Sequences up to this length are one tile."""

WIDEST_SPLIT = 128
"""Widest heads whose float32 products are made of three in TF32: registers hold two parts of every operand then."""


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
    "dtable": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 8, 2)},
    "window": {64: Config(64, 64, 4, 2)},
}
_HALF_WIDEST = {
    "forward": Config(64, 32, 4, 2),
    "dkdv": Config(32, 64, 8, 2),
    "dq": Config(64, 32, 8, 2),
    "dtable": Config(64, 32, 8, 2),
}
# float32: few rows stream past those that stay, since registers hold two parts of each.
_SINGLE = Config(64, 32, 4, 2)
_SINGLE_DKDV = Config(32, 64, 4, 2)
_SINGLE_WIDEST = Config(16, 16, 8, 2)

_SHORT_FORWARD = Config(64, 64, 4, 1, 80)
"""One tile, so nothing to pipeline: what counts is how many programs fit beside each other."""
_SHARED_DKDV = Config(32, 128, 4, 3)
_NO_BIAS_128 = Config(64, 64, 4, 3)


@dataclass(frozen=True)
class WalkConfig:
    """Of a walk over short windows: a tile's queries and keys, and what the windows of one program are given.

    Warps, windows that are loaded or worked on at once, and programs that a multiprocessor runs beside each other.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int


# Without a cap of registers: windows ahead were worth more than one more program (docs/kernels.md).
_WALK = {"forward": WalkConfig(64, 64, 4, 3, 4), "backward": WalkConfig(64, 64, 4, 3, 2)}


def walk_config(name: str, ops: Operands) -> WalkConfig:
    """Shape a walk over short windows to their length and to the GPU.

    Args:
        name: "forward" or "backward".
        ops: the call.

    Returns:
        The configuration: with fewer stages, or fewer programs beside each other, where shared memory is short.
    """
    config = _WALK[name]
    block_m, block_n = (max(16, next_power_of_2(length)) for length in (ops.seqlen_q, ops.seqlen_k))
    limit = _shared_memory(ops.q.device)
    # In half precision: queries, keys and values of a window, and weights on their way to a product.
    window = 2 * (block_n * (ops.block_d + ops.block_dv) + block_m * ops.block_d)
    if name == "backward":  # the output's gradient, the log-sum-exp and its gradient
        window += block_m * (2 * ops.block_dv + 8)
    weights = 2 * block_m * block_n
    stages = max(1, min(config.num_stages, (limit - weights) // window))
    resident = max(1, min(config.resident, limit // (stages * window + weights)))
    return replace(config, block_m=block_m, block_n=block_n, num_stages=stages, resident=resident)


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
    block_r = 0 if ops.factors is None else ops.factors.block_r
    traits = Traits(
        ops.block_d, ops.block_dv, block_r, ops.max_seqlen_q, ops.max_seqlen_k, ops.sharing_k.members > 1,
        ops.is_half, ops.has_extras,
    )  # fmt: skip
    return _chosen(name, traits, ops.q.device)


class Traits(NamedTuple):
    """What the choice depends on: widths as held (0: no factors), lengths, what is shared, and what kind of call."""

    block_d: int
    block_dv: int
    block_r: int
    max_seqlen_q: int
    max_seqlen_k: int
    shares_keys: bool
    is_half: bool
    has_extras: bool


@functools.lru_cache(maxsize=1024)
def _chosen(name: str, traits: Traits, device: torch.device) -> Config:
    return _fitted(name, _best(name, traits), traits, _shared_memory(device), _stages_stay(device))


def _best(name: str, ops: Traits) -> Config:
    width = max(ops.block_d, ops.block_dv)
    if name == "forward" and ops.max_seqlen_q <= 16:
        return DECODE if width <= 128 and ops.is_half else replace(DECODE, block_n=16, num_stages=2)
    if not ops.is_half and width > WIDEST_SPLIT:
        return _SINGLE_WIDEST
    if not ops.is_half:
        return _SINGLE_DKDV if name == "dkdv" else _SINGLE
    if name == "forward" and max(ops.max_seqlen_q, ops.max_seqlen_k) <= SHORT and width <= 64:
        return replace(_SHORT_FORWARD, maxnreg=128) if ops.has_extras or width > 32 else _SHORT_FORWARD
    if name == "forward" and ops.block_r == 0 and 64 < width <= 128:
        return _NO_BIAS_128
    if name == "dkdv" and ops.shares_keys and width <= 32 and ops.block_r > 0:
        return _SHARED_DKDV
    config = _lookup(_HALF[name], width) or _HALF_WIDEST[name]
    # What adds to a score beside the factors needs registers of its own.
    return replace(config, maxnreg=None) if ops.has_extras else config


def _lookup(table: dict[int, Config], width: int) -> Config | None:
    return next((config for limit, config in table.items() if width <= limit), None)


def _fitted(name: str, config: Config, ops: Traits, limit: int, stages_stay: bool) -> Config:
    """Give up stages, then streamed rows, then resident rows, until the tiles fit into shared memory."""
    keys_stay = name == "dkdv"
    count = functools.partial(_bytes_of_members, stages_stay) if name == "dtable" else _bytes
    resident, streamed = (config.block_n, config.block_m) if keys_stay else (config.block_m, config.block_n)
    stages = config.num_stages
    while stages > 2 and count(resident, streamed, stages, ops) > limit:
        stages -= 1
    while streamed > 16 and count(resident, streamed, stages, ops) > limit:
        streamed //= 2
    while resident > 16 and count(resident, streamed, stages, ops) > limit:
        resident //= 2
    block_m, block_n = (streamed, resident) if keys_stay else (resident, streamed)
    return replace(config, block_m=block_m, block_n=block_n, num_stages=stages)


def _bytes(resident: int, streamed: int, stages: int, ops: Traits) -> int:
    """Shared memory of a program, counted generously: rows that stay, in float32 two parts of each, and that stream."""
    columns = ops.block_d + ops.block_dv + ops.block_r
    if ops.is_half:
        return 2 * columns * (resident + stages * streamed)
    return 4 * columns * (2 * resident + stages * streamed)


def _bytes_of_members(stages_stay: bool, block_m: int, block_n: int, stages: int, ops: Traits) -> int:
    """Of a tile that stays while the rows of one member after the other stream past, and of one more in their dtype."""
    if not ops.is_half:
        return _bytes(block_m, block_n, stages, ops)
    columns = ops.block_d + ops.block_dv + ops.block_r
    in_flight = stages if stages_stay else max(1, stages - 1)
    return 2 * (columns * in_flight * (block_m + block_n) + block_m * block_n)


@functools.cache
def _stages_stay(device: torch.device) -> bool:
    """Whether products read shared memory, so that rows stay there while others arrive, in place of registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 96 * 1024)
