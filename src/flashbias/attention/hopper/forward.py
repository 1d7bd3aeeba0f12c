"""Forward pass for Hopper: deals tiles to the multiprocessors, launches the kernel, joins the parts of those it cut."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
import functools
from typing import Any

import torch

from flashbias.attention.hopper import tiers
from flashbias.attention.hopper.configs import ROWS, Config, forward_config, holds_output, tail_of, width_of
from flashbias.attention.hopper.join import join
from flashbias.attention.hopper.online import _fwd_kernel
from flashbias.attention.hopper.operands import (
    HALF_BYTES,
    HopperOperands,
    Shape,
    descriptor,
    matrix,
    or_nothing,
    packed,
)
from flashbias.attention.hopper.schedule import Band, Schedule, banded, jagged, unbanded
from flashbias.attention.layout import cdiv
from flashbias.attention.triton.assembler import soundly_assembled
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import multiprocessors

__all__ = ["launch"]


@soundly_assembled
def launch(out: torch.Tensor, lse: torch.Tensor, *arguments: Any) -> None:
    """Fill `out` and `lse`, heads of different rank in tiers; the operators share the arguments."""
    tiers.forward(launch_together, out, lse, *arguments)


def launch_together(out: torch.Tensor, lse: torch.Tensor, *arguments: Any) -> None:
    """Fill `out` and `lse` for all heads at once; arguments as in `attention/registration.py`."""
    ops = HopperOperands.of(*arguments)
    launch_as(_config(ops.block_d, ops.block_dv, ops.columns, ops.table is not None), ops, out, lse)


_config = functools.lru_cache(maxsize=256)(forward_config)


def launch_as(config: Config, ops: HopperOperands, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch with a given tile shape."""
    keys, factors = config.block_n, ops.factors
    schedule, numbers, constants = _plan(config, ops.shape, multiprocessors(ops.q.device))
    terms = ops.key_terms(keys)
    counter = torch.zeros(1, dtype=torch.int32, device=lse.device) if ops.is_varlen else None
    out_flat = ops.flat(out)
    described = packed if ops.is_varlen else descriptor
    q = described(ops.q, ROWS, ops.block_d)
    k = described(ops.k, keys, ops.block_d)
    v = described(ops.v, keys, ops.block_dv)
    o = described(out_flat, ROWS, ops.block_dv)
    pq = q if factors is None else descriptor(factors.phi_q, ROWS, ops.columns)
    pk = k if factors is None else descriptor(factors.phi_k, keys, ops.columns)
    parts = parts_lse = lse
    if schedule.is_split:
        parts = lse.new_empty((schedule.units - schedule.whole, config.block_m, ops.block_dv))
        parts_lse = lse.new_empty(parts.shape[:2])
    start(
        _fwd_kernel, (schedule.programs,), q, k, v, o, pq, pk, lse, parts, parts_lse,
        *or_nothing(lse, ops.table_over_scale, ops.code_q, ops.code_k, terms),
        *or_nothing(lse, ops.centring.phi_q, ops.centring.centres, ops.cu_seqlens_q, ops.cu_seqlens_k, counter),
        *numbers, ops.scale, *ops.sharing_q.sizes, *ops.sharing_k.sizes, *ops.table_sizes,
        0 if terms is None else terms.stride(0), *ops.sharing_mask.sizes, *ops.centring.sizes,
        q_layout=matrix(q), k_layout=matrix(k), v_layout=matrix(v), pq_layout=matrix(pq), pk_layout=matrix(pk),
        o_layout=matrix(o), kind=(config, ops.shape, ops.q.dtype),
        **constants,
    )  # fmt: skip
    if schedule.is_split:
        join(schedule, parts, parts_lse, out_flat, lse, cdiv(ops.seqlen_q, config.block_m))


@functools.lru_cache(maxsize=1024)
def _plan(config: Config, shape: Shape, processors: int) -> tuple[Schedule, tuple[int, ...], dict[str, Any]]:
    """What a launch needs beside tensors and scale: its schedule, the kernel's numbers, and its constants by name."""
    schedule = schedule_of(config, shape, processors)
    is_packed = shape.sequences > 0
    has_edge = shape.is_banded or shape.hides_keys or is_packed
    is_whole = schedule.is_split or shape.is_banded or shape.centred_rank > 0 or is_packed
    tail = 0 if is_whole else tail_of(config, shape.seqlen_k)
    numbers = (
        schedule.units, schedule.whole, schedule.parts, schedule.part_tiles, schedule.heads,
        shape.sequences or shape.pairs, cdiv(shape.seqlen_q, config.block_m), shape.num_heads, shape.group,
        shape.seqlen_q, shape.seqlen_k, shape.shift, shape.window_left, shape.window_right,
    )  # fmt: skip
    constants = {
        "IS_VARLEN": is_packed,
        "IS_SPLIT": schedule.is_split,
        "ALTERNATES": schedule.alternates,
        "HAS_LEFT": shape.window_left >= 0,
        "HAS_RIGHT": shape.window_right >= 0,
        "HAS_EDGE": has_edge or shape.seqlen_k % (tail or config.block_n) != 0,
        "HAS_PHI": shape.columns > 0,
        "HAS_TABLE": shape.has_table,
        "HAS_CODES": shape.has_codes,
        "HAS_TERMS": shape.hides_keys,
        "RANK": shape.centred_rank,
        "ORDERED": config.is_ordered,
        "CONSUMERS": config.consumers,
        "Q_STAGES": config.q_stages,
        "STAGES": config.stages,
        "TAIL": tail,
        "O_IN_Q": holds_output(config, shape.block_d, shape.block_dv),
        "BLOCK_N": config.block_n,
        "BLOCK_D": shape.block_d,
        "BLOCK_DV": shape.block_dv,
        "BLOCK_R": shape.columns,
        "WIDTH_D": width_of(shape.head_dim),
        "WIDTH_DV": width_of(shape.head_dim_v),
        "REGISTERS": config.registers,
        "num_warps": 4,
        "maxnreg": config.maxnreg,
    }
    return schedule, numbers, constants


def schedule_of(config: Config, shape: Shape, processors: int) -> Schedule:
    """Deal the tiles of a call to the multiprocessors."""
    blocks = cdiv(shape.seqlen_q, config.block_m)
    programs = config.programs * processors
    if shape.sequences > 0:
        return jagged(shape.seqlen_q, shape.sequences, shape.num_heads, config.block_m, programs)
    if not shape.is_banded:
        return unbanded(blocks * shape.pairs, cdiv(shape.seqlen_k, config.block_n), programs)
    band = Band(shape.shift, shape.window_left, shape.window_right)
    pair_bytes = shape.seqlen_k * (shape.head_dim + shape.head_dim_v) * HALF_BYTES
    return banded(
        blocks, shape.pairs, config.block_m, config.block_n, shape.seqlen_k, band, pair_bytes, shape.group, programs
    )
