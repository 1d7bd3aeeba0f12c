"""Backward pass for Hopper: prepares rows and buffers, launches the fused kernel, brings sums to the gradients' dtypes.

The fused kernel adds parts of dq, dphi_q and dphi_k as its programs come to it, or in one order: then it is repeatable
to the bit, and somewhat slower (`order.py`). Wide factors that many (batch, head) pairs share get their gradients from
a kernel of its own (`triton/shared.py`), which has no order; a table gets its own gradient from a kernel that walks
over all that share it (`table.py`), beside few queries, a band of few pairs or centres by tile from the portable one.
What it does not do goes to the portable kernels: heads wider than 128, and values wider than 64 beside queries that are
not; tables beside wide heads or packed batches, short windows, which one tile holds, factors that grouped heads do not
share, gradients of factors beside float16 queries, whose precision bfloat16 operands lack, and beside centres by tile
those of a phi_q that is shared by heads with different phi_k; where there has to be an order, packed batches and
gradients of factors that pairs share too. So does what they do faster (`is_slower`).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
import functools
import math
from typing import Any

import torch
from torch import Tensor

from flashbias.attention.hopper import NARROW_IF_PACKED, slabs, table, tiers
from flashbias.attention.hopper.chunks import half_columns, sum_count
from flashbias.attention.hopper.configs import (
    NARROWEST,
    ROWS,
    SLAB,
    BackwardConfig,
    backward_config,
    columns_of,
    width_of,
)
from flashbias.attention.hopper.fused import _bwd_kernel
from flashbias.attention.hopper.operands import (
    HopperOperands,
    Summable,
    addressable,
    descriptor,
    is_addressable,
    layout_of,
    matrix,
    or_nothing,
    packed,
)
from flashbias.attention.hopper.schedule import Band, Schedule, banded, jagged, ordered
from flashbias.attention.hopper.wide import _bwd_wide_kernel
from flashbias.attention.layout import cdiv
from flashbias.attention.triton import backward as portable
from flashbias.attention.triton import shared, window
from flashbias.attention.triton import table as portable_table
from flashbias.attention.triton.assembler import soundly_assembled
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import flattened, multiprocessors, strides_of

__all__ = ["launch"]

WIDEST_BESIDE = 32
"""Rank up to which each pair's own products for the factors' gradients cost less than a walk of their own."""

WIDEST_ORDERED = 64
"""Width of heads up to which gradients of factors that are added in one order are faster than the portable ones."""

FEWEST_MEMBERS = 8
"""Pairs that share a factor from which on one sum of dS for all of them is cheaper than products for each."""


@soundly_assembled
def launch(*arguments: Any, repeatable: bool = False) -> None:
    """Fill the gradients that are needed, heads of different rank in tiers; arguments as in `launch_together`."""
    tiers.backward(functools.partial(launch_together, repeatable=repeatable), *arguments)


def launch_together(
    grads: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    needs_grad: tuple[bool, ...],
    *arguments: Any,
    repeatable: bool = False,
) -> None:
    """Fill the gradients of all heads at once: arguments of the portable `launch`, and whether there is an order."""
    ops = HopperOperands.of(*arguments)
    config = chosen(ops, needs_grad, repeatable)
    if config is None:
        portable.launch_as(ops.portable(), grads, dout, dlse, out, lse, needs_grad)
    else:
        launch_as(config, ops, grads, dout, dlse, out, lse, needs_grad, repeatable)


def chosen(ops: HopperOperands, needs_grad: tuple[bool, ...], repeatable: bool = False) -> BackwardConfig | None:
    """The fused kernel's tile shape, or None where the portable kernels do the call."""
    needs_phi = needs_grad[3] or needs_grad[4]
    apart = ops.rank > 0 and not _is_one_for_each_group(ops)
    # Of a table's own gradient the fused kernel makes nothing: it would walk in vain where nothing else is needed.
    if ops.has_portable_gradients or not any(needs_grad[:5]):
        return None
    if window.fits(ops, needs_grad) or apart or (needs_phi and ops.q.dtype == torch.float16):
        return None
    if needs_grad[3] and ops.is_tile_centred and not is_summable(ops):
        return None
    block_g = columns_of(ops.rank) if needs_phi and not are_summed_apart(ops) else 0
    if is_slower(ops, block_g, repeatable) or (repeatable and not is_ordered(ops, needs_grad)):
        return None
    return backward_config(
        ops.block_d, ops.block_dv, ops.columns, block_g, ops.is_tile_centred, ops.table is not None,
        draws=ops.is_varlen or repeatable,
    )  # fmt: skip


