"""Backward pass for Hopper: one kernel for all gradients, dq and dphi_q by additions of the copy engine.

A program owns 128 or 192 keys, 64 to a warpgroup, and walks over the queries that see them. Scores are held keys by
queries:

    S^T = k q^T + phi_k phi_q^T     P^T = exp2(S^T scale log2(e) - lse)     dP^T = v dO^T     dS^T = P^T (dP^T - delta)
    dv += P^T dO     dk += dS^T q     dphi_k += dS^T phi_q                  dq += dS k     dphi_q += dS phi_k

P^T and dS^T are operands from registers, and so are k and v, which stay the same for a whole walk. dS goes through
shared memory to one warpgroup more, which makes the last line, over the keys of all others. So these wait for nobody,
and a step's dq is added to memory once for all keys of a program. While they work on one tile of keys the next one is
loaded. Wide heads have no registers for this: see `wide.py`.

Sums over keys (dq, dphi_q) are added to slabs of 64 queries, which hold their numbers in the order in which the
warpgroup's threads do (`slabs.py`): stored to shared memory without conflicts of banks, added as one block of memory;
as programs come to it or, where gradients must be repeatable, in one order (`order.py`). Scores may start from entries
of a table; a mask of keys hides rows of P^T; packed sequences have blocks of keys and slabs of their own.
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
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashbias.attention.hopper.order import await_turn, hand_over, turn_at
from flashbias.attention.hopper.scores import CENTRE_TILE
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
    first_terms_of_keys,
    key_codes,
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
def _walk(
    w: gl.constexpr, dk, dv, dphi, step, first, count, turned, start_n, shown, centre, operands, entries, of_queries,
    ds_smem, barriers, seqlen_k, band, qk_scale, IS_EDGE: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_TABLE: gl.constexpr, HAS_CODES: gl.constexpr, HAS_TERMS: gl.constexpr,
    HAS_PHI: gl.constexpr, SUM_DPK: gl.constexpr, CENTRES: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr,
    q_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr,
    CONSUMERS: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """Walk over `count` tiles of queries from `first`, the one `turned` steps in at first."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    k, v, pk = operands
    own_table, half_table, k_code, code_q_ptr, seqlen_q = entries
    q_smem, do_smem, pq_smem, lse_smem, delta_smem = of_queries
    _, _, q_full, q_empty, ds_full, ds_empty = barriers
    for n in range(count):
        stage = step % STAGES
        half = step & 1
        start_m = tile_at(first, n, count, turned, REPEATABLE) * SLAB
        # Read while the queries are on their way.
        s = first_terms_of_keys(own_table, half_table, k_code, code_q_ptr, seqlen_q, start_m, start_n, HAS_TABLE,
                                HAS_CODES)  # fmt: skip
        mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)
        q = q_smem.index(stage)._reinterpret(q_smem.dtype, [SLAB, BLOCK_D], q_layout)
        do = do_smem.index(stage)._reinterpret(do_smem.dtype, [SLAB, BLOCK_DV], do_layout)
        pq = q
        zero = gl.zeros([ROWS, SLAB], gl.float32, s_layout)
        s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=HAS_TABLE, is_async=True)
        if HAS_PHI:
            pq = pq_smem.index(stage)._reinterpret(pq_smem.dtype, [SLAB, BLOCK_R], pq_layout)
            s = warpgroup_mma(pk, pq.permute((1, 0)), s, is_async=True)
        dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = weights(s, lse_smem.index(stage * CENTRES + centre), shown, start_m, start_n, seqlen_k, band, qk_scale,
                    IS_EDGE, HAS_TAIL, HAS_LEFT, HAS_RIGHT, HAS_TERMS)  # fmt: skip
        p16 = gl.convert_layout(p.to(do_smem.dtype), gl.DotOperandLayout(0, dv_layout, 2))
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        # Read no earlier: registers are short until here.
        delta = delta_smem.index(stage).load(gl.SliceLayout(0, s_layout))
        ds = (p * (dp - delta[None, :])).to(q_smem.dtype)
        dk = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, dk_layout, 2)), q, dk, is_async=True)
        if SUM_DPK:
            ds_first = gl.convert_layout(ds, gl.DotOperandLayout(0, dphi_layout, 2))
            dphi = warpgroup_mma(ds_first, pq.slice(0, BLOCK_G, dim=1), dphi, is_async=True)
        mbarrier.wait(ds_empty.index(half), ((step >> 1) & 1) ^ 1)
        ds_smem.index(half * CONSUMERS + w).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(half))
        if SUM_DPK:
            dk, dv, dphi = warpgroup_mma_wait(0, deps=[dk, dv, dphi])
        else:
            dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        mbarrier.arrive(q_empty.index(stage))
        step += 1
    return dk, dv, dphi, step


