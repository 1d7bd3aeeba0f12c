"""Backward pass for Hopper where heads are wider than 64: two warpgroups, which exchange dS.

As in `fused.py`, but the sums dk and dv leave no registers for keys, values and a warpgroup that makes dq. So the two
warpgroups put dS where both read it, each makes half of the columns of dq over the keys of both, and the first one
dphi_q.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reduce_add,
    store,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashbias.attention.hopper.order import await_turn, hand_over, hear, turn_at, unit_slots
from flashbias.attention.hopper.tiles import ROWS, SLAB, own_index, query_tiles, turns_of, unit_of
from flashbias.attention.hopper.walks import LINE, key_tile_of, produce, tile_at, turn_of, weights
from flashbias.attention.triton.scores import LOG2E


@jit
def _issue_scores(
    k, v, pk, step, q_smem, do_smem, pq_smem, q_full, HAS_PHI: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, q_layout: gl.constexpr,
    do_layout: gl.constexpr, pq_layout: gl.constexpr,
):  # fmt: skip
    """S^T / scale and dP^T of a step, in flight."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    stage = step % STAGES
    mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)
    q = q_smem.index(stage)._reinterpret(q_smem.dtype, [SLAB, BLOCK_D], q_layout)
    do = do_smem.index(stage)._reinterpret(do_smem.dtype, [SLAB, BLOCK_DV], do_layout)
    zero = gl.zeros([ROWS, SLAB], gl.float32, s_layout)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    if HAS_PHI:
        pq = pq_smem.index(stage)._reinterpret(pq_smem.dtype, [SLAB, BLOCK_R], pq_layout)
        s = warpgroup_mma(pk, pq.permute((1, 0)), s, is_async=True)
    return s, warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def _walk(
    w: gl.constexpr, dk, dv, dphi, step, first, count, turned, f_q, bh, slabs, start_n, k, v, pk, q_smem, k_smem,
    do_smem, pq_smem, sum_smem, ds_smem, lse_smem, delta_smem, dq_smem, dpq_smem, q_full, q_empty, ds_full, ds_empty,
    dq_desc, dpq_desc, queue, block, end_before, place, next_turn, seqlen_k, shift, left, right, qk_scale,
    IS_EDGE: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_SUM: gl.constexpr, BLOCK_G: gl.constexpr,
    q_layout: gl.constexpr, k_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr,
    sum_layout: gl.constexpr, dq_layout: gl.constexpr, dpq_layout: gl.constexpr, DQ_COLUMNS: gl.constexpr,
    CONSUMERS: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """Walk over `count` tiles of queries from `first`, the one `turned` steps in at first."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    # Warpgroups have columns of dq each; the first one makes dphi_q.
    OWN_DPQ: gl.constexpr = SUM_DPQ and w == 0
    # Products that are issued behind those of dk, dv and dphi.
    BEHIND: gl.constexpr = CONSUMERS * (2 if OWN_DPQ else 1)
    for n in range(count):
        tile = tile_at(first, n, count, turned, REPEATABLE)
        # Two buffers of dS, so that a warpgroup may be one step ahead of the other.
        half = step & 1
        own = ds_smem.index(half * CONSUMERS + w)
        stage = step % STAGES
        q = q_smem.index(stage)._reinterpret(q_smem.dtype, [SLAB, BLOCK_D], q_layout)
        do = do_smem.index(stage)._reinterpret(do_smem.dtype, [SLAB, BLOCK_DV], do_layout)
        s, dp = _issue_scores(k, v, pk, step, q_smem, do_smem, pq_smem, q_full, HAS_PHI, STAGES,
                              BLOCK_D, BLOCK_DV, BLOCK_R, q_layout, do_layout, pq_layout)  # fmt: skip
        s = warpgroup_mma_wait(1, deps=[s])
        p = weights(s, lse_smem.index(stage), tile * SLAB, start_n + w * ROWS, seqlen_k, shift, left, right,
                    qk_scale, IS_EDGE, HAS_TAIL, HAS_LEFT, HAS_RIGHT)  # fmt: skip
        p16 = gl.convert_layout(p.to(do_smem.dtype), gl.DotOperandLayout(0, dv_layout, 2))
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        # Read no earlier: registers are short until here.
        delta = delta_smem.index(stage).load(gl.SliceLayout(0, s_layout))
        ds16 = (p * (dp - delta[None, :])).to(q_smem.dtype)
        mbarrier.wait(ds_empty.index(half), ((step >> 1) & 1) ^ 1)
        own.store(ds16)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(half))
        dk = warpgroup_mma(gl.convert_layout(ds16, gl.DotOperandLayout(0, dk_layout, 2)), q, dk, is_async=True)
        if SUM_DPK:
            pq = pq_smem.index(stage)._reinterpret(pq_smem.dtype, [SLAB, BLOCK_R], pq_layout)
            dphi = warpgroup_mma(
                gl.convert_layout(ds16, gl.DotOperandLayout(0, dphi_layout, 2)), pq.slice(0, BLOCK_G, dim=1), dphi,
                is_async=True,
            )  # fmt: skip
        mbarrier.wait(ds_full.index(half), (step >> 1) & 1)
        dq = gl.zeros([SLAB, DQ_COLUMNS], gl.float32, part_layout)
        for c in gl.static_range(CONSUMERS):
            k_c = k_smem.index(c)._reinterpret(k_smem.dtype, [ROWS, BLOCK_D], k_layout)
            dq = warpgroup_mma(
                ds_smem.index(half * CONSUMERS + c).permute((1, 0)), k_c.slice(w * DQ_COLUMNS, DQ_COLUMNS, dim=1), dq,
                use_acc=c > 0, is_async=True,
            )  # fmt: skip
        if OWN_DPQ:
            dpq = gl.zeros([SLAB, BLOCK_G], gl.float32, dphi_layout)
            for c in gl.static_range(CONSUMERS):
                pk_c = sum_smem.index(c)._reinterpret(sum_smem.dtype, [ROWS, BLOCK_SUM], sum_layout)
                dpq = warpgroup_mma(
                    ds_smem.index(half * CONSUMERS + c).permute((1, 0)), pk_c.slice(0, BLOCK_G, dim=1), dpq,
                    use_acc=c > 0, is_async=True,
                )  # fmt: skip
        if REPEATABLE:
            # While they are in flight: what was added a step ago is done by now, and the next block's turn.
            hand_over(place, next_turn)
            place = queue[0] + 1 + (bh * slabs + tile) * CONSUMERS + w
            next_turn = block + 1
            await_turn(place, turn_at(tile, block, end_before))
        if SUM_DPK:
            dk, dv, dphi = warpgroup_mma_wait(BEHIND, deps=[dk, dv, dphi])
        else:
            dk, dv = warpgroup_mma_wait(BEHIND, deps=[dk, dv])
        mbarrier.arrive(q_empty.index(stage))
        store_wait(0)
        if OWN_DPQ:
            dq, dpq = warpgroup_mma_wait(0, deps=[dq, dpq])
            dpq_smem._reinterpret(gl.float32, [SLAB, BLOCK_G], dpq_layout).store(dpq)
        else:
            dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(ds_empty.index(half))
        dq_smem.index(w)._reinterpret(gl.float32, [SLAB, DQ_COLUMNS], dq_layout).store(dq)
        fence_async_shared()
        slab = (bh * slabs + tile) * CONSUMERS + w
        reduce_add(dq_desc, [slab * (SLAB * DQ_COLUMNS // LINE), 0], dq_smem.index(w))
        if OWN_DPQ:
            reduce_add(dpq_desc, [(f_q * slabs + tile) * (SLAB * BLOCK_G // LINE), 0], dpq_smem)
        step += 1
    return dk, dv, dphi, step, place, next_turn


@jit
def _consume(
    w: gl.constexpr, dq_desc, dk_desc, dv_desc, dpq_desc, dpk_desc, q_smem, k_smem, v_smem, do_smem, pq_smem, pk_smem,
    sum_smem, ds_smem, lse_smem, delta_smem, dq_smem, dpq_smem, dpk_smem, kv_full, kv_empty, q_full, q_empty, ds_full,
    ds_empty, queue, units, pairs, heads, num_blocks, num_heads, group, slabs, seqlen_q, seqlen_k, shift, left, right,
    scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_TAIL: gl.constexpr, HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_SUM: gl.constexpr,
    BLOCK_G: gl.constexpr, q_layout: gl.constexpr, k_layout: gl.constexpr, v_layout: gl.constexpr,
    do_layout: gl.constexpr, pq_layout: gl.constexpr, pk_layout: gl.constexpr, sum_layout: gl.constexpr,
    dq_layout: gl.constexpr, dpq_layout: gl.constexpr, dpk_layout: gl.constexpr, DQ_COLUMNS: gl.constexpr,
    CONSUMERS: gl.constexpr, ALTERNATES: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: 64 keys of every tile."""
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    k = k_smem.index(w)._reinterpret(k_smem.dtype, [ROWS, BLOCK_D], k_layout)
    v = v_smem.index(w)._reinterpret(v_smem.dtype, [ROWS, BLOCK_DV], v_layout)
    pk = k
    if HAS_PHI:
        pk = pk_smem.index(w)._reinterpret(pk_smem.dtype, [ROWS, BLOCK_R], pk_layout)
    turn = 0
    step = 0
    unit = 0
    turns = turns_of(units, ALTERNATES)
    # The ticket of the slab that was added to last, and whose turn is next there; 0: it has been told.
    place = 0
    next_turn = 0
    if REPEATABLE:
        unit, turns = hear(0, queue)
        place = queue[0]
    while turn < turns:
        if not REPEATABLE:
            unit = unit_of(turn, ALTERNATES)
        b, hk, block = key_tile_of(
            unit, num_blocks, pairs, heads, num_heads // group, HAS_LEFT or HAS_RIGHT or REPEATABLE
        )
        start_n = block * BLOCK_N
        lo, full_lo, full_hi, hi = query_tiles(start_n, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        _, _, _, end_before = query_tiles(start_n - BLOCK_N, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        dk = gl.zeros([ROWS, BLOCK_D], gl.float32, dk_layout)
        dv = gl.zeros([ROWS, BLOCK_DV], gl.float32, dv_layout)
        dphi = gl.zeros([ROWS, BLOCK_G], gl.float32, dphi_layout)
        mbarrier.wait(kv_full.index(0), turn & 1)
        begin = step
        for g in range(group):
            bh = b * num_heads + hk * group + g
            # Factors that several pairs share get a sum from each of them.
            f_q = bh if REPEATABLE else own_index(bh, pq_s1, pq_v2, pq_s2)
            for part in gl.static_range(2 if REPEATABLE else 0, -1 if REPEATABLE else 3, -1 if REPEATABLE else 1):
                if part == 0:
                    first = lo
                    count = full_lo - lo
                elif part == 1:
                    first = full_lo
                    count = full_hi - full_lo
                else:
                    first = full_hi
                    count = hi - full_hi
                if part == 1 or (part == 0 and HAS_RIGHT) or (part == 2 and HAS_LEFT):
                    dk, dv, dphi, step, place, next_turn = _walk(
                        w, dk, dv, dphi, step, first, count, turn_of(block, num_blocks, count, HAS_LEFT or HAS_RIGHT),
                        f_q, bh, slabs, start_n, k, v, pk, q_smem, k_smem, do_smem, pq_smem, sum_smem,
                        ds_smem, lse_smem, delta_smem, dq_smem, dpq_smem, q_full, q_empty, ds_full, ds_empty, dq_desc,
                        dpq_desc, queue, block, end_before, place, next_turn, seqlen_k, shift, left, right,
                        scale * LOG2E,
                        part != 1, HAS_TAIL, HAS_LEFT, HAS_RIGHT, HAS_PHI, SUM_DPQ, SUM_DPK, STAGES, BLOCK_D,
                        BLOCK_DV, BLOCK_R, BLOCK_SUM, BLOCK_G, q_layout, k_layout, do_layout, pq_layout, sum_layout,
                        dq_layout, dpq_layout, DQ_COLUMNS, CONSUMERS, REPEATABLE,
                    )  # fmt: skip
        # The other warpgroup reads these keys until it has made its last part of dq.
        last = step - 1
        mbarrier.wait(ds_empty.index(last & 1), (last >> 1) & 1, pred=step > begin)
        k.store((dk * scale).to(k_smem.dtype))
        v.store(dv.to(v_smem.dtype))
        if SUM_DPK:
            store_wait(0)
            own = dpk_smem.index(w)
            own._reinterpret(gl.float32, [ROWS, BLOCK_G], dpk_layout).store(dphi * scale)
        fence_async_shared()
        if REPEATABLE:
            hand_over(place, next_turn)
            next_turn = 0
        store(dk_desc, [b, hk, start_n + w * ROWS, 0], k_smem.index(w))
        store(dv_desc, [b, hk, start_n + w * ROWS, 0], v_smem.index(w))
        if SUM_DPK:
            if REPEATABLE:
                store(dpk_desc, [b * (num_heads // group) + hk, start_n + w * ROWS, 0], dpk_smem.index(w))
            else:
                f_k = own_index(b * num_heads + hk * group, pk_s1, pk_v2, pk_s2)
                reduce_add(dpk_desc, [f_k, start_n + w * ROWS, 0], dpk_smem.index(w))
        store_wait(0)
        mbarrier.arrive(kv_empty.index(0))
        turn += 1
        if REPEATABLE:
            unit, turns = hear(turn, queue)


@jit(
    do_not_specialize=[
        "units", "pairs", "heads", "num_blocks", "num_heads", "group", "slabs", "stride_rows", "seqlen_q", "seqlen_k",
        "shift", "left", "right", "pq_s1", "pq_v2", "pq_s2", "pk_s1", "pk_v2", "pk_s2", "stride_pf", "stride_pn",
        "stride_pr", "stride_c", "references",
    ]
)  # fmt: skip
def _bwd_wide_kernel(
    q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc, lse_ptr, delta_ptr, phi_q_ptr, centre_ptr, tickets_ptr,
    dq_desc, dk_desc, dv_desc, dpq_desc, dpk_desc, units, pairs, heads, num_blocks, num_heads, group, slabs,
    stride_rows, seqlen_q, seqlen_k, shift, left, right, scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, stride_pf,
    stride_pn, stride_pr, stride_c, references, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_TAIL: gl.constexpr,
    HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr,
    DQ_COLUMNS: gl.constexpr, CONSUMERS: gl.constexpr, ALTERNATES: gl.constexpr, REPEATABLE: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, q_layout: gl.constexpr, k_layout: gl.constexpr,
    v_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr, pk_layout: gl.constexpr,
    sum_layout: gl.constexpr, ds_layout: gl.constexpr, dq_layout: gl.constexpr, dpq_layout: gl.constexpr,
    dpk_layout: gl.constexpr,
):  # fmt: skip
    """All gradients; a program takes every so-manieth tile of 128 keys of one (batch, head of keys)."""
    # A thread reads 16 bytes at a time of what its columns need.
    rows_layout: gl.constexpr = gl.SharedLinearLayout(offset_bases=[[1], [8], [2], [4], [16], [32]])
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, SLAB, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 1, SLAB, BLOCK_DV], do_desc.layout)
    pq_smem = q_smem
    pk_smem = k_smem
    if HAS_PHI:
        pq_smem = gl.allocate_shared_memory(pq_desc.dtype, [STAGES, 1, SLAB, BLOCK_R], pq_desc.layout)
        pk_smem = gl.allocate_shared_memory(pk_desc.dtype, [CONSUMERS, 1, ROWS, BLOCK_R], pk_desc.layout)
    # What dphi_q is the sum of: the factors themselves, or what goes with centres by tile.
    BLOCK_SUM: gl.constexpr = BLOCK_R if RANK == 0 else BLOCK_G
    sum_smem = pk_smem
    if SUM_DPQ and RANK > 0:
        sum_smem = gl.allocate_shared_memory(sum_desc.dtype, [CONSUMERS, 1, ROWS, BLOCK_G], sum_desc.layout)
    ds_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS, ROWS, SLAB], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [CONSUMERS, SLAB * DQ_COLUMNS // LINE, LINE], dq_desc.layout)
    dpq_smem = dq_smem
    dpk_smem = dq_smem
    if SUM_DPQ:
        dpq_smem = gl.allocate_shared_memory(gl.float32, [SLAB * BLOCK_G // LINE, LINE], dpq_desc.layout)
    if SUM_DPK:
        dpk_smem = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 1, ROWS, BLOCK_G], dpk_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, SLAB], rows_layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, SLAB], rows_layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_empty.index(0), count=CONSUMERS)
    for n in gl.static_range(2):
        mbarrier.init(ds_full.index(n), count=CONSUMERS)
        mbarrier.init(ds_empty.index(n), count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=2)
        mbarrier.init(q_empty.index(stage), count=CONSUMERS)
    queue = ()
    if REPEATABLE:
        unit_smem, told, heard = unit_slots(CONSUMERS)
        queue = (tickets_ptr, unit_smem, told, heard)
    fence_async_shared()
    owners_q = (pq_s1, pq_v2, pq_s2)
    owners_k = (pk_s1, pk_v2, pk_s2)
    centring = (phi_q_ptr, stride_pf, stride_pn, stride_pr, centre_ptr, stride_c, references, owners_q, owners_k)
    # Partitions take their arguments one by one: in a tuple of its own a constant would become a tensor.
    gl.warp_specialize(
        [
            (_consume, (0, dq_desc, dk_desc, dv_desc, dpq_desc, dpk_desc, q_smem, k_smem, v_smem, do_smem, pq_smem,
                        pk_smem, sum_smem, ds_smem, lse_smem, delta_smem, dq_smem, dpq_smem, dpk_smem, kv_full,
                        kv_empty, q_full, q_empty, ds_full, ds_empty, queue, units, pairs, heads, num_blocks,
                        num_heads, group, slabs, seqlen_q, seqlen_k, shift, left, right, scale, pq_s1, pq_v2, pq_s2,
                        pk_s1, pk_v2, pk_s2, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_PHI, SUM_DPQ, SUM_DPK, STAGES, BLOCK_D,
                        BLOCK_DV, BLOCK_R, BLOCK_SUM, BLOCK_G, q_layout, k_layout, v_layout, do_layout, pq_layout,
                        pk_layout, sum_layout, dq_layout, dpq_layout, dpk_layout, DQ_COLUMNS, CONSUMERS, ALTERNATES,
                        REPEATABLE)),
            (_consume, (1, dq_desc, dk_desc, dv_desc, dpq_desc, dpk_desc, q_smem, k_smem, v_smem, do_smem, pq_smem,
                        pk_smem, sum_smem, ds_smem, lse_smem, delta_smem, dq_smem, dpq_smem, dpk_smem, kv_full,
                        kv_empty, q_full, q_empty, ds_full, ds_empty, queue, units, pairs, heads, num_blocks,
                        num_heads, group, slabs, seqlen_q, seqlen_k, shift, left, right, scale, pq_s1, pq_v2, pq_s2,
                        pk_s1, pk_v2, pk_s2, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_PHI, SUM_DPQ, SUM_DPK, STAGES, BLOCK_D,
                        BLOCK_DV, BLOCK_R, BLOCK_SUM, BLOCK_G, q_layout, k_layout, v_layout, do_layout, pq_layout,
                        pk_layout, sum_layout, dq_layout, dpq_layout, dpk_layout, DQ_COLUMNS, CONSUMERS, ALTERNATES,
                        REPEATABLE)),
            (produce, (q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc, lse_ptr, delta_ptr, centring,
                       q_smem, k_smem, v_smem, do_smem, pq_smem, pk_smem, sum_smem, lse_smem, delta_smem, kv_full,
                       kv_empty, q_full, q_empty, queue, units, pairs, heads, num_blocks, num_heads, group, stride_rows,
                       seqlen_q, shift, left, right, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, HAS_LEFT, HAS_RIGHT,
                       HAS_PHI, SUM_DPQ, RANK, 1, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G, CONSUMERS, 1,
                       ALTERNATES, REPEATABLE)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