def is_summable(ops: HopperOperands) -> bool:
    """Whether dphi_q can be summed from one centre: its columns fit, and heads that share phi_q share phi_k."""
    return 2 * ops.rank < NARROWEST and (ops.sharing_k.groups == 1 or ops.sharing_q == ops.sharing_k)


def is_ordered(ops: HopperOperands, needs_grad: tuple[bool, ...]) -> bool:
    """Whether all sums can be made in one order: blocks of one pair wait for each other, pairs do not."""
    needs_phi_q, needs_phi_k = needs_grad[3:5]
    if ops.is_varlen or ((needs_phi_q or needs_phi_k) and are_summed_apart(ops)):
        return False
    return not (needs_phi_q and ops.sharing_q.members > 1) and not (needs_phi_k and ops.sharing_k.members > ops.group)


def are_summed_apart(ops: HopperOperands) -> bool:
    """Whether gradients of factors come from the kernel for wide, shared ones."""
    is_wide = ops.rank > WIDEST_BESIDE and ops.sharing_q.members >= FEWEST_MEMBERS
    # That kernel knows no offsets of tiles, no tables, no masks of the caller's own and no packed batches.
    is_plain = not (ops.is_tile_centred or ops.is_varlen) and ops.table is None and ops.mask is None
    return is_wide and is_plain and shared.is_possible(ops)


def _is_one_for_each_group(ops: HopperOperands) -> bool:
    """Whether all heads that share their keys share phi_k too."""
    s1, v2, s2 = ops.sharing_k.sizes
    return s2 % ops.group == 0 or (v2 * s2 == 1 and s1 % ops.group == 0)


def is_slower(ops: HopperOperands, block_g: int, repeatable: bool = False) -> bool:
    """Whether the portable kernels were faster on an H200, or the fused one was not measured (docs/kernels.md)."""
    if ops.is_varlen and max(ops.head_dim, ops.head_dim_v) <= NARROW_IF_PACKED:
        return True
    width = max(ops.block_d, ops.block_dv)
    if repeatable and block_g > 0 and width > WIDEST_ORDERED:
        return True
    is_middling = NARROWEST < width <= WIDEST_BESIDE
    return block_g > (WIDEST_BESIDE if is_middling else NARROWEST)


@functools.cache
def multiplied(head_dim: int) -> int:
    """Columns of a head that are multiplied: as many as are held where its sums are as wide anyway.

    The chunks of 112 columns took more time, for their registers, than the products that they saved.
    """
    width = width_of(head_dim)
    return width if sum_count(width) > 1 else columns_of(head_dim)


