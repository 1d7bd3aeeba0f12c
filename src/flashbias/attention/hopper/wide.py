"""Backward pass for Hopper where heads are wider than 64: two warpgroups, which exchange dS.

As in `fused.py`, but the sums dk and dv leave no registers for keys, values and a warpgroup that makes dq. So the two
warpgroups put dS where both read it, each makes half of the columns of dq over the keys of both, and one of them
dphi_q: where heads are narrower than what is held, the one with fewer columns.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper import chunks
from flashbias.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reduce_add,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashbias.attention.hopper.order import await_turn, hand_over, turn_at
from flashbias.attention.hopper.tiles import (
    ROWS,
    SLAB,
    add_factor,
    boxes,
    factor_boxes,
    owner_of,
    query_tiles,
    store_rows,
    turns_of,
    unit_slots,
)
from flashbias.attention.hopper.walks import (
    LINE,
    place_of_keys,
    produce,
    seen_tiles,
    shown_keys,
    tile_at,
    told_unit,
    turn_of,
    weights,
)
from flashbias.attention.triton.scores import LOG2E


@jit
def _issue_scores(
    operands, step, of_queries, q_full, HAS_PHI: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, WIDTH_D: gl.constexpr, WIDTH_DV: gl.constexpr,
    q_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr,
):  # fmt: skip
    """S^T / scale and dP^T of a step, in flight."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    k, v, pk = operands
    q_smem, do_smem, pq_smem, _, _ = of_queries
    stage = step % STAGES
    mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)
    q = q_smem.index(stage)._reinterpret(q_smem.dtype, [SLAB, BLOCK_D], q_layout)
    do = do_smem.index(stage)._reinterpret(do_smem.dtype, [SLAB, BLOCK_DV], do_layout)
    zero = gl.zeros([ROWS, SLAB], gl.float32, s_layout)
    s = chunks.issue(k, chunks.of(q, WIDTH_D), zero, False)
    if HAS_PHI:
        pq = pq_smem.index(stage)._reinterpret(pq_smem.dtype, [SLAB, BLOCK_R], pq_layout)
        s = warpgroup_mma(pk, pq.permute((1, 0)), s, is_async=True)
    return s, chunks.issue(v, chunks.of(do, WIDTH_DV), zero, False)


