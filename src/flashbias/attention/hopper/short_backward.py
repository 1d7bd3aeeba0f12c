"""Backward pass of short windows on Hopper: as `triton/short_backward.py`, with loads and stores by the copy engine.

P and dS go through shared memory once, from where the matrix unit reads them as they are and transposed.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.hopper import short as hopper_short
from flashbias.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    load,
    mbarrier,
    store,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashbias.attention.hopper.operands import addressable, descriptor, is_addressable, layout_of, matrix
from flashbias.attention.hopper.short import WARPS, _bias, _factor, arguments_of
from flashbias.attention.hopper.tiles import ROWS, exp2, own_index
from flashbias.attention.layout import cdiv, next_power_of_2
from flashbias.attention.triton import short
from flashbias.attention.triton.operands import Operands, multiprocessors
from flashbias.attention.triton.primitives import LOG2E

__all__ = ["fits", "launch"]

PARTS = gl.constexpr(3)
"""bfloat16 numbers whose sum is a float32 one."""


@jit
def _load_window(
    q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, full, stage, b, h, BLOCK: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """Begin to load a window and the gradient of its output."""
    mbarrier.expect(full.index(stage), 4 * BLOCK * (BLOCK_D + BLOCK_DV))
    load(q_desc, [b, h, 0, 0], full.index(stage), q_smem.index(stage))
    load(k_desc, [b, h, 0, 0], full.index(stage), k_smem.index(stage))
    load(do_desc, [b, h, 0, 0], full.index(stage), do_smem.index(stage))
    load(v_desc, [b, h, 0, 0], full.index(stage), v_smem.index(stage))


@jit
def _rows(ptr, row, rows, seqlen_q, other):
    """A number for each query of a window."""
    return gl.load(ptr + row + rows, mask=rows < seqlen_q, other=other)


@jit
def _times_factor(ptr, stride, length, columns, second, IS_FIRST: gl.constexpr, IS_PACKED: gl.constexpr,
                  BLOCK: gl.constexpr, BLOCK_G: gl.constexpr, parts_smem, phi_layout: gl.constexpr,
                  g_layout: gl.constexpr):  # fmt: skip
    """The sum of dS, or (IS_FIRST False) its transpose, times a factor's first part and, if packed, its second."""
    phi = _factor(ptr, stride, length, columns, BLOCK, BLOCK_G, phi_layout)
    acc = gl.zeros([BLOCK, BLOCK_G], gl.float32, g_layout)
    fence_async_shared()
    for part in gl.static_range(PARTS):
        x = parts_smem.index(part)
        if not IS_FIRST:
            x = x.permute((1, 0))
        acc = warpgroup_mma(x, phi, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if IS_PACKED:
        phi = _factor(ptr + second, stride, length, columns - second, BLOCK, BLOCK_G, phi_layout)
        fence_async_shared()
        for part in gl.static_range(PARTS):
            x = parts_smem.index(part)
            if not IS_FIRST:
                x = x.permute((1, 0))
            acc = warpgroup_mma(x, phi, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    return acc


@jit
def _store_gradient(ptr, grad, length, rank, BLOCK: gl.constexpr, BLOCK_G: gl.constexpr, g_layout: gl.constexpr):
    """A part of a factor's gradient."""
    i = gl.arange(0, BLOCK, gl.SliceLayout(1, g_layout))[:, None]
    c = gl.arange(0, BLOCK_G, gl.SliceLayout(0, g_layout))[None, :]
    gl.store(ptr + i * rank + c, grad, mask=(i < length) & (c < rank))


@jit(
    do_not_specialize=[
        "columns", "rank", "half", "num_heads", "group", "seqlen_q", "seqlen_k", "shift", "left", "right", "pq_s1",
        "pq_v2", "pq_s2", "pk_s1", "pk_v2", "pk_s2", "mask_s1", "mask_v2", "mask_s2", "walk_s1", "walk_v2",
        "per_program",
    ]
)  # fmt: skip
def _bwd_short_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc, lse_ptr, dlse_ptr, dphi_q_ptr, dphi_k_ptr, phi_q_ptr,
    phi_k_ptr, table_ptr, code_q_ptr, code_k_ptr, mask_ptr, stride_pqf, stride_pq, stride_pkf, stride_pk, columns,
    stride_table, half, stride_mask_f, stride_mask_m, stride_mask_n, num_heads, group, seqlen_q, seqlen_k, shift, left,
    right, scale, phi_scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, mask_s1, mask_v2, mask_s2, walk_s1, walk_v2,
    per_program, rank, dphi_k_mult, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr,
    HAS_TABLE: gl.constexpr, HAS_CODES: gl.constexpr, HAS_MASK: gl.constexpr, HAS_DLSE: gl.constexpr,
    IS_PACKED: gl.constexpr, STORE_DPHI: gl.constexpr, BLOCK: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr, STAGES: gl.constexpr,
    q_layout: gl.constexpr, v_layout: gl.constexpr, p_layout: gl.constexpr, phi_layout: gl.constexpr,
    parts_layout: gl.constexpr, grad_layout: gl.constexpr,
):  # fmt: skip
    """All gradients of windows that share their bias, one after the other."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    kind: gl.constexpr = q_desc.dtype
    walk = gl.program_id(0)
    first = gl.program_id(1) * per_program
    count = gl.minimum(per_program, walk_s1 - first)
    # All members of a walk are of one head, and equally far from each other.
    h = walk % num_heads
    b_step = walk_v2 // num_heads
    b_zero = (walk // walk_v2) * walk_s1 * b_step + (walk % walk_v2) // num_heads
    b = b_zero + first * b_step
    bh_zero = b_zero * num_heads + h

    q_smem = gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK, BLOCK_DV], v_desc.layout)
    do_smem = gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK, BLOCK_DV], do_desc.layout)
    dq_smem = gl.allocate_shared_memory(kind, [1, 1, BLOCK, BLOCK_D], dq_desc.layout)
    dk_smem = gl.allocate_shared_memory(kind, [1, 1, BLOCK, BLOCK_D], dk_desc.layout)
    dv_smem = gl.allocate_shared_memory(kind, [1, 1, BLOCK, BLOCK_DV], dv_desc.layout)
    p_smem = gl.allocate_shared_memory(kind, [BLOCK, BLOCK], p_layout)
    ds_smem = gl.allocate_shared_memory(kind, [BLOCK, BLOCK], p_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
    fence_async_shared()
    for place in gl.static_range(STAGES):
        if place < count:
            _load_window(q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, full, place,
                         b + place * b_step, h, BLOCK, BLOCK_D, BLOCK_DV)  # fmt: skip
    bias = _bias(
        bh_zero, phi_q_ptr, phi_k_ptr, table_ptr, code_q_ptr, code_k_ptr, mask_ptr, stride_pqf, stride_pq, stride_pkf,
        stride_pk, columns, stride_table, half, stride_mask_f, stride_mask_m, stride_mask_n, num_heads, seqlen_q,
        seqlen_k, shift, left, right, phi_scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, mask_s1, mask_v2, mask_s2,
        HAS_LEFT, HAS_RIGHT, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_MASK, BLOCK, BLOCK, BLOCK_R, phi_layout, phi_layout,
        s_layout,
    )  # fmt: skip
    qk_scale = scale * LOG2E
    rows = gl.arange(0, BLOCK, gl.SliceLayout(1, s_layout))
    ds_sum = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
    nothing_d = gl.zeros([BLOCK, BLOCK_D], gl.float32, d_layout)
    nothing_dv = gl.zeros([BLOCK, BLOCK_DV], gl.float32, dv_layout)
    row = (b.to(gl.int64) * num_heads + h) * seqlen_q
    row_step = b_step.to(gl.int64) * num_heads * seqlen_q
    lse = _rows(lse_ptr, row, rows, seqlen_q, float("-inf"))
    for turn in range(count):
        stage = turn % STAGES
        # Rows that attend to nothing get weights exp2(-inf) = 0.
        lse2 = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        q = q_smem.index(stage)._reinterpret(kind, [BLOCK, BLOCK_D], q_layout)
        k = k_smem.index(stage)._reinterpret(kind, [BLOCK, BLOCK_D], q_layout)
        v = v_smem.index(stage)._reinterpret(kind, [BLOCK, BLOCK_DV], v_layout)
        do = do_smem.index(stage)._reinterpret(kind, [BLOCK, BLOCK_DV], v_layout)
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dlse = lse
        if HAS_DLSE:
            dlse = _rows(dlse_ptr, row, rows, seqlen_q, 0.0)
        row += row_step
        if turn + 1 < count:
            lse = _rows(lse_ptr, row, rows, seqlen_q, float("-inf"))
        s = warpgroup_mma_wait(1, deps=[s])
        p = exp2((s * qk_scale + bias) - lse2[:, None])
        p_smem.store(p.to(kind))
        dp = warpgroup_mma_wait(0, deps=[dp])
        u = p * dp
        total = gl.sum(p, 1)
        delta = gl.sum(u, 1) / gl.where(total == 0.0, 1.0, total)
        if HAS_DLSE:
            delta = delta - dlse
        ds = u - p * delta[:, None]
        ds_smem.store(ds.to(kind))
        if STORE_DPHI:
            ds_sum += ds
        fence_async_shared()
        dv = warpgroup_mma(p_smem.permute((1, 0)), do, nothing_dv, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds_smem.permute((1, 0)), q, nothing_d, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds_smem, k, nothing_d, use_acc=False, is_async=True)
        # The gradients of the window before have left their buffers.
        store_wait(0)
        dv = warpgroup_mma_wait(2, deps=[dv])
        dv_smem._reinterpret(kind, [BLOCK, BLOCK_DV], v_layout).store(dv.to(kind))
        dk = warpgroup_mma_wait(1, deps=[dk])
        dk_smem._reinterpret(kind, [BLOCK, BLOCK_D], q_layout).store((dk * scale).to(kind))
        dq = warpgroup_mma_wait(0, deps=[dq])
        dq_smem._reinterpret(kind, [BLOCK, BLOCK_D], q_layout).store((dq * scale).to(kind))
        fence_async_shared()
        store(dv_desc, [b, h, 0, 0], dv_smem)
        store(dk_desc, [b, h, 0, 0], dk_smem)
        store(dq_desc, [b, h, 0, 0], dq_smem)
        # All warps have met since their last look at this stage.
        if turn + STAGES < count:
            _load_window(q_desc, k_desc, v_desc, do_desc, q_smem, k_smem, v_smem, do_smem, full, stage,
                         b + STAGES * b_step, h, BLOCK, BLOCK_D, BLOCK_DV)  # fmt: skip
        b += b_step
    store_wait(0)
    for place in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(place))

    if STORE_DPHI:
        parts_smem = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BLOCK, BLOCK], parts_layout)
        for part in gl.static_range(PARTS):
            rounded = ds_sum.to(gl.bfloat16)
            parts_smem.index(part).store(rounded)
            ds_sum = ds_sum - rounded.to(gl.float32)
        own_q = phi_q_ptr + own_index(bh_zero, pq_s1, pq_v2, pq_s2).to(gl.int64) * stride_pqf
        own_k = phi_k_ptr + own_index(bh_zero, pk_s1, pk_v2, pk_s2).to(gl.int64) * stride_pkf
        dphi_q = _times_factor(own_k, stride_pk, seqlen_k, columns, rank, True, IS_PACKED, BLOCK, BLOCK_G,
                               parts_smem, grad_layout, g_layout)  # fmt: skip
        dphi_k = _times_factor(own_q, stride_pq, seqlen_q, columns, 2 * rank, False, IS_PACKED, BLOCK, BLOCK_G,
                               parts_smem, grad_layout, g_layout)  # fmt: skip
        part_of = gl.program_id(1).to(gl.int64) * gl.num_programs(0) + walk
        _store_gradient(dphi_q_ptr + part_of * seqlen_q * rank, dphi_q, seqlen_q, rank, BLOCK, BLOCK_G, g_layout)
        _store_gradient(dphi_k_ptr + part_of * seqlen_k * rank, dphi_k * dphi_k_mult, seqlen_k, rank, BLOCK, BLOCK_G,
                        g_layout)  # fmt: skip


def fits(ops: Operands, needs_grad: tuple[bool, ...]) -> bool:
    """Whether `launch` fills all gradients that are needed."""
    if not hopper_short.fits(ops) or ops.group > 1 or needs_grad[5] or not any(needs_grad[:5]):
        return False
    if ops.phi_q is None or ops.phi_k is None:
        return True
    # Sums of dS are taken apart into bfloat16 parts, which want factors of that kind beside them.
    is_bfloat16 = packing.is_packed(ops.phi_q, ops.phi_k, ops.q.dtype) or ops.phi_q.dtype == torch.bfloat16
    return is_bfloat16 and ops.phi_q.shape[-1] <= short.WIDEST


def launch(
    ops: Operands,
    grads: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    needs_grad: tuple[bool, ...],
    *,
    stages: int = 2,
    maxnreg: int | None = None,
    resident: int = 2,
) -> None:
    """Fill the gradients of query, key, value and the factors for a call that `fits`."""
    need_phi = needs_grad[3] or needs_grad[4]
    walk, factors, block = short.walk_of(ops), ops.factors, ROWS.value
    assert walk is not None
    splits = short.splits_of(walk, resident * multiprocessors(ops.q.device))
    sources = [addressable(x) for x in (ops.q, ops.k, ops.v, dout)]
    targets = [_target(ops, grad, x) for grad, x in zip(grads[:3], sources, strict=False)]
    widths = (ops.block_d, ops.block_d, ops.block_dv, ops.block_dv, ops.block_d, ops.block_d, ops.block_dv)
    described = [descriptor(x, block, width) for x, width in zip((*sources, *targets), widths, strict=True)]
    rank = 0 if factors is None else factors.rank
    partials = [
        lse.new_empty((splits, walk.groups, length, rank) if need_phi else (0,))
        for length in (ops.seqlen_q, ops.seqlen_k)
    ]
    block_r, block_g = 16 if factors is None else factors.block_r, max(16, next_power_of_2(rank))
    kind = ops.q.dtype if factors is None else factors.phi_q.dtype
    tensors, numbers, constants = arguments_of(ops)
    _bwd_short_kernel[(walk.groups, splits)](
        *described, lse, None if dlse is None else dlse.contiguous(), *partials, *tensors, *numbers,
        walk.s1, walk.v2, cdiv(walk.members, splits), rank, 1.0 if factors is None else factors.dphi_k_mult,
        **constants,
        HAS_DLSE=dlse is not None, IS_PACKED=factors is not None and factors.terms > 1, STORE_DPHI=need_phi,
        BLOCK=block, BLOCK_D=ops.block_d, BLOCK_DV=ops.block_dv, BLOCK_R=block_r, BLOCK_G=block_g, STAGES=stages,
        q_layout=matrix(described[0]), v_layout=matrix(described[2]), p_layout=layout_of((block, block), ops.q.dtype),
        phi_layout=layout_of((block, block_r), kind), parts_layout=layout_of((block, block), torch.bfloat16),
        grad_layout=layout_of((block, block_g), kind),
        num_warps=WARPS, **({} if maxnreg is None else {"maxnreg": maxnreg}),
    )  # fmt: skip
    for grad, made in zip(grads[:3], targets, strict=True):
        if grad.numel() and ops.flat(grad).data_ptr() != made.data_ptr():
            ops.flat(grad).copy_(made)
    for need, grad, partial, sharing in (
        (needs_grad[3], grads[3], partials[0], ops.sharing_q),
        (needs_grad[4], grads[4], partials[1], ops.sharing_k),
    ):
        if need:
            # Walks of one head each: those that share a factor follow one another.
            own = partial.view(splits, sharing.groups, -1, *partial.shape[2:])
            grad.copy_(own.sum((0, 2)).view(grad.shape))


def _target(ops: Operands, grad: Tensor, like: Tensor) -> Tensor:
    """Where a gradient goes: a tensor of its own where it is not needed, or not as the copy engine writes."""
    flat = ops.flat(grad) if grad.numel() else grad
    return (
        flat if grad.numel() and is_addressable(flat) else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    )