def launch_as(
    config: BackwardConfig,
    ops: HopperOperands,
    grads: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    needs_grad: tuple[bool, ...],
    repeatable: bool = False,
) -> None:
    """Launch the fused kernel with a given tile shape."""
    need_phi_q, need_phi_k = needs_grad[3:5]
    factors = ops.factors
    dout = addressable(flattened(dout))
    lse2, delta = portable.rows_of(ops, dout, dlse, out, lse, SLAB)
    dq_columns = config.dq_columns(ops.block_d)
    dq = _slabs(ops, ops.batch * ops.num_heads, ops.block_d, dq_columns)
    dk, dv = (_target(ops, grad, x) for grad, x in ((grads[1], ops.k), (grads[2], ops.v)))
    rank = ops.rank
    block_g = columns_of(max(rank, 1))
    apart = are_summed_apart(ops)
    sum_q = _sums(factors.phi_q, block_g) if factors is not None and need_phi_q and apart else None
    sum_k = _sums(factors.phi_k, block_g) if factors is not None and need_phi_k else None
    dpq = None
    if factors is not None and need_phi_q and not apart:
        dpq = _slabs(ops, factors.phi_q.shape[0], block_g, block_g)
    dpk = None if apart else sum_k

    boxed = packed if ops.is_varlen else descriptor
    q, do = boxed(ops.q, SLAB, ops.block_d), boxed(dout, SLAB, ops.block_dv)
    k, v = boxed(ops.k, ROWS, ops.block_d), boxed(ops.v, ROWS, ops.block_dv)
    pq = q if factors is None else _boxes_of_factor(ops, factors.phi_q, SLAB, ops.columns)
    pk = k if factors is None else _boxes_of_factor(ops, factors.phi_k, ROWS, ops.columns)
    summable = None
    if config.is_centred and dpq is not None and factors is not None:
        summable = Summable.of(factors.raw_k, ops.q.dtype)
    sum_box = pk if summable is None else descriptor(summable.columns, ROWS, block_g)
    width, width_v = multiplied(ops.head_dim), multiplied(ops.head_dim_v)
    dq_box = slabs.box_of(dq, half_columns(width, ops.block_d, 1) if config.is_wide else dq_columns)
    dpq_box = dq_box if dpq is None else slabs.box_of(dpq, block_g)
    dpk_box = dq_box if dpk is None else _boxes_of_factor(ops, dpk, ROWS, block_g)
    schedule, blocks, pairs = schedule_of(config, ops, repeatable)
    kernel, own = _bwd_wide_kernel, {"DQ_COLUMNS": dq_columns, "WIDTH_D": width, "WIDTH_DV": width_v}
    if not config.is_wide:
        own = {
            "HOLDS_PHI": config.holds_phi, "KV_STAGES": config.kv_stages, "SUM_REGISTERS": config.sum_registers,
            "HAS_IDLE": ops.is_varlen or cdiv(ops.seqlen_k, ROWS) % config.consumers > 0,
            "HAS_TABLE": ops.table is not None, "HAS_CODES": ops.code_q is not None,
        }  # fmt: skip
        codes = or_nothing(lse2, ops.table_over_scale, ops.code_q, ops.code_k)
        own |= dict(zip(("table_ptr", "code_q_ptr", "code_k_ptr"), codes, strict=True))
        own |= dict(zip(("stride_table", "half_table"), ops.table_sizes, strict=True))
        kernel = _bwd_kernel
    terms = ops.tile_terms(ROWS * config.consumers)
    counter = _counter(dq, repeatable) if ops.is_varlen or repeatable else None
    addresses = or_nothing(
        lse2, ops.centring.phi_q, ops.centring.centres, *terms, ops.cu_seqlens_q, ops.cu_seqlens_k, counter
    )
    start(
        kernel, (schedule.programs,), q, k, v, do, pq, pk, sum_box,
        dq_box, boxed(dk, ROWS, ops.block_d), boxed(dv, ROWS, ops.block_dv), dpq_box, dpk_box, lse2, delta, *addresses,
        schedule.units, pairs, schedule.heads, blocks, ops.num_heads, ops.group, dq.shape[1], lse2.shape[-1],
        ops.seqlen_q, ops.seqlen_k, ops.shift, ops.window_left, ops.window_right, ops.scale, *ops.sharing_q.sizes,
        *ops.sharing_k.sizes, *ops.centring.sizes, *ops.sharing_mask.sizes,
        HAS_LEFT=ops.window_left >= 0,
        HAS_RIGHT=ops.window_right >= 0,
        HAS_TAIL=_has_tail(config, ops),
        HAS_TERMS=ops.mask is not None,
        HAS_PHI=factors is not None,
        SUM_DPQ=dpq is not None,
        SUM_DPK=dpk is not None,
        RANK=ops.rank if config.is_centred else 0,
        STAGES=config.stages,
        BLOCK_D=ops.block_d,
        BLOCK_DV=ops.block_dv,
        BLOCK_R=ops.columns,
        BLOCK_G=block_g,
        CONSUMERS=config.consumers,
        ALTERNATES=schedule.alternates,
        IS_VARLEN=ops.is_varlen,
        REPEATABLE=repeatable,
        REGISTERS=config.registers,
        PRODUCER_REGISTERS=config.producer_registers,
        q_layout=matrix(q), k_layout=matrix(k), v_layout=matrix(v), do_layout=matrix(do), pq_layout=matrix(pq),
        pk_layout=matrix(pk), sum_layout=matrix(sum_box), ds_layout=layout_of((ROWS, SLAB), ops.q.dtype),
        dq_layout=slabs.order_of(dq_columns), dpq_layout=slabs.order_of(block_g), dpk_layout=matrix(dpk_box),
        kind=(config, ops.shape, ops.q.dtype, schedule.alternates, block_g, dpq is None, dpk is None, repeatable),
        num_warps=4,
        maxnreg=config.maxnreg,
        **own,
    )  # fmt: skip
    if needs_grad[0]:
        slabs.unfold(dq, ops.flat(grads[0]), ops.scale, ops.cu_seqlens_q)
    for grad, made in ((grads[1], dk), (grads[2], dv)):
        if grad.numel() and ops.flat(grad).data_ptr() != made.data_ptr():
            ops.flat(grad).copy_(made)
    if needs_grad[5]:
        _launch_table(ops, grads[5], dout, dlse, lse2, delta)
    if apart and factors is not None and (need_phi_q or need_phi_k):
        shared.launch(ops, (factors.phi_q, factors.phi_k), (sum_q, sum_k), dout, lse2, delta)
    if dpq is not None:
        _unfold_dphi_q(ops, dpq, summable, grads[3].view(1, dpq.shape[0], -1, rank))
    for grad, sums in ((grads[3], sum_q), (grads[4], sum_k)):
        if sums is not None:
            grad.view(-1, sums.shape[1], rank).copy_(sums[..., :rank])