@jit
def _walk(
    w: gl.constexpr, dk, dv, dphi, step, place, next_turn, first, count, turned, slab_q, slab, start_n, shown,
    operands, over_keys, of_queries, of_keys, ds_smem, barriers, order, seqlen_k, band, qk_scale,
    IS_EDGE: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_TERMS: gl.constexpr, HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_SUM: gl.constexpr,
    BLOCK_G: gl.constexpr, WIDTH_D: gl.constexpr, WIDTH_DV: gl.constexpr, q_layout: gl.constexpr,
    k_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr, sum_layout: gl.constexpr,
    dq_layout: gl.constexpr, dpq_layout: gl.constexpr, DQ_COLUMNS: gl.constexpr, CONSUMERS: gl.constexpr,
    REPEATABLE: gl.constexpr,
):  # fmt: skip
    """Walk over `count` tiles of queries from `first`, the one `turned` steps in at first."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    # Each warpgroup has columns of dq, the second one no more than the first.
    OWN_COLUMNS: gl.constexpr = chunks.half_columns(WIDTH_D, BLOCK_D, w)
    BOX_COLUMNS: gl.constexpr = chunks.half_columns(WIDTH_D, BLOCK_D, 1)
    BOX_LINES: gl.constexpr = SLAB * BOX_COLUMNS // LINE
    part_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OWN_COLUMNS, 16])
    OWN_DPQ: gl.constexpr = SUM_DPQ and w == chunks.sum_count(WIDTH_D) - 1
    # Products that are issued behind those of dk, dv and dphi.
    BEHIND: gl.constexpr = CONSUMERS * (2 if OWN_DPQ else 1)
    dq_desc, dpq_desc, dq_smem, dpq_smem = over_keys
    q_smem, do_smem, pq_smem, lse_smem, delta_smem = of_queries
    k_smem, _, _, sum_smem = of_keys
    _, _, q_full, q_empty, ds_full, ds_empty = barriers
    tickets_ptr, block, end_before = order
    for n in range(count):
        tile = tile_at(first, n, count, turned, REPEATABLE)
        # Two buffers of dS, so that a warpgroup may be one step ahead of the other.
        half = step & 1
        own = ds_smem.index(half * CONSUMERS + w)
        stage = step % STAGES
        q = q_smem.index(stage)._reinterpret(q_smem.dtype, [SLAB, BLOCK_D], q_layout)
        do = do_smem.index(stage)._reinterpret(do_smem.dtype, [SLAB, BLOCK_DV], do_layout)
        s, dp = _issue_scores(operands, step, of_queries, q_full, HAS_PHI, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D,
                              WIDTH_DV, q_layout, do_layout, pq_layout)  # fmt: skip
        s = warpgroup_mma_wait(len(operands[1]), deps=[s])
        p = weights(s, lse_smem.index(stage), shown, tile * SLAB, start_n, seqlen_k, band, qk_scale, IS_EDGE, HAS_TAIL,
                    HAS_LEFT, HAS_RIGHT, HAS_TERMS)  # fmt: skip
        dv = chunks.add(dv, p.to(do_smem.dtype), do, WIDTH_DV)
        dp = warpgroup_mma_wait(len(dv), deps=[dp])
        # Read no earlier: registers are short until here.
        delta = delta_smem.index(stage).load(gl.SliceLayout(0, s_layout))
        ds16 = (p * (dp - delta[None, :])).to(q_smem.dtype)
        mbarrier.wait(ds_empty.index(half), ((step >> 1) & 1) ^ 1)
        own.store(ds16)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(half))
        dk = chunks.add(dk, ds16, q, WIDTH_D)
        if SUM_DPK:
            pq = pq_smem.index(stage)._reinterpret(pq_smem.dtype, [SLAB, BLOCK_R], pq_layout)
            dphi = warpgroup_mma(
                gl.convert_layout(ds16, gl.DotOperandLayout(0, dphi_layout, 2)), pq.slice(0, BLOCK_G, dim=1), dphi,
                is_async=True,
            )  # fmt: skip
        mbarrier.wait(ds_full.index(half), (step >> 1) & 1)
        dq = gl.zeros([SLAB, OWN_COLUMNS], gl.float32, part_layout)
        for c in gl.static_range(CONSUMERS):
            k_c = k_smem.index(c)._reinterpret(k_smem.dtype, [ROWS, BLOCK_D], k_layout)
            dq = warpgroup_mma(
                ds_smem.index(half * CONSUMERS + c).permute((1, 0)), k_c.slice(w * DQ_COLUMNS, OWN_COLUMNS, dim=1), dq,
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
        own_slab = (slab + tile) * CONSUMERS + w
        if REPEATABLE:
            # While they are in flight: what was added a step ago is done by now, and the next block's turn.
            hand_over(place, next_turn)
            place = tickets_ptr + 1 + own_slab
            next_turn = block + 1
            await_turn(place, turn_at(tile, block, end_before))
        if SUM_DPK:
            sums = chunks.settled(dk + dv + (dphi,), BEHIND)
            dphi = sums[len(dk) + len(dv)]
        else:
            sums = chunks.settled(dk + dv, BEHIND)
        dv = sums[len(dk) : len(dk) + len(dv)]
        dk = sums[: len(dk)]
        mbarrier.arrive(q_empty.index(stage))
        store_wait(0)
        if OWN_DPQ:
            dq, dpq = warpgroup_mma_wait(0, deps=[dq, dpq])
            dpq_smem._reinterpret(gl.float32, [SLAB, BLOCK_G], dpq_layout).store(dpq)
        else:
            dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(ds_empty.index(half))
        own_dq = dq_smem.index(w)._reinterpret(gl.float32, [SLAB, DQ_COLUMNS], dq_layout)
        own_dq.slice(0, OWN_COLUMNS, dim=1).store(dq)
        fence_async_shared()
        # The lines of a slab are a few columns each, one after the other: in boxes of the fewest that a warpgroup has.
        for n in gl.static_range(OWN_COLUMNS // BOX_COLUMNS):
            lines = dq_smem.index(w).slice(n * BOX_LINES, BOX_LINES)
            reduce_add(dq_desc, [own_slab * (SLAB * DQ_COLUMNS // LINE) + n * BOX_LINES, 0], lines)
        if OWN_DPQ:
            reduce_add(dpq_desc, [(slab_q + tile) * (SLAB * BLOCK_G // LINE), 0], dpq_smem)
        step += 1
    return dk, dv, dphi, step, place, next_turn


@jit
def _consume(
    w: gl.constexpr, over_keys, over_queries, terms, of_queries, of_keys, ds_smem, barriers, queue, deal, batch, slabs,
    band, scale, owners_q, owners_k, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_TAIL: gl.constexpr,
    HAS_TERMS: gl.constexpr, HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_SUM: gl.constexpr,
    BLOCK_G: gl.constexpr, WIDTH_D: gl.constexpr, WIDTH_DV: gl.constexpr, q_layout: gl.constexpr,
    k_layout: gl.constexpr, v_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr,
    pk_layout: gl.constexpr, sum_layout: gl.constexpr, dq_layout: gl.constexpr, dpq_layout: gl.constexpr,
    dpk_layout: gl.constexpr, DQ_COLUMNS: gl.constexpr, CONSUMERS: gl.constexpr, ALTERNATES: gl.constexpr,
    IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: 64 keys of every tile."""
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    dk_desc, dv_desc, dpk_desc, dpk_smem = over_queries
    k_smem, v_smem, pk_smem, _sum_smem = of_keys
    kv_full, kv_empty, _q_full, _q_empty, _ds_full, ds_empty = barriers
    num_heads = batch[2]
    group = batch[3]
    shift, left, right = band
    k = k_smem.index(w)._reinterpret(k_smem.dtype, [ROWS, BLOCK_D], k_layout)
    v = v_smem.index(w)._reinterpret(v_smem.dtype, [ROWS, BLOCK_DV], v_layout)
    k_chunks = chunks.of(k, WIDTH_D)
    v_chunks = chunks.of(v, WIDTH_DV)
    pk = k
    if HAS_PHI:
        pk = pk_smem.index(w)._reinterpret(pk_smem.dtype, [ROWS, BLOCK_R], pk_layout)
    turn = 0
    step = 0
    unit, walk, turns = told_unit(
        0, (-1, 0), turns_of(deal[0], ALTERNATES), deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N
    )
    # The ticket of the slab that was added to last, and whose turn is next there; 0: it has been told.
    place = queue[0] if REPEATABLE else 0
    next_turn = 0
    while turn < turns:
        b, hk, block, blocks, queries, keys, diagonal, first_slab = place_of_keys(
            turn, unit, walk, deal, batch, shift, IS_VARLEN, REPEATABLE, ALTERNATES, HAS_LEFT or HAS_RIGHT, BLOCK_N
        )
        own_q = queries[1]
        _, own_k, b_k, row_k = keys
        start_n = block * BLOCK_N
        tiles = query_tiles(start_n, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        before = query_tiles(start_n - BLOCK_N, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        dk = chunks.zeros(WIDTH_D)
        dv = chunks.zeros(WIDTH_DV)
        dphi = gl.zeros([ROWS, BLOCK_G], gl.float32, dphi_layout)
        mbarrier.wait(kv_full.index(0), turn & 1)
        begin = step
        for g in range(group):
            bh = b * num_heads + hk * group + g
            slab = bh * slabs + first_slab
            slab_q = owner_of(bh, owners_q) * slabs + first_slab
            seen = seen_tiles(tiles, terms, bh, block, blocks, HAS_TERMS and not REPEATABLE)
            shown = shown_keys(terms, bh, start_n + w * ROWS, blocks * BLOCK_N, HAS_TERMS)
            # From the last queries on where additions have an order.
            for part in gl.static_range(2 if REPEATABLE else 0, -1 if REPEATABLE else 3, -1 if REPEATABLE else 1):
                if part == 1 or (part == 0 and HAS_RIGHT) or (part == 2 and HAS_LEFT):
                    count = seen[part + 1] - seen[part]
                    dk, dv, dphi, step, place, next_turn = _walk(
                        w, dk, dv, dphi, step, place, next_turn, seen[part], count,
                        turn_of(block, blocks, count, HAS_LEFT or HAS_RIGHT), slab_q, slab, start_n + w * ROWS, shown,
                        (k_chunks, v_chunks, pk), over_keys, of_queries, of_keys, ds_smem, barriers,
                        (queue[0], block, before[3]), own_k, (diagonal, left, right), scale * LOG2E, part != 1,
                        HAS_TAIL, HAS_LEFT, HAS_RIGHT, HAS_TERMS, HAS_PHI, SUM_DPQ, SUM_DPK, STAGES, BLOCK_D, BLOCK_DV,
                        BLOCK_R, BLOCK_SUM, BLOCK_G, WIDTH_D, WIDTH_DV, q_layout, k_layout, do_layout, pq_layout,
                        sum_layout, dq_layout, dpq_layout, DQ_COLUMNS, CONSUMERS, REPEATABLE,
                    )  # fmt: skip
        # The other warpgroup reads these keys until it has made its last part of dq.
        last = step - 1
        mbarrier.wait(ds_empty.index(last & 1), (last >> 1) & 1, pred=step > begin)
        chunks.write(chunks.times(dk, scale), k, WIDTH_D)
        chunks.write(dv, v, WIDTH_DV)
        if SUM_DPK:
            store_wait(0)
            own = dpk_smem.index(w)
            own._reinterpret(gl.float32, [ROWS, BLOCK_G], dpk_layout).store(dphi * scale)
        fence_async_shared()
        if REPEATABLE:
            hand_over(place, next_turn)
            next_turn = 0
        store_rows(dk_desc, b_k, hk, row_k + start_n + w * ROWS, k_smem.index(w), IS_VARLEN)
        store_rows(dv_desc, b_k, hk, row_k + start_n + w * ROWS, v_smem.index(w), IS_VARLEN)
        if SUM_DPK:
            f_k = owner_of(b * num_heads + hk * group, owners_k)
            add_factor(dpk_desc, b_k, f_k, row_k + start_n + w * ROWS, dpk_smem.index(w), IS_VARLEN)
        store_wait(0)
        mbarrier.arrive(kv_empty.index(0))
        turn += 1
        unit, walk, turns = told_unit(turn, walk, turns, deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N)


@jit(
    do_not_specialize=[
        "units", "pairs", "heads", "num_blocks", "num_heads", "group", "slabs", "stride_rows", "seqlen_q", "seqlen_k",
        "shift", "left", "right", "pq_s1", "pq_v2", "pq_s2", "pk_s1", "pk_v2", "pk_s2", "stride_pf", "stride_pn",
        "stride_pr", "stride_c", "references", "mask_s1", "mask_v2", "mask_s2",
    ]
)  # fmt: skip
def _bwd_wide_kernel(
    q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc, dq_desc, dk_desc, dv_desc, dpq_desc, dpk_desc,
    lse_ptr, delta_ptr, phi_q_ptr, centre_ptr, terms_ptr, most_ptr, cu_q_ptr, cu_k_ptr, counter_ptr, units, pairs,
    heads, num_blocks, num_heads, group, slabs, stride_rows, seqlen_q, seqlen_k, shift, left, right, scale, pq_s1,
    pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, stride_pf, stride_pn, stride_pr, stride_c, references, mask_s1, mask_v2,
    mask_s2, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_TERMS: gl.constexpr,
    HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr, WIDTH_D: gl.constexpr,
    WIDTH_DV: gl.constexpr, DQ_COLUMNS: gl.constexpr, CONSUMERS: gl.constexpr, ALTERNATES: gl.constexpr,
    IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    q_layout: gl.constexpr, k_layout: gl.constexpr, v_layout: gl.constexpr, do_layout: gl.constexpr,
    pq_layout: gl.constexpr, pk_layout: gl.constexpr, sum_layout: gl.constexpr, ds_layout: gl.constexpr,
    dq_layout: gl.constexpr, dpq_layout: gl.constexpr, dpk_layout: gl.constexpr,
):  # fmt: skip
    """All gradients; a program takes tiles of 128 keys of a (batch, head of keys), which it is dealt or draws."""
    # A thread reads 16 bytes at a time of what its columns need.
    rows_layout: gl.constexpr = gl.SharedLinearLayout(offset_bases=[[1], [8], [2], [4], [16], [32]])
    k_smem = boxes(k_desc, CONSUMERS, ROWS, BLOCK_D, IS_VARLEN)
    v_smem = boxes(v_desc, CONSUMERS, ROWS, BLOCK_DV, IS_VARLEN)
    q_smem = boxes(q_desc, STAGES, SLAB, BLOCK_D, IS_VARLEN)
    do_smem = boxes(do_desc, STAGES, SLAB, BLOCK_DV, IS_VARLEN)
    pq_smem = q_smem
    pk_smem = k_smem
    if HAS_PHI:
        pq_smem = factor_boxes(pq_desc, STAGES, SLAB, BLOCK_R, IS_VARLEN)
        pk_smem = factor_boxes(pk_desc, CONSUMERS, ROWS, BLOCK_R, IS_VARLEN)
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
        dpk_smem = factor_boxes(dpk_desc, CONSUMERS, ROWS, BLOCK_G, IS_VARLEN)
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
    queue = (counter_ptr,)
    if IS_VARLEN or REPEATABLE:
        unit_smem, told, heard = unit_slots(CONSUMERS)
        queue = (counter_ptr, unit_smem, told, heard)
    fence_async_shared()
    # Numbers, addresses and buffers go to the partitions in groups, constants one by one.
    descriptors = (q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc)
    over_keys = (dq_desc, dpq_desc, dq_smem, dpq_smem)
    over_queries = (dk_desc, dv_desc, dpk_desc, dpk_smem)
    rows = (lse_ptr, delta_ptr, stride_rows)
    of_queries = (q_smem, do_smem, pq_smem, lse_smem, delta_smem)
    of_keys = (k_smem, v_smem, pk_smem, sum_smem)
    barriers = (kv_full, kv_empty, q_full, q_empty, ds_full, ds_empty)
    deal = (units, num_blocks, pairs, heads)
    batch = (cu_k_ptr, cu_q_ptr, num_heads, group, seqlen_q, seqlen_k)
    band = (shift, left, right)
    owners_q = (pq_s1, pq_v2, pq_s2)
    owners_k = (pk_s1, pk_v2, pk_s2)
    terms = (terms_ptr, most_ptr, (mask_s1, mask_v2, mask_s2))
    centring = (phi_q_ptr, stride_pf, stride_pn, stride_pr, centre_ptr, stride_c, references, owners_q, owners_k)
    gl.warp_specialize(
        [
            (_consume, (0, over_keys, over_queries, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                        batch, slabs, band, scale, owners_q, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TERMS,
                        HAS_PHI, SUM_DPQ, SUM_DPK, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_SUM, BLOCK_G, WIDTH_D,
                        WIDTH_DV, q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout, sum_layout,
                        dq_layout, dpq_layout, dpk_layout, DQ_COLUMNS, CONSUMERS, ALTERNATES, IS_VARLEN, REPEATABLE)),
            (_consume, (1, over_keys, over_queries, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                        batch, slabs, band, scale, owners_q, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TERMS,
                        HAS_PHI, SUM_DPQ, SUM_DPK, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_SUM, BLOCK_G, WIDTH_D,
                        WIDTH_DV, q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout, sum_layout,
                        dq_layout, dpq_layout, dpk_layout, DQ_COLUMNS, CONSUMERS, ALTERNATES, IS_VARLEN, REPEATABLE)),
            (produce, (descriptors, rows, centring, terms, of_queries, of_keys, barriers, queue, deal, batch, band,
                       owners_q, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TERMS, HAS_PHI, SUM_DPQ, RANK, 1, STAGES,
                       BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G, CONSUMERS, 1, ALTERNATES, IS_VARLEN, REPEATABLE)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