@jit
def _sit_out(w: gl.constexpr, n, step, ds_smem, barriers, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A step of a warpgroup without keys: its dS is zero, in both buffers from the second step on."""
    _, _, q_full, q_empty, ds_full, ds_empty = barriers
    half = step & 1
    mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1)
    mbarrier.wait(ds_empty.index(half), ((step >> 1) & 1) ^ 1)
    if n < 2:
        zero = gl.zeros([ROWS, SLAB], ds_smem.dtype, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16]))
        ds_smem.index(half * CONSUMERS + w).store(zero)
        fence_async_shared()
    mbarrier.arrive(ds_full.index(half))
    mbarrier.arrive(q_empty.index(step % STAGES))


@jit
def _sum_over_keys(
    over_keys, terms, of_keys, ds_smem, barriers, queue, deal, batch, slabs, band, owners_q, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_TERMS: gl.constexpr, SUM_DPQ: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_SUM: gl.constexpr, BLOCK_G: gl.constexpr, k_layout: gl.constexpr, sum_layout: gl.constexpr,
    dq_layout: gl.constexpr, dpq_layout: gl.constexpr, CONSUMERS: gl.constexpr, KV_STAGES: gl.constexpr,
    ALTERNATES: gl.constexpr, IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """The last warpgroup: dq and dphi_q of each step, over the keys of all others."""
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    dq_of_step: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    dq_desc, dpq_desc, dq_smem, dpq_smem = over_keys
    k_smem, _v_smem, _pk_smem, sum_smem = of_keys
    kv_full, kv_empty, _q_full, _q_empty, ds_full, ds_empty = barriers
    num_heads = batch[2]
    group = batch[3]
    shift, left, right = band
    turn = 0
    step = 0
    unit, walk, turns = told_unit(
        0, (-1, 0), turns_of(deal[0], ALTERNATES), deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N
    )
    # The ticket of the slab that was added to last, and whose turn is next there; 0: it has been told.
    place = queue[0] if REPEATABLE else 0
    next_turn = 0
    while turn < turns:
        b, hk, block, blocks, queries, _keys, diagonal, first_slab = place_of_keys(
            turn, unit, walk, deal, batch, shift, IS_VARLEN, REPEATABLE, ALTERNATES, HAS_LEFT or HAS_RIGHT, BLOCK_N
        )
        own_q = queries[1]
        tiles = query_tiles(block * BLOCK_N, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        before = query_tiles((block - 1) * BLOCK_N, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        # Without steps it would run ahead otherwise, and free keys that nobody has read.
        slot = turn % KV_STAGES
        mbarrier.wait(kv_full.index(slot), (turn // KV_STAGES) & 1)
        keys = slot * CONSUMERS
        for g in range(group):
            bh = b * num_heads + hk * group + g
            f_q = owner_of(bh, owners_q)
            lo, _, _, hi = seen_tiles(tiles, terms, bh, block, blocks, HAS_TERMS and not REPEATABLE)
            turned = turn_of(block, blocks, hi - lo, HAS_LEFT or HAS_RIGHT)
            for n in range(hi - lo):
                row = tile_at(lo, n, hi - lo, turned, REPEATABLE)
                half = step & 1
                mbarrier.wait(ds_full.index(half), (step >> 1) & 1)
                dq = gl.zeros([SLAB, BLOCK_D], gl.float32, dq_of_step)
                for c in gl.static_range(CONSUMERS):
                    k = k_smem.index(keys + c)._reinterpret(k_smem.dtype, [ROWS, BLOCK_D], k_layout)
                    ds = ds_smem.index(half * CONSUMERS + c).permute((1, 0))
                    dq = warpgroup_mma(ds, k, dq, use_acc=c > 0, is_async=True)
                if SUM_DPQ:
                    dpq = gl.zeros([SLAB, BLOCK_G], gl.float32, dphi_layout)
                    for c in gl.static_range(CONSUMERS):
                        pk = sum_smem.index(keys + c)._reinterpret(sum_smem.dtype, [ROWS, BLOCK_SUM], sum_layout)
                        ds = ds_smem.index(half * CONSUMERS + c).permute((1, 0))
                        dpq = warpgroup_mma(ds, pk.slice(0, BLOCK_G, dim=1), dpq, use_acc=c > 0, is_async=True)
                if REPEATABLE:
                    # While they are in flight: what was added a step ago is done by now, and the next block's turn.
                    hand_over(place, next_turn)
                    place = queue[0] + 1 + bh * slabs + row
                    next_turn = block + 1
                    await_turn(place, turn_at(row, block, before[3]))
                if SUM_DPQ:
                    dq, dpq = warpgroup_mma_wait(0, deps=[dq, dpq])
                else:
                    dq = warpgroup_mma_wait(0, deps=[dq])
                mbarrier.arrive(ds_empty.index(half))
                # Two buffers of dq, one of dphi_q: what was added before from the same one has left it.
                sums = dq_smem.index(half)
                store_wait(2 if SUM_DPQ else 1)
                sums._reinterpret(gl.float32, [SLAB, BLOCK_D], dq_layout).store(dq)
                fence_async_shared()
                reduce_add(dq_desc, [(bh * slabs + first_slab + row) * (SLAB * BLOCK_D // LINE), 0], sums)
                if SUM_DPQ:
                    store_wait(1)
                    dpq_smem._reinterpret(gl.float32, [SLAB, BLOCK_G], dpq_layout).store(dpq)
                    fence_async_shared()
                    reduce_add(dpq_desc, [(f_q * slabs + first_slab + row) * (SLAB * BLOCK_G // LINE), 0], dpq_smem)
                step += 1
        mbarrier.arrive(kv_empty.index(slot))
        if REPEATABLE:
            hand_over(place, next_turn)
            next_turn = 0
        turn += 1
        unit, walk, turns = told_unit(turn, walk, turns, deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N)
    store_wait(0)


@jit
def _consume(
    w: gl.constexpr, over_queries, table, terms, of_queries, of_keys, ds_smem, barriers, queue, deal, batch, band,
    scale, owners_k, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_TABLE: gl.constexpr,
    HAS_CODES: gl.constexpr, HAS_TERMS: gl.constexpr, HAS_PHI: gl.constexpr, SUM_DPK: gl.constexpr,
    CENTRES: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
    BLOCK_G: gl.constexpr, q_layout: gl.constexpr,
    k_layout: gl.constexpr, v_layout: gl.constexpr, do_layout: gl.constexpr, pq_layout: gl.constexpr,
    pk_layout: gl.constexpr, dpk_layout: gl.constexpr, HOLDS_PHI: gl.constexpr, HAS_IDLE: gl.constexpr,
    CONSUMERS: gl.constexpr, KV_STAGES: gl.constexpr, ALTERNATES: gl.constexpr, IS_VARLEN: gl.constexpr,
    REPEATABLE: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: 64 keys of every tile."""
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    SKIPS_HIDDEN: gl.constexpr = HAS_TERMS and not REPEATABLE
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    dphi_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_G, 16])
    dk_desc, dv_desc, dpk_desc, dk_smem, dv_smem, dpk_smem = over_queries
    table_ptr, stride_table, half_table, code_q_ptr, code_k_ptr = table
    k_smem, v_smem, pk_smem, _sum_smem = of_keys
    kv_full = barriers[0]
    kv_empty = barriers[1]
    num_heads = batch[2]
    group = batch[3]
    shift, left, right = band
    turn = 0
    step = 0
    unit, walk, turns = told_unit(
        0, (-1, 0), turns_of(deal[0], ALTERNATES), deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N
    )
    while turn < turns:
        b, hk, block, blocks, queries, keys, diagonal, _slab = place_of_keys(
            turn, unit, walk, deal, batch, shift, IS_VARLEN, REPEATABLE, ALTERNATES, HAS_LEFT or HAS_RIGHT, BLOCK_N
        )
        own_q = queries[1]
        _, own_k, b_k, row_k = keys
        start_n = block * BLOCK_N
        tiles = query_tiles(start_n, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        dk = gl.zeros([ROWS, BLOCK_D], gl.float32, dk_layout)
        dv = gl.zeros([ROWS, BLOCK_DV], gl.float32, dv_layout)
        dphi = gl.zeros([ROWS, BLOCK_G], gl.float32, dphi_layout)
        slot = turn % KV_STAGES
        mbarrier.wait(kv_full.index(slot), (turn // KV_STAGES) & 1)
        # First operands from registers: the matrix unit then reads shared memory for the second ones alone.
        place = slot * CONSUMERS + w
        k = k_smem.index(place)._reinterpret(k_smem.dtype, [ROWS, BLOCK_D], k_layout)
        k = k.load(gl.DotOperandLayout(0, s_layout, 2))
        v = v_smem.index(place)._reinterpret(v_smem.dtype, [ROWS, BLOCK_DV], v_layout)
        v = v.load(gl.DotOperandLayout(0, s_layout, 2))
        pk = k
        if HAS_PHI:
            pk = pk_smem.index(place)._reinterpret(pk_smem.dtype, [ROWS, BLOCK_R], pk_layout)
            if HOLDS_PHI:
                pk = pk.load(gl.DotOperandLayout(0, s_layout, 2))
        centre = 0
        if CENTRES > 1:
            centre = (start_n + w * ROWS) // CENTRE_TILE - start_n // CENTRE_TILE
        k_code = key_codes(code_k_ptr, start_n + w * ROWS, own_k, HAS_CODES, gl.SliceLayout(1, s_layout))
        # Where this warpgroup has no keys, the others go on without it.
        members = group
        if w > 0 and HAS_IDLE:
            members = gl.where(start_n + w * ROWS < own_k, group, 0)
        for g in range(members):
            bh = b * num_heads + hk * group + g
            own_table = table_ptr
            if HAS_TABLE:
                own_table = table_ptr + (hk * group + g) * stride_table + half_table
            seen = seen_tiles(tiles, terms, bh, block, blocks, SKIPS_HIDDEN)
            shown = shown_keys(terms, bh, start_n + w * ROWS, blocks * BLOCK_N, HAS_TERMS)
            # From the last queries on where additions have an order.
            for part in gl.static_range(2 if REPEATABLE else 0, -1 if REPEATABLE else 3, -1 if REPEATABLE else 1):
                if part == 1 or (part == 0 and HAS_RIGHT) or (part == 2 and HAS_LEFT):
                    count = seen[part + 1] - seen[part]
                    dk, dv, dphi, step = _walk(
                        w, dk, dv, dphi, step, seen[part], count, turn_of(block, blocks, count, HAS_LEFT or HAS_RIGHT),
                        start_n + w * ROWS, shown, centre, (k, v, pk),
                        (own_table, half_table, k_code, code_q_ptr, own_q), of_queries, ds_smem, barriers, own_k,
                        (diagonal, left, right), scale * LOG2E, part != 1, HAS_TAIL, HAS_LEFT, HAS_RIGHT, HAS_TABLE,
                        HAS_CODES, HAS_TERMS, HAS_PHI, SUM_DPK, CENTRES, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G,
                        q_layout, do_layout, pq_layout, CONSUMERS, REPEATABLE,
                    )  # fmt: skip
        if w > 0 and HAS_IDLE:
            idle = (group - members) * (tiles[3] - tiles[0])
            if SKIPS_HIDDEN:
                idle = 0
                for g in range(group - members):
                    lo, _, _, hi = seen_tiles(tiles, terms, b * num_heads + hk * group + g, block, blocks, SKIPS_HIDDEN)
                    idle += hi - lo
            for n in range(idle):
                _sit_out(w, n, step, ds_smem, barriers, STAGES, CONSUMERS)
                step += 1
        mbarrier.arrive(kv_empty.index(slot))
        # What was stored before has left these buffers long ago.
        store_wait(0)
        dk_smem.index(w)._reinterpret(dk_desc.dtype, [ROWS, BLOCK_D], k_layout).store((dk * scale).to(dk_desc.dtype))
        dv_smem.index(w)._reinterpret(dv_desc.dtype, [ROWS, BLOCK_DV], v_layout).store(dv.to(dv_desc.dtype))
        if SUM_DPK:
            own = dpk_smem.index(w)
            own._reinterpret(gl.float32, [ROWS, BLOCK_G], dpk_layout).store(dphi * scale)
        fence_async_shared()
        store_rows(dk_desc, b_k, hk, row_k + start_n + w * ROWS, dk_smem.index(w), IS_VARLEN)
        store_rows(dv_desc, b_k, hk, row_k + start_n + w * ROWS, dv_smem.index(w), IS_VARLEN)
        if SUM_DPK:
            f_k = owner_of(b * num_heads + hk * group, owners_k)
            add_factor(dpk_desc, b_k, f_k, row_k + start_n + w * ROWS, dpk_smem.index(w), IS_VARLEN)
        turn += 1
        unit, walk, turns = told_unit(turn, walk, turns, deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N)
    store_wait(0)


@jit(
    do_not_specialize=[
        "units", "pairs", "heads", "num_blocks", "num_heads", "group", "slabs", "stride_rows", "seqlen_q", "seqlen_k",
        "shift", "left", "right", "pq_s1", "pq_v2", "pq_s2", "pk_s1", "pk_v2", "pk_s2", "stride_pf", "stride_pn",
        "stride_pr", "stride_c", "references", "mask_s1", "mask_v2", "mask_s2", "stride_table", "half_table",
    ]
)  # fmt: skip
def _bwd_kernel(
    q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc, dq_desc, dk_desc, dv_desc, dpq_desc, dpk_desc,
    lse_ptr, delta_ptr, phi_q_ptr, centre_ptr, terms_ptr, most_ptr, cu_q_ptr, cu_k_ptr, counter_ptr, units, pairs,
    heads, num_blocks, num_heads, group, slabs, stride_rows, seqlen_q, seqlen_k, shift, left, right, scale, pq_s1,
    pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, stride_pf, stride_pn, stride_pr, stride_c, references, mask_s1, mask_v2,
    mask_s2, table_ptr, code_q_ptr, code_k_ptr, stride_table, half_table, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_TABLE: gl.constexpr, HAS_CODES: gl.constexpr,
    HAS_TERMS: gl.constexpr, HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, SUM_DPK: gl.constexpr, RANK: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr,
    HOLDS_PHI: gl.constexpr, HAS_IDLE: gl.constexpr, CONSUMERS: gl.constexpr, KV_STAGES: gl.constexpr,
    ALTERNATES: gl.constexpr, IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr, REGISTERS: gl.constexpr,
    SUM_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    q_layout: gl.constexpr, k_layout: gl.constexpr, v_layout: gl.constexpr, do_layout: gl.constexpr,
    pq_layout: gl.constexpr, pk_layout: gl.constexpr, sum_layout: gl.constexpr, ds_layout: gl.constexpr,
    dq_layout: gl.constexpr, dpq_layout: gl.constexpr, dpk_layout: gl.constexpr,
):  # fmt: skip
    """All gradients; a program takes tiles of keys of a (batch, head of keys), which it is dealt or draws."""
    KEYS: gl.constexpr = KV_STAGES * CONSUMERS
    k_smem = boxes(k_desc, KEYS, ROWS, BLOCK_D, IS_VARLEN)
    v_smem = boxes(v_desc, KEYS, ROWS, BLOCK_DV, IS_VARLEN)
    dk_smem = boxes(dk_desc, CONSUMERS, ROWS, BLOCK_D, IS_VARLEN)
    dv_smem = boxes(dv_desc, CONSUMERS, ROWS, BLOCK_DV, IS_VARLEN)
    q_smem = boxes(q_desc, STAGES, SLAB, BLOCK_D, IS_VARLEN)
    do_smem = boxes(do_desc, STAGES, SLAB, BLOCK_DV, IS_VARLEN)
    pq_smem = q_smem
    pk_smem = k_smem
    if HAS_PHI:
        pq_smem = factor_boxes(pq_desc, STAGES, SLAB, BLOCK_R, IS_VARLEN)
        pk_smem = factor_boxes(pk_desc, KEYS, ROWS, BLOCK_R, IS_VARLEN)
    # What dphi_q is the sum of: the factors themselves, or what goes with centres by tile.
    BLOCK_SUM: gl.constexpr = BLOCK_R if RANK == 0 else BLOCK_G
    # Two warpgroups have the keys of one centre.
    CENTRES: gl.constexpr = 2 if RANK > 0 and CONSUMERS % 2 == 1 else 1
    sum_smem = pk_smem
    if SUM_DPQ and RANK > 0:
        sum_smem = gl.allocate_shared_memory(sum_desc.dtype, [KEYS, 1, ROWS, BLOCK_G], sum_desc.layout)
    ds_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS, ROWS, SLAB], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, SLAB * BLOCK_D // LINE, LINE], dq_desc.layout)
    dpq_smem = dq_smem
    dpk_smem = dq_smem
    if SUM_DPQ:
        dpq_smem = gl.allocate_shared_memory(gl.float32, [SLAB * BLOCK_G // LINE, LINE], dpq_desc.layout)
    if SUM_DPK:
        dpk_smem = factor_boxes(dpk_desc, CONSUMERS, ROWS, BLOCK_G, IS_VARLEN)
    # A thread reads 16 bytes at a time of what its columns need.
    rows_layout: gl.constexpr = gl.SharedLinearLayout(offset_bases=[[1], [8], [2], [4], [16], [32]])
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES * CENTRES, SLAB], rows_layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, SLAB], rows_layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(KV_STAGES):
        mbarrier.init(kv_full.index(slot), count=1)
        mbarrier.init(kv_empty.index(slot), count=CONSUMERS + 1)
    for n in gl.static_range(2):
        mbarrier.init(ds_full.index(n), count=CONSUMERS)
        mbarrier.init(ds_empty.index(n), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=2)
        mbarrier.init(q_empty.index(stage), count=CONSUMERS)
    queue = (counter_ptr,)
    if IS_VARLEN or REPEATABLE:
        unit_smem, told, heard = unit_slots(CONSUMERS + 1)
        queue = (counter_ptr, unit_smem, told, heard)
    fence_async_shared()
    # Numbers, addresses and buffers go to the partitions in groups, constants one by one.
    descriptors = (q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc)
    over_keys = (dq_desc, dpq_desc, dq_smem, dpq_smem)
    over_queries = (dk_desc, dv_desc, dpk_desc, dk_smem, dv_smem, dpk_smem)
    rows = (lse_ptr, delta_ptr, stride_rows)
    of_queries = (q_smem, do_smem, pq_smem, lse_smem, delta_smem)
    of_keys = (k_smem, v_smem, pk_smem, sum_smem)
    barriers = (kv_full, kv_empty, q_full, q_empty, ds_full, ds_empty)
    deal = (units, num_blocks, pairs, heads)
    batch = (cu_k_ptr, cu_q_ptr, num_heads, group, seqlen_q, seqlen_k)
    band = (shift, left, right)
    owners_q = (pq_s1, pq_v2, pq_s2)
    owners_k = (pk_s1, pk_v2, pk_s2)
    table = (table_ptr, stride_table, half_table, code_q_ptr, code_k_ptr)
    terms = (terms_ptr, most_ptr, (mask_s1, mask_v2, mask_s2))
    centring = (phi_q_ptr, stride_pf, stride_pn, stride_pr, centre_ptr, stride_c, references, owners_q, owners_k)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, over_queries, table, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                            batch, band, scale, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TABLE, HAS_CODES,
                            HAS_TERMS, HAS_PHI, SUM_DPK, CENTRES, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G,
                            q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout,
                            dpk_layout, HOLDS_PHI, HAS_IDLE, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN, REPEATABLE)),
                (_consume, (1, over_queries, table, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                            batch, band, scale, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TABLE, HAS_CODES,
                            HAS_TERMS, HAS_PHI, SUM_DPK, CENTRES, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G,
                            q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout,
                            dpk_layout, HOLDS_PHI, HAS_IDLE, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN, REPEATABLE)),
                (_sum_over_keys, (over_keys, terms, of_keys, ds_smem, barriers, queue, deal, batch, slabs, band,
                                  owners_q, HAS_LEFT, HAS_RIGHT, HAS_TERMS, SUM_DPQ, BLOCK_D, BLOCK_SUM, BLOCK_G,
                                  k_layout, sum_layout, dq_layout, dpq_layout, CONSUMERS, KV_STAGES, ALTERNATES,
                                  IS_VARLEN, REPEATABLE)),
                (produce, (descriptors, rows, centring, terms, of_queries, of_keys, barriers, queue, deal, batch,
                           band, owners_q, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TERMS, HAS_PHI, SUM_DPQ, RANK, CENTRES,
                           STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN,
                           REPEATABLE)),
            ],
            [4, 4, 1],
            [REGISTERS, SUM_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, over_queries, table, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                            batch, band, scale, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TABLE, HAS_CODES,
                            HAS_TERMS, HAS_PHI, SUM_DPK, CENTRES, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G,
                            q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout,
                            dpk_layout, HOLDS_PHI, HAS_IDLE, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN, REPEATABLE)),
                (_consume, (1, over_queries, table, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                            batch, band, scale, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TABLE, HAS_CODES,
                            HAS_TERMS, HAS_PHI, SUM_DPK, CENTRES, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G,
                            q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout,
                            dpk_layout, HOLDS_PHI, HAS_IDLE, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN, REPEATABLE)),
                (_consume, (2, over_queries, table, terms, of_queries, of_keys, ds_smem, barriers, queue, deal,
                            batch, band, scale, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TAIL, HAS_TABLE, HAS_CODES,
                            HAS_TERMS, HAS_PHI, SUM_DPK, CENTRES, STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G,
                            q_layout, k_layout, v_layout, do_layout, pq_layout, pk_layout,
                            dpk_layout, HOLDS_PHI, HAS_IDLE, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN, REPEATABLE)),
                (_sum_over_keys, (over_keys, terms, of_keys, ds_smem, barriers, queue, deal, batch, slabs, band,
                                  owners_q, HAS_LEFT, HAS_RIGHT, HAS_TERMS, SUM_DPQ, BLOCK_D, BLOCK_SUM, BLOCK_G,
                                  k_layout, sum_layout, dq_layout, dpq_layout, CONSUMERS, KV_STAGES, ALTERNATES,
                                  IS_VARLEN, REPEATABLE)),
                (produce, (descriptors, rows, centring, terms, of_queries, of_keys, barriers, queue, deal, batch,
                           band, owners_q, owners_k, HAS_LEFT, HAS_RIGHT, HAS_TERMS, HAS_PHI, SUM_DPQ, RANK, CENTRES,
                           STAGES, BLOCK_D, BLOCK_DV, BLOCK_R, BLOCK_G, CONSUMERS, KV_STAGES, ALTERNATES, IS_VARLEN,
                           REPEATABLE)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, SUM_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
