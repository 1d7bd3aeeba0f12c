"""Gradient of a relative table on Hopper: dS summed in registers over all that read the same entries, then added.

A tile is 192 queries × 64 keys of one table, 64 queries to a warpgroup, and a walk goes over the (batch, head) pairs
that read this table. They have the same entries and the same band, which are made once:

    S = q k^T + phi_q phi_k^T     P = exp2(S scale log2(e) + table log2(e) - lse)     sum += P (dO v^T - delta)

At its end a walk adds its sums to the table's entries, as whole numbers (`triton/fixed_point.py`), so that the
gradient is repeatable. What is added is as many numbers as there are scores in a tile, whose cost is that of many
pairs: so pairs are cut into few parts. A program takes tile after tile, its loading warp ahead with the next pairs.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import functools

from torch import Tensor

from flashbias.attention.hopper.configs import ROWS as _ROWS
from flashbias.attention.hopper.configs import TABLE_KEYS, TableConfig, table_config
from flashbias.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    load,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashbias.attention.hopper.operands import HopperOperands, descriptor, matrix, or_nothing
from flashbias.attention.hopper.scores import entry_of, first_terms, masked, tail_of
from flashbias.attention.hopper.tiles import ROWS, exp2, owner_of
from flashbias.attention.layout import cdiv
from flashbias.attention.triton.fixed_point import FixedPoint
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import multiprocessors
from flashbias.attention.triton.scores import LOG2E

__all__ = ["fits", "launch"]

KEYS = gl.constexpr(TABLE_KEYS)
"""Keys of a program."""

FEWEST_QUERIES = 2 * _ROWS
"""Up to here a tile would have warpgroups without queries; windows of so few are done by the portable kernel."""

FEWEST_PAIRS = 16
"""Of pairs that read a table beside a band: the portable kernel leaves hidden tiles out for less."""

ADDING = 24
"""Pairs whose walk takes as long as what is done once: to look entries up and to add to them.