def _launch_table(
    ops: HopperOperands, grad: Tensor, dout: Tensor, dlse: Tensor | None, lse2: Tensor, delta: Tensor
) -> None:
    """Fill the gradient of the table, by the kernel that can."""
    config = table.fits(ops)
    if config is not None:
        table.launch(config, ops, grad, dout, dlse, lse2, delta)
        return
    rows = {"dout_ptr": dout, "lse_ptr": lse2, "delta_ptr": delta, "stride_lse": lse2.shape[-1]}
    portable_table.launch(ops.portable(), grad, dout, dlse, rows | strides_of("do", dout))


def _unfold_dphi_q(ops: HopperOperands, sums: Tensor, summable: Summable | None, grad: Tensor) -> None:
    """Bring slabs to the gradient `[1, F_q, N, R]`; beside centres by tile they are sums of other columns."""
    if summable is None:
        slabs.unfold(sums, grad, 1.0, ops.cu_seqlens_q)
        return
    columns = sums.new_empty(*grad.shape[:-1], summable.columns.shape[-1])
    slabs.unfold(sums, columns, 1.0)
    grad.copy_(summable.gradient(columns, ops.centring.references(ops.seqlen_q)))


def schedule_of(config: BackwardConfig, ops: HopperOperands, repeatable: bool = False) -> tuple[Schedule, int, int]:
    """Deal the tiles of keys to the multiprocessors.

    Returns:
        The schedule, tiles of keys of one (batch, head of keys) pair, and how many pairs there are; of a packed batch,
        whose lengths the host does not know, a schedule of as many units as there can be, and how many sequences.
    """
    block_n = ROWS * config.consumers
    blocks, pairs = cdiv(ops.seqlen_k, block_n), ops.batch * (ops.num_heads // ops.group)
    programs = multiprocessors(ops.q.device)
    if ops.is_varlen:
        return jagged(ops.seqlen_k, ops.sequences, pairs, block_n, programs), 0, ops.sequences
    pair_bytes = ops.group * ops.seqlen_q * (ops.head_dim + ops.head_dim_v) * ops.q.element_size()
    if repeatable:
        return ordered(blocks, pairs, pair_bytes, programs), blocks, pairs
    if ops.window_left < 0 and ops.window_right < 0:
        units = blocks * pairs
        return Schedule(min(units, programs), units, units), blocks, pairs
    # Keys see queries as queries see keys, with sides exchanged.
    band = Band(-ops.shift, ops.window_right, ops.window_left)
    schedule = banded(blocks, pairs, block_n, SLAB, ops.seqlen_q, band, pair_bytes, 1, programs, last_first=False)
    return schedule, blocks, pairs


def _has_tail(config: BackwardConfig, ops: HopperOperands) -> bool:
    """Whether a tile may pass the end of the keys; beside a mask those past the end have terms of their own."""
    keys = ROWS * config.consumers if config.is_wide else ROWS
    return ops.is_varlen or (ops.mask is None and ops.seqlen_k % keys != 0)


def _counter(dq: Tensor, repeatable: bool) -> Tensor:
    """Zero: how many units have been drawn, and where additions have an order the tickets of all slabs."""
    return dq.new_zeros(1 + (math.prod(dq.shape[:3]) if repeatable else 0), dtype=torch.int32)


def _slabs(ops: HopperOperands, groups: int, width: int, columns: int) -> Tensor:
    """Empty sums over keys."""
    if ops.is_varlen:
        return slabs.packed_zeros(groups, ops.seqlen_q, ops.sequences, width, columns, ops.q.device)
    return slabs.zeros(groups, ops.seqlen_q, width, columns, ops.q.device)


def _boxes_of_factor(ops: HopperOperands, x: Tensor, rows: int, columns: int) -> Any:
    """Describe `[F, N, columns]` to the copy engine; of a packed batch in boxes that end where a sequence ends."""
    return packed(x[None], rows, columns) if ops.is_varlen else descriptor(x, rows, columns)


def _target(ops: HopperOperands, grad: Tensor, x: Tensor) -> Tensor:
    """Where the kernel stores a gradient: itself, or a buffer where it is not needed or not addressable."""
    flat = ops.flat(grad) if grad.numel() else None
    return (
        flat
        if flat is not None and is_addressable(flat)
        else torch.empty_like(x, memory_format=torch.contiguous_format)
    )


def _sums(phi: Tensor, block_g: int) -> Tensor:
    """Zeros to which the gradient of a factor is added, in as many columns as the kernel writes."""
    return phi.new_zeros(*phi.shape[:2], block_g, dtype=torch.float32)
