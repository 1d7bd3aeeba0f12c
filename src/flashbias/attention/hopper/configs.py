"""Tile shapes for each pass on Hopper, chosen by widths alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flashbias.attention import packing
from flashbias.attention.layout import cdiv

__all__ = [
    "NARROWEST",
    "ROWS",
    "SLAB",
    "TABLE_KEYS",
    "BackwardConfig",
    "Config",
    "TableConfig",
    "backward_config",
    "columns_of",
    "forward_config",
    "holds_output",
    "ready_columns",
    "table_config",
    "tail_of",
    "width_of",
]

NARROWEST = 16
"""Columns of one instruction of the matrix unit."""

ROWS = 64
"""Queries of a warpgroup, in the backward pass keys: the height of one instruction of the matrix unit."""

SLAB = 64
"""Queries of a step of the backward pass: the height of one instruction, whose sum is a slab of dq (`slabs.py`)."""

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have."""

REGISTERS = {(2, 1): 240, (3, 1): 160, (2, 2): 104}
"""Registers of a thread that computes, by warpgroups that do and programs side by side; the loading warp has 24."""

MAXNREG = {(2, 1): 168, (3, 1): 128, (2, 2): 80}
"""Registers of a thread at the start, where 65,536 are shared by all warps."""

CROWDED = 64
"""Packed columns beside narrow heads at which two small programs side by side were faster than a large one."""

HELD = 64
"""Packed columns of the keys' factors up to which they are held in registers, beside heads of 17 to 32."""

BARRIERS = 1024
"""Bytes set aside for barriers and alignment."""

QUEUE = 512
"""Bytes set aside for telling units that are drawn."""


class Warpgroups:
    """How many registers the warpgroups of a program have."""

    consumers: int
    programs: int

    @property
    def registers(self) -> int:
        """Registers of a thread that computes; the loading warp leaves them the rest."""
        return REGISTERS[self.consumers, self.programs]

    @property
    def maxnreg(self) -> int:
        """Registers of a thread at the start."""
        return MAXNREG[self.consumers, self.programs]


@dataclass(frozen=True)
class Config(Warpgroups):
    """Warpgroups that compute, keys of a tile, tiles of keys and of queries in flight, programs on a multiprocessor.

    Ordered warpgroups issue their products one after the other, so that while one multiplies the others do not.
    """

    consumers: int
    block_n: int
    stages: int
    q_stages: int = 2
    programs: int = 1
    is_ordered: bool = False

    @property
    def block_m(self) -> int:
        """Queries of a program."""
        return ROWS * self.consumers


