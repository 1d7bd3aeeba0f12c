"""Forward pass of short windows on Hopper: the copy engine brings window after window, one warpgroup works on each.

As `triton/short.py`, whose derivation it shares: the bias of all windows that a program walks over is made once and
stays in registers. Boxes of the copy engine end where a window ends: rows past it arrive as zeros and are not stored.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from torch import Tensor

from flashbias.attention import packing
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
from flashbias.attention.hopper.operands import addressable, descriptor, layout_of, matrix
from flashbias.attention.hopper.tiles import ROWS, exp2, own_index
from flashbias.attention.layout import cdiv, next_power_of_2
from flashbias.attention.triton import short
from flashbias.attention.triton.operands import Operands, multiprocessors
from flashbias.attention.triton.primitives import LN2, LOG2E, READY

__all__ = ["fits", "launch"]

WARPS = 4
"""One warpgroup: the matrix unit takes 64 queries from it."""


@jit
def _load_window(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, full, stage, b, h, h_k, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """Begin to load a window."""
    mbarrier.expect(full.index(stage), 2 * (BLOCK_M * BLOCK_D + BLOCK_N * BLOCK_D + BLOCK_N * BLOCK_DV))
    load(q_desc, [b, h, 0, 0], full.index(stage), q_smem.index(stage))
    load(k_desc, [b, h_k, 0, 0], full.index(stage), k_smem.index(stage))
    load(v_desc, [b, h_k, 0, 0], full.index(stage), v_smem.index(stage))


@jit
def _factor(ptr, stride, length, columns, ROWS_: gl.constexpr, BLOCK_R: gl.constexpr, layout: gl.constexpr):
    """A factor of a window in shared memory, zeros past its end."""
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS_, gl.SliceLayout(1, loads))[:, None]
    cols = gl.arange(0, BLOCK_R, gl.SliceLayout(0, loads))[None, :]
    x = gl.load(ptr + rows * stride + cols, mask=(rows < length) & (cols < columns), other=0.0)
    return gl.allocate_shared_memory(x.dtype, [ROWS_, BLOCK_R], layout, x)


@jit
def _bias(
    bh, phi_q_ptr, phi_k_ptr, table_ptr, code_q_ptr, code_k_ptr, mask_ptr, stride_pqf, stride_pq, stride_pkf, stride_pk,
    columns, stride_table, half, stride_mask_f, stride_mask_m, stride_mask_n, num_heads, seqlen_q, seqlen_k, shift,
    left, right, phi_scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, mask_s1, mask_v2, mask_s2,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr, HAS_TABLE: gl.constexpr,
    HAS_CODES: gl.constexpr, HAS_MASK: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr, pq_layout: gl.constexpr, pk_layout: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """All that is added to a window's scores, in units of log 2; -inf for pairs that are hidden or do not exist."""
    i = gl.arange(0, BLOCK_M, gl.SliceLayout(1, s_layout))
    j = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    bias = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
    if HAS_PHI:
        own_q = phi_q_ptr + own_index(bh, pq_s1, pq_v2, pq_s2).to(gl.int64) * stride_pqf
        own_k = phi_k_ptr + own_index(bh, pk_s1, pk_v2, pk_s2).to(gl.int64) * stride_pkf
        pq = _factor(own_q, stride_pq, seqlen_q, columns, BLOCK_M, BLOCK_R, pq_layout)
        pk = _factor(own_k, stride_pk, seqlen_k, columns, BLOCK_N, BLOCK_R, pk_layout)
        fence_async_shared()
        bias = warpgroup_mma(pq, pk.permute((1, 0)), bias, use_acc=False, is_async=True)
        bias = warpgroup_mma_wait(0, deps=[bias])
        bias = bias * phi_scale
    keep = (i < seqlen_q)[:, None] & (j < seqlen_k)[None, :]
    if HAS_RIGHT:
        keep = keep & (j[None, :] - i[:, None] <= shift + right)
    if HAS_LEFT:
        keep = keep & (j[None, :] - i[:, None] >= shift - left)
    if HAS_TABLE:
        q_code, k_code = i, j
        if HAS_CODES:
            q_code = gl.load(code_q_ptr + i, mask=i < seqlen_q, other=0)
            k_code = gl.load(code_k_ptr + j, mask=j < seqlen_k, other=0)
        entry = gl.minimum(gl.maximum(k_code[None, :] - q_code[:, None], -half), half) + half
        bias = bias + gl.load(table_ptr + (bh % num_heads) * stride_table + entry) * LOG2E
    if HAS_MASK:
        own_mask = mask_ptr + own_index(bh, mask_s1, mask_v2, mask_s2).to(gl.int64) * stride_mask_f
        places = i.to(gl.int64)[:, None] * stride_mask_m + j.to(gl.int64)[None, :] * stride_mask_n
        keep = keep & (gl.load(own_mask + places, mask=keep, other=0) != 0)
    return gl.where(keep, bias, float("-inf"))