As none, there are so many parts that it takes up to 26 times as long; as 12, up to 1.3 times; as more, no less time
(docs/kernels.md).
"""


@jit
def _place(unit, deal, band, seqlen_q, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, CONSUMERS: gl.constexpr):
    """First pair of a unit and how many it has, whose table, first query and first key; no pair outside the band.

    Pairs are counted among those that read one table.
    """
    _units, pairs, each, tables, blocks_m, blocks_n = deal
    shift, left, right = band
    start_n = unit % blocks_n * KEYS
    start_m = unit // blocks_n % blocks_m * (ROWS * CONSUMERS)
    rest = unit // (blocks_n * blocks_m)
    first = rest // tables * each
    count = gl.minimum(each, pairs - first)
    if HAS_RIGHT:
        last = gl.minimum(start_m + ROWS * CONSUMERS, seqlen_q) - 1
        count = gl.where(start_n <= last + shift + right, count, 0)
    if HAS_LEFT:
        count = gl.where(start_n + KEYS > start_m + shift - left, count, 0)
    return first, count, rest % tables, start_m, start_n


@jit
def _produce(
    descriptors, buffers, barriers, deal, band, heads, seqlen_q, owners_q, owners_k, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries, keys, values, dO and factors of one pair after the other."""
    width: gl.constexpr = BLOCK_D + BLOCK_DV + (BLOCK_R if HAS_PHI else 0)
    q_desc, do_desc, pq_desc, k_desc, v_desc, pk_desc = descriptors
    q_smem, do_smem, pq_smem, k_smem, v_smem, pk_smem = buffers
    full, empty = barriers
    num_heads, group = heads
    tables = deal[3]
    step = 0
    for unit in range(gl.program_id(0), deal[0], gl.num_programs(0)):
        first, count, own, start_m, start_n = _place(unit, deal, band, seqlen_q, HAS_LEFT, HAS_RIGHT, CONSUMERS)
        for n in range(count):
            bh = (first + n) * tables + own
            b = bh // num_heads
            h = bh % num_heads
            f_q = owner_of(bh, owners_q)
            f_k = owner_of(bh, owners_k)
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * (ROWS * CONSUMERS + KEYS) * width)
            for w in gl.static_range(CONSUMERS):
                place = stage * CONSUMERS + w
                load(q_desc, [b, h, start_m + w * ROWS, 0], full.index(stage), q_smem.index(place))
                load(do_desc, [b, h, start_m + w * ROWS, 0], full.index(stage), do_smem.index(place))
                if HAS_PHI:
                    load(pq_desc, [f_q, start_m + w * ROWS, 0], full.index(stage), pq_smem.index(place))
            load(k_desc, [b, h // group, start_n, 0], full.index(stage), k_smem.index(stage))
            load(v_desc, [b, h // group, start_n, 0], full.index(stage), v_smem.index(stage))
            if HAS_PHI:
                load(pk_desc, [f_k, start_n, 0], full.index(stage), pk_smem.index(stage))
            step += 1


@jit
def _consume(
    w: gl.constexpr, sums, rows, table, codes, terms, buffers, barriers, deal, band, heads, seqlen_q, seqlen_k,
    qk_scale, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_CODES: gl.constexpr, HAS_TERMS: gl.constexpr,
    HAS_PHI: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, q_layout: gl.constexpr, do_layout: gl.constexpr,
    pq_layout: gl.constexpr, k_layout: gl.constexpr, v_layout: gl.constexpr, pk_layout: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: 64 queries of the program's.

    What is the same for all pairs is added behind the products: as what they start from it would be copied for each.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    lse_ptr, delta_ptr, stride_rows = rows
    table_ptr, stride_table, half = table
    code_q_ptr, code_k_ptr = codes
    terms_ptr, stride_terms, owners_terms = terms
    q_smem, do_smem, pq_smem, k_smem, v_smem, pk_smem = buffers
    full, empty = barriers
    shift, left, right = band
    tables = deal[3]
    step = 0
    for unit in range(gl.program_id(0), deal[0], gl.num_programs(0)):
        first, count, own, start, start_n = _place(unit, deal, band, seqlen_q, HAS_LEFT, HAS_RIGHT, CONSUMERS)
        if count > 0:
            start += w * ROWS
            i = start + gl.arange(0, ROWS, of_rows)
            j = start_n + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
            q_code = i
            if HAS_CODES:
                q_code = gl.load(code_q_ptr + i, mask=i < seqlen_q, other=0)
            own_table = table_ptr + own * stride_table + half
            fixed = first_terms(own_table, q_code, code_k_ptr, start, start_n, seqlen_k, half, True, HAS_CODES, True,
                                KEYS, s_layout)  # fmt: skip
            fixed = masked(fixed * LOG2E, start, start_n, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT, KEYS,
                           s_layout)  # fmt: skip
            total = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
            # Rows past the end see nothing.
            inside = i < stride_rows
            row = (first * tables + own).to(gl.int64) * stride_rows + i
            lse = gl.load(lse_ptr + row, mask=inside, other=float("inf"))
            delta = gl.load(delta_ptr + row, mask=inside, other=0.0)
            for n in range(count):
                stage = step % STAGES
                # Those of the next pair, while this one is computed.
                row = (gl.minimum(first + n + 1, first + count - 1) * tables + own).to(gl.int64) * stride_rows + i
                next_lse = gl.load(lse_ptr + row, mask=inside, other=float("inf"))
                next_delta = gl.load(delta_ptr + row, mask=inside, other=0.0)
                shown = j
                if HAS_TERMS:
                    bh = (first + n) * tables + own
                    shown = gl.load(terms_ptr + owner_of(bh, owners_terms).to(gl.int64) * stride_terms + j)
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                place = stage * CONSUMERS + w
                q = q_smem.index(place)._reinterpret(q_smem.dtype, [ROWS, BLOCK_D], q_layout)
                k = k_smem.index(stage)._reinterpret(k_smem.dtype, [KEYS, BLOCK_D], k_layout)
                do = do_smem.index(place)._reinterpret(do_smem.dtype, [ROWS, BLOCK_DV], do_layout)
                v = v_smem.index(stage)._reinterpret(v_smem.dtype, [KEYS, BLOCK_DV], v_layout)
                zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                if HAS_PHI:
                    pq = pq_smem.index(place)._reinterpret(pq_smem.dtype, [ROWS, BLOCK_R], pq_layout)
                    pk = pk_smem.index(stage)._reinterpret(pk_smem.dtype, [KEYS, BLOCK_R], pk_layout)
                    s = warpgroup_mma(pq, pk.permute((1, 0)), s, is_async=True)
                dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                p = exp2(s * qk_scale + (fixed - lse[:, None]))
                if HAS_TERMS:
                    # By selection: the log-sum-exp does not count what is hidden, so its power may be infinite.
                    p = gl.where(shown[None, :] == 0.0, p, 0.0)
                dp = warpgroup_mma_wait(0, deps=[dp])
                mbarrier.arrive(empty.index(stage))
                total += p * (dp - delta[:, None])
                lse = next_lse
                delta = next_delta
                step += 1
            _add(total, sums, own, q_code, j, code_k_ptr, start, start_n, seqlen_k, half, HAS_CODES, s_layout)


@jit
def _add(total, sums, own, q_code, j, code_k_ptr, start, start_n, seqlen_k, half, HAS_CODES: gl.constexpr,
         s_layout: gl.constexpr):  # fmt: skip
    """Add a tile to its entries, as whole numbers; of positions, a tile that lies in one tail is summed by row."""
    of_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    sums_ptr, power_ptr, failed_ptr = sums
    sums_ptr += own * (2 * half + 1) + half
    # Whole numbers hold neither NaN nor infinity: that there is one is noted beside them.
    check = gl.sum(total, 1)
    nowhere = gl.zeros([ROWS], gl.int32, of_rows)
    gl.store(failed_ptr + nowhere, nowhere + 1, mask=check - check != 0.0)
    whole = gl.floor(total * gl.load(power_ptr) + 0.5).to(gl.int64)
    if HAS_CODES:
        k_code = gl.load(code_k_ptr + j, mask=j < seqlen_k, other=0)
        gl.atomic_add(sums_ptr + entry_of(q_code[:, None], k_code[None, :], half), whole)
    else:
        in_tail, is_after = tail_of(start, start_n, half, ROWS, KEYS)
        if in_tail:
            gl.atomic_add(sums_ptr + gl.where(is_after, half, -half) + nowhere, gl.sum(whole, 1))
        else:
            gl.atomic_add(sums_ptr + entry_of(q_code[:, None], j[None, :], half), whole)


@jit(
    do_not_specialize=[
        "units", "pairs", "each", "tables", "blocks_m", "blocks_n", "num_heads", "group", "seqlen_q", "seqlen_k",
        "shift", "left", "right", "pq_s1", "pq_v2", "pq_s2", "pk_s1", "pk_v2", "pk_s2", "mask_s1", "mask_v2", "mask_s2",
        "stride_table", "half", "stride_rows",
    ]
)  # fmt: skip
def _dtable_kernel(
    q_desc, do_desc, pq_desc, k_desc, v_desc, pk_desc, sums_ptr, power_ptr, failed_ptr, lse_ptr, delta_ptr, table_ptr,
    code_q_ptr, code_k_ptr, terms_ptr, units, pairs, each, tables, blocks_m, blocks_n, num_heads, group, seqlen_q,
    seqlen_k, shift, left, right, scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, stride_table, half, stride_rows,
    stride_terms, mask_s1, mask_v2, mask_s2, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_CODES: gl.constexpr, HAS_TERMS: gl.constexpr, HAS_PHI: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
    REGISTERS: gl.constexpr, q_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr,
    k_layout: gl.constexpr, v_layout: gl.constexpr, pk_layout: gl.constexpr,
):  # fmt: skip
    """Sums of dS of a tile over some of the pairs that read a table, added to its entries; tile after tile."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES * CONSUMERS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [STAGES * CONSUMERS, 1, 1, ROWS, BLOCK_DV], do_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, KEYS, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, KEYS, BLOCK_DV], v_desc.layout)
    pq_smem = q_smem
    pk_smem = k_smem
    if HAS_PHI:
        pq_smem = gl.allocate_shared_memory(pq_desc.dtype, [STAGES * CONSUMERS, 1, ROWS, BLOCK_R], pq_desc.layout)
        pk_smem = gl.allocate_shared_memory(pk_desc.dtype, [STAGES, 1, KEYS, BLOCK_R], pk_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    # Numbers, addresses and buffers go to the partitions in groups, constants one by one.
    descriptors = (q_desc, do_desc, pq_desc, k_desc, v_desc, pk_desc)
    buffers = (q_smem, do_smem, pq_smem, k_smem, v_smem, pk_smem)
    barriers = (full, empty)
    deal = (units, pairs, each, tables, blocks_m, blocks_n)
    band = (shift, left, right)
    heads = (num_heads, group)
    sums = (sums_ptr, power_ptr, failed_ptr)
    rows = (lse_ptr, delta_ptr, stride_rows)
    table = (table_ptr, stride_table, half)
    codes = (code_q_ptr, code_k_ptr)
    terms = (terms_ptr, stride_terms, (mask_s1, mask_v2, mask_s2))
    owners_q = (pq_s1, pq_v2, pq_s2)
    owners_k = (pk_s1, pk_v2, pk_s2)
    qk_scale = scale * LOG2E
    gl.warp_specialize(
        [
            (_consume, (0, sums, rows, table, codes, terms, buffers, barriers, deal, band, heads, seqlen_q, seqlen_k,
                        qk_scale, HAS_LEFT, HAS_RIGHT, HAS_CODES, HAS_TERMS, HAS_PHI, CONSUMERS, STAGES, BLOCK_D,
                        BLOCK_DV, BLOCK_R, q_layout, do_layout, pq_layout, k_layout, v_layout, pk_layout)),
            (_consume, (1, sums, rows, table, codes, terms, buffers, barriers, deal, band, heads, seqlen_q, seqlen_k,
                        qk_scale, HAS_LEFT, HAS_RIGHT, HAS_CODES, HAS_TERMS, HAS_PHI, CONSUMERS, STAGES, BLOCK_D,
                        BLOCK_DV, BLOCK_R, q_layout, do_layout, pq_layout, k_layout, v_layout, pk_layout)),
            (_consume, (2, sums, rows, table, codes, terms, buffers, barriers, deal, band, heads, seqlen_q, seqlen_k,
                        qk_scale, HAS_LEFT, HAS_RIGHT, HAS_CODES, HAS_TERMS, HAS_PHI, CONSUMERS, STAGES, BLOCK_D,
                        BLOCK_DV, BLOCK_R, q_layout, do_layout, pq_layout, k_layout, v_layout, pk_layout)),
            (_produce, (descriptors, buffers, barriers, deal, band, heads, seqlen_q, owners_q, owners_k, HAS_LEFT,
                        HAS_RIGHT, HAS_PHI, CONSUMERS, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )  # fmt: skip


def fits(ops: HopperOperands) -> TableConfig | None:
    """The tile shape with which the kernel does a call, None where the portable one does."""
    if ops.is_varlen or ops.is_tile_centred or ops.dropout_p > 0 or ops.seqlen_q <= FEWEST_QUERIES:
        return None
    pairs = ops.num_programs // (1 if ops.table is None else ops.table.shape[0])
    if ops.shape.is_banded and pairs < FEWEST_PAIRS:
        return None
    return table_config(ops.block_d, ops.block_dv, ops.columns)


def launch(
    config: TableConfig, ops: HopperOperands, grad: Tensor, dout: Tensor, dlse: Tensor | None, lse2: Tensor,
    delta: Tensor,
) -> None:  # fmt: skip
    """Fill the gradient of the table.

    Args:
        config: as `fits` says.
        ops: the call.
        grad: `[H or 1, T]`, filled.
        dout: gradient of the output, `[B, H, N, head_dim_v]`, which the copy engine can address.
        dlse: gradient of the log-sum-exp, or None.
        lse2: log-sum-exp in units of log 2, float32 `[B, H, rows]`, rows a multiple of 64; +inf past the end.
        delta: what gradients of scores are measured from, likewise.
    """
    tables, rows, factors = grad.shape[0], lse2.shape[-1], ops.factors
    pairs = ops.num_programs // tables
    blocks_m, blocks_n = cdiv(ops.seqlen_q, config.block_m), cdiv(ops.seqlen_k, TABLE_KEYS)
    tiles = blocks_m * blocks_n * tables
    processors = multiprocessors(ops.q.device)
    each = pairs_of_a_walk(tiles, pairs, processors)
    units = tiles * cdiv(pairs, each)
    q, do = descriptor(ops.q, _ROWS, ops.block_d), descriptor(dout, _ROWS, ops.block_dv)
    k, v = descriptor(ops.k, TABLE_KEYS, ops.block_d), descriptor(ops.v, TABLE_KEYS, ops.block_dv)
    pq = q if factors is None else descriptor(factors.phi_q, _ROWS, ops.columns)
    pk = k if factors is None else descriptor(factors.phi_k, TABLE_KEYS, ops.columns)
    total, terms = FixedPoint.of(ops, grad.numel(), dout, dlse), ops.key_terms(TABLE_KEYS)
    start(
        _dtable_kernel, (min(units, processors),), q, do, pq, k, v, pk, *total, lse2, delta,
        *or_nothing(lse2, ops.table, ops.code_q, ops.code_k, terms), units, pairs, each, tables, blocks_m,
        blocks_n, ops.num_heads, ops.group, ops.seqlen_q, ops.seqlen_k, ops.shift, ops.window_left, ops.window_right,
        ops.scale, *ops.sharing_q.sizes, *ops.sharing_k.sizes, *ops.table_sizes, rows,
        0 if terms is None else terms.stride(0), *ops.sharing_mask.sizes,
        HAS_LEFT=ops.window_left >= 0,
        HAS_RIGHT=ops.window_right >= 0,
        HAS_CODES=ops.code_q is not None,
        HAS_TERMS=terms is not None,
        HAS_PHI=factors is not None,
        CONSUMERS=config.consumers,
        STAGES=config.stages,
        BLOCK_D=ops.block_d,
        BLOCK_DV=ops.block_dv,
        BLOCK_R=ops.columns,
        REGISTERS=config.registers,
        q_layout=matrix(q), do_layout=matrix(do), pq_layout=matrix(pq), k_layout=matrix(k), v_layout=matrix(v),
        pk_layout=matrix(pk), kind=(config, ops.shape, ops.q.dtype), num_warps=4, maxnreg=config.maxnreg,
    )  # fmt: skip
    total.write(grad)


@functools.lru_cache(maxsize=1024)
def pairs_of_a_walk(tiles: int, pairs: int, processors: int) -> int:
    """How many pairs a walk goes over, so that all programs end soonest.

    Args:
        tiles: tiles of all tables.
        pairs: (batch, head) pairs that read one table.
        processors: multiprocessors, each with one program at a time.
    """
    # More parts than there are multiprocessors only add to what is done once.
    most = min(pairs, 2 * processors)
    return min(
        (cdiv(pairs, parts) for parts in range(1, most + 1)),
        key=lambda each: (cdiv(tiles * cdiv(pairs, each), processors) * (ADDING + each), -each),
    )