def forward_config(block_d: int, block_dv: int, block_r: int, has_table: bool = False) -> Config:
    """Pick the tile shape of the forward pass.

    What is held decides: heads that are multiplied in fewer columns (`width_of`) take as much shared memory.

    Args:
        block_d: width of queries and keys as held.
        block_dv: width of values as held.
        block_r: packed columns of the factors, 0 without.
        has_table: whether scores start from entries of a table, whose addresses take registers too.

    Returns:
        The configuration.

    Raises:
        ValueError: nothing fits into shared memory.
    """
    width = max(block_d, block_dv)
    if width > 128:
        # 128 registers of a thread hold sums of the output: scores of 64 keys fit beside them, of 128 they do not.
        # Narrower sums (`chunks.py`) leave room for them, but two stages of 128 keys of 256 columns fill more than the
        # shared memory.
        config = Config(2, 64, 2)
    elif width > 64:
        config = Config(2, 128, 2)
    elif has_table:
        config = Config(3, 64, 3)
    elif width > 32:
        config = Config(3, 128, 2)
    elif block_r != CROWDED:
        config = Config(3, 128, 3, is_ordered=width > 16)
    else:
        config = Config(2, 64, 3, programs=2)
    while config.programs * forward_bytes(config, block_d, block_dv, block_r) > SHARED_MEMORY:
        if config.q_stages > 1:
            config = replace(config, q_stages=1)
        elif config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.block_n > 32:
            config = replace(config, block_n=config.block_n // 2)
        elif config.consumers > 2:
            config = replace(config, consumers=2)
        else:
            raise ValueError(f"widths {block_d}, {block_dv} and {block_r} do not fit into shared memory")
    if config.q_stages == 2:
        return config
    roomy = replace(config, q_stages=2)
    return roomy if forward_bytes(roomy, block_d, block_dv, block_r) <= SHARED_MEMORY else config


def forward_bytes(config: Config, block_d: int, block_dv: int, block_r: int) -> int:
    """Shared memory of a program."""
    queries = config.block_m * config.q_stages * (block_d + block_r)
    if not holds_output(config, block_d, block_dv):
        queries += config.block_m * block_dv
    keys = config.stages * config.block_n * (block_d + block_dv + block_r)
    return 2 * (queries + keys) + BARRIERS


def holds_output(config: Config, block_d: int, block_dv: int) -> bool:
    """Whether the output leaves through the buffer of its queries.

    The other buffer holds the next queries meanwhile; where heads are wide there is none, and they wait.
    """
    return block_dv <= block_d and (config.q_stages > 1 or block_d > 128)


def tail_of(config: Config, seqlen_k: int) -> int:
    """Keys of the last tile where half a tile covers what is left, else 0: as many as any other."""
    half = config.block_n // 2
    return half if half >= NARROWEST and 0 < seqlen_k % config.block_n <= half and seqlen_k > config.block_n else 0


def columns_of(columns: int) -> int:
    """Packed columns as held: a power of two that the matrix unit takes."""
    return max(NARROWEST, 1 << (columns - 1).bit_length())


def width_of(head_dim: int) -> int:
    """Columns of a head that are multiplied: head_dim in whole instructions of the matrix unit; see `chunks.py`."""
    return cdiv(head_dim, NARROWEST) * NARROWEST


def ready_columns(rank: int, dtype_q: torch.dtype, dtype_k: torch.dtype, scale: float, dtype: torch.dtype) -> int:
    """Columns as held of factors that are packed by `packing.ready_products`; arguments as there."""
    return columns_of(rank * len(packing.ready_products(rank, dtype_q, dtype_k, scale, dtype)))


@dataclass(frozen=True)
class BackwardConfig:
    """Warpgroups that compute, each with 64 keys; steps of 64 queries and tiles of keys in flight.

    Heads up to 64 have one warpgroup more, which makes dq: the others wait neither for it nor for each other, and what
    they hold of keys, values and factors in registers the matrix unit does not read from shared memory. Wide heads have
    no registers for that: there the two exchange dS, and each makes half of the columns of dq.

    Args:
        consumers: warpgroups that compute, beside the one that makes dq.
        stages: steps whose queries are in flight.
        kv_stages: tiles whose keys are.
        is_wide: whether heads are too wide for a warpgroup that makes dq.
        holds_phi: whether factors of the keys are held in registers too.
        is_centred: whether phi_k is centred tile by tile: the loading warp then makes the offsets of a tile of keys.
        draws: whether programs draw units one after the other: the loading warp then tells the others which is next.
    """

    consumers: int
    stages: int
    kv_stages: int
    is_wide: bool
    holds_phi: bool = False
    is_centred: bool = False
    draws: bool = False

    @property
    def registers(self) -> int:
        """Registers of a thread that computes."""
        return 240 if self.is_wide else {2: 208, 3: 128}[self.consumers]

    @property
    def producer_registers(self) -> int:
        """Registers of a thread of the loading warp, which makes offsets beside centres by tile."""
        return 40 if self.is_centred and self.consumers > 2 else 24

    @property
    def sum_registers(self) -> int:
        """Registers of a thread that makes dq."""
        return 56 if self.is_centred and self.consumers > 2 else 72

    @property
    def maxnreg(self) -> int:
        """Registers of a thread at the start, where all warpgroups, that of the loading warp too, have as many."""
        return 168 if self.is_wide else {2: 128, 3: 96}[self.consumers]

    def dq_columns(self, block_d: int) -> int:
        """Columns of dq that a warpgroup makes at a time."""
        return block_d // self.consumers if self.is_wide else block_d


def backward_config(
    block_d: int,
    block_dv: int,
    block_r: int,
    block_g: int,
    is_centred: bool = False,
    has_table: bool = False,
    draws: bool = False,
) -> BackwardConfig | None:
    """Pick the tile shape of the fused backward pass; None where there is none.

    Nothing may fit into shared memory; and beside wide values half of the columns of narrow queries would begin in the
    middle of what the copy engine swizzles together.

    Args:
        block_d: width of queries and keys as held.
        block_dv: width of values as held.
        block_r: packed columns of the factors, 0 without.
        block_g: columns of the factors' gradients, 0 where none is needed.
        is_centred: whether phi_k is centred tile by tile.
        has_table: whether scores start from entries of a table, whose addresses take registers too.
        draws: whether programs draw units, as those of packed batches and those whose additions have an order.
    """
    width = max(block_d, block_dv)
    is_wide = width > ROWS
    if is_wide and block_d <= ROWS:
        return None
    config = BackwardConfig(
        # Wider sums of dphi_k, and addresses, leave three warpgroups too few registers.
        consumers=3 if max(width, block_g) <= NARROWEST and not has_table else 2,
        stages=3 if NARROWEST < width <= 32 else 2,
        kv_stages=1 if is_wide else 2,
        is_wide=is_wide,
        holds_phi=NARROWEST < width <= 32 and 0 < block_r <= HELD,
        is_centred=is_centred,
        draws=draws,
    )
    while backward_bytes(config, block_d, block_dv, block_r, block_g) > SHARED_MEMORY:
        if config.stages > 2:
            config = replace(config, stages=2)
        elif config.kv_stages > 1:
            config = replace(config, kv_stages=1)
        elif config.consumers > 2:
            config = replace(config, consumers=2)
        elif config.stages > 1:
            config = replace(config, stages=1)
        else:
            return None
    return config


def backward_bytes(config: BackwardConfig, block_d: int, block_dv: int, block_r: int, block_g: int) -> int:
    """Shared memory of a program."""
    block_n = ROWS * config.consumers
    width = block_d + block_dv + block_r
    halves = block_n * width * config.kv_stages + config.stages * SLAB * width + 2 * block_n * SLAB
    if not config.is_wide:
        halves += block_n * (block_d + block_dv)
    rows = 2  # log-sum-exp and delta
    if config.is_centred:
        halves += block_n * block_g * config.kv_stages
        rows += config.consumers % 2
    singles = SLAB * (2 * config.dq_columns(block_d) + block_g) + block_n * block_g + rows * config.stages * SLAB
    return 2 * halves + 4 * singles + BARRIERS + (QUEUE if config.draws else 0)


TABLE_KEYS = 64
"""Keys of a program that sums the gradient of a table."""


@dataclass(frozen=True)
class TableConfig(Warpgroups):
    """Warpgroups that compute, each with 64 queries, and pairs in flight, of a program that sums a table's gradient."""

    stages: int
    consumers: int = 3
    programs: int = 1

    @property
    def block_m(self) -> int:
        """Queries of a program."""
        return ROWS * self.consumers


def table_config(block_d: int, block_dv: int, block_r: int) -> TableConfig | None:
    """Pick how many pairs are in flight; None where not even two fit into shared memory.

    Args:
        block_d: width of queries and keys as held.
        block_dv: width of values as held.
        block_r: packed columns of the factors, 0 without.
    """
    one = 2 * (3 * ROWS + TABLE_KEYS) * (block_d + block_dv + block_r)
    stages = min(4, (SHARED_MEMORY - BARRIERS) // one)
    return TableConfig(stages) if stages >= 2 else None