@jit(
    do_not_specialize=[
        "columns", "half", "num_heads", "group", "seqlen_q", "seqlen_k", "shift", "left", "right", "pq_s1", "pq_v2",
        "pq_s2", "pk_s1", "pk_v2", "pk_s2", "mask_s1", "mask_v2", "mask_s2", "walk_s1", "walk_v2", "per_program",
    ]
)  # fmt: skip
def _fwd_short_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, phi_q_ptr, phi_k_ptr, table_ptr, code_q_ptr, code_k_ptr, mask_ptr,
    stride_pqf, stride_pq, stride_pkf, stride_pk, columns, stride_table, half, stride_mask_f, stride_mask_m,
    stride_mask_n, num_heads, group, seqlen_q, seqlen_k, shift, left, right, scale, phi_scale, pq_s1, pq_v2, pq_s2,
    pk_s1, pk_v2, pk_s2, mask_s1, mask_v2, mask_s2, walk_s1, walk_v2, per_program, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr, HAS_TABLE: gl.constexpr, HAS_CODES: gl.constexpr,
    HAS_MASK: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr, q_layout: gl.constexpr,
    k_layout: gl.constexpr, v_layout: gl.constexpr, o_layout: gl.constexpr, pq_layout: gl.constexpr,
    pk_layout: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of windows that share their bias, one after the other."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    walk = gl.program_id(0)
    first = gl.program_id(1) * per_program
    count = gl.minimum(per_program, walk_s1 - first)
    # All members of a walk are of one head, and equally far from each other.
    h = walk % num_heads
    h_k = h // group
    b_step = walk_v2 // num_heads
    b_zero = (walk // walk_v2) * walk_s1 * b_step + (walk % walk_v2) // num_heads
    b = b_zero + first * b_step

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, BLOCK_M, BLOCK_DV], o_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
    fence_async_shared()
    for place in gl.static_range(STAGES):
        if place < count:
            _load_window(q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, full, place, b + place * b_step, h, h_k,
                         BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    bias = _bias(
        b_zero * num_heads + h, phi_q_ptr, phi_k_ptr, table_ptr, code_q_ptr, code_k_ptr, mask_ptr, stride_pqf,
        stride_pq, stride_pkf, stride_pk, columns, stride_table, half, stride_mask_f, stride_mask_m, stride_mask_n,
        num_heads, seqlen_q, seqlen_k, shift, left, right, phi_scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2,
        mask_s1, mask_v2, mask_s2, HAS_LEFT, HAS_RIGHT, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_MASK, BLOCK_M, BLOCK_N,
        BLOCK_R, pq_layout, pk_layout, s_layout,
    )  # fmt: skip
    qk_scale = scale * LOG2E
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, s_layout))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
    nothing_v = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, acc_layout)
    for turn in range(count):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        q = q_smem.index(stage)._reinterpret(q_smem.dtype, [BLOCK_M, BLOCK_D], q_layout)
        k = k_smem.index(stage)._reinterpret(k_smem.dtype, [BLOCK_N, BLOCK_D], k_layout)
        v = v_smem.index(stage)._reinterpret(v_smem.dtype, [BLOCK_N, BLOCK_DV], v_layout)
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        t = s * qk_scale + bias
        top = gl.max(t, 1)
        # A row that sees no key has a maximum of -inf; measured from 0 its weights are exp2(-inf) = 0.
        top = gl.where(top == float("-inf"), 0.0, top)
        p = exp2(t - top[:, None])
        total = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, acc_layout, 2))
        acc = warpgroup_mma(weights, v, nothing_v, use_acc=False, is_async=True)
        safe = gl.where(total == 0.0, 1.0, total)
        lse = gl.where(total == 0.0, float("-inf"), (top + gl.log2(safe)) * LN2)
        gl.store(lse_ptr + (b.to(gl.int64) * num_heads + h) * seqlen_q + rows, lse, mask=rows < seqlen_q)
        over = gl.convert_layout(1.0 / safe, gl.SliceLayout(1, acc_layout))
        acc = warpgroup_mma_wait(0, deps=[acc])
        # The output before last has left its half of the buffer.
        store_wait(1)
        half_of = o_smem.index(turn % 2)
        half_of._reinterpret(o_smem.dtype, [BLOCK_M, BLOCK_DV], o_layout).store((acc * over[:, None]).to(o_smem.dtype))
        fence_async_shared()
        store(o_desc, [b, h, 0, 0], half_of)
        # All warps have met since their last look at this stage.
        if turn + STAGES < count:
            _load_window(q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, full, stage, b + STAGES * b_step, h, h_k,
                         BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
        b += b_step
    store_wait(0)


def fits(ops: Operands) -> bool:
    """Whether `launch` takes the call."""
    if not short.fits(ops) or ops.dropout_p > 0 or ops.ranks_per_head is not None:
        return False
    return ops.head_dim % 8 == 0 and ops.head_dim_v % 8 == 0 and held_columns(ops) <= packing.WIDEST_CHUNK


def held_columns(ops: Operands) -> int:
    """Columns of the factors as packed, without packing them."""
    if ops.phi_q is None or ops.phi_k is None:
        return 0
    rank = ops.phi_q.shape[-1]
    is_packed = packing.is_packed(ops.phi_q, ops.phi_k, ops.q.dtype)
    return rank * len(packing.products(rank, ops.q.dtype)) if is_packed else rank


def launch(
    ops: Operands,
    out: Tensor,
    lse: Tensor,
    *,
    stages: int = 2,
    maxnreg: int | None = 128,
    resident: int = 6,
) -> None:
    """Fill `out` (as `[B, H, N, head_dim_v]`) and `lse` for a call that `fits`."""
    walk, factors = short.walk_of(ops), ops.factors
    assert walk is not None
    block_m, block_n = ROWS.value, max(16, next_power_of_2(ops.seqlen_k))
    splits = short.splits_of(walk, resident * multiprocessors(ops.q.device))
    q, k = descriptor(addressable(ops.q), block_m, ops.block_d), descriptor(addressable(ops.k), block_n, ops.block_d)
    v, o = descriptor(addressable(ops.v), block_n, ops.block_dv), descriptor(out, block_m, ops.block_dv)
    block_r = 16 if factors is None else factors.block_r
    kind = ops.q.dtype if factors is None else factors.phi_q.dtype
    tensors, numbers, constants = arguments_of(ops)
    _fwd_short_kernel[(walk.groups, splits)](
        q, k, v, o, lse, *tensors, *numbers, walk.s1, walk.v2, cdiv(walk.members, splits), **constants,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=ops.block_d, BLOCK_DV=ops.block_dv, BLOCK_R=block_r, STAGES=stages,
        q_layout=matrix(q), k_layout=matrix(k), v_layout=matrix(v), o_layout=matrix(o),
        pq_layout=layout_of((block_m, block_r), kind), pk_layout=layout_of((block_n, block_r), kind),
        num_warps=WARPS, **({} if maxnreg is None else {"maxnreg": maxnreg}),
    )  # fmt: skip


def arguments_of(ops: Operands) -> tuple[tuple[Tensor | None, ...], tuple[int | float, ...], dict[str, bool]]:
    """What both passes are told of the bias: its tensors, numbers in the kernels' order, and constants by name."""
    factors = ops.factors
    phi_q, phi_k = (None, None) if factors is None else (factors.phi_q, factors.phi_k)
    steps = (0,) * 5
    if factors is not None:
        steps = (*factors.phi_q.stride()[:2], *factors.phi_k.stride()[:2], factors.columns)
    is_over_scale = factors is not None and factors.mode == READY.value
    named = ops.arguments
    numbers = (
        *steps, named["stride_table"], named["half"], named["stride_mask_f"], named["stride_mask_m"],
        named["stride_mask_n"], ops.num_heads, ops.group, ops.seqlen_q, ops.seqlen_k,
        ops.seqlen_k - ops.seqlen_q if ops.bottom_right else 0, ops.window_left, ops.window_right, ops.scale,
        LOG2E.value * (ops.scale if is_over_scale else 1.0), *ops.sharing_q.sizes, *ops.sharing_k.sizes,
        *ops.sharing_mask.sizes,
    )  # fmt: skip
    constants = {
        "HAS_LEFT": ops.window_left >= 0,
        "HAS_RIGHT": ops.window_right >= 0,
        "HAS_PHI": factors is not None,
        "HAS_TABLE": ops.table is not None,
        "HAS_CODES": ops.code_q is not None,
        "HAS_MASK": ops.mask is not None,
    }
    return (phi_q, phi_k, ops.table, ops.code_q, ops.code_k, ops.mask), numbers, constants
