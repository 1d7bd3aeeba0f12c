"""Walks over queries as both backward kernels make them: where they begin, the loading warp, weights of a tile."""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.gluon import gl, jit, load, mbarrier
from flashbias.attention.hopper.order import claim
from flashbias.attention.hopper.scores import CENTRE_TILE, centring_of, tile_offset
from flashbias.attention.hopper.slabs import LINE as _LINE
from flashbias.attention.hopper.tiles import ROWS, SLAB, exp2, own_index, place_of, query_tiles, turns_of, unit_of

LINE = gl.constexpr(_LINE)
"""Numbers of a row of a box of slabs."""


@jit
def turn_of(block, num_blocks, count, IS_BANDED: gl.constexpr):
    """Where a block of keys begins its walk: each elsewhere, so that programs do not add to the same rows at once."""
    if IS_BANDED:
        return 0
    else:
        return block * count // num_blocks


@jit
def turned_tile(first, n, count, turned):
    """The n-th tile of a walk that begins `turned` steps in and goes round."""
    m = n + turned
    return first + (m - count if m >= count else m)


@jit
def tile_at(first, n, count, turned, REPEATABLE: gl.constexpr):
    """The n-th tile of a walk: backwards where additions have an order (`order.py`)."""
    if REPEATABLE:
        return first + count - 1 - n
    else:
        return turned_tile(first, n, count, turned)


@jit
def produce(
    q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc, lse_ptr, delta_ptr, centring, q_smem, k_smem, v_smem,
    do_smem, pq_smem, pk_smem, sum_smem, lse_smem, delta_smem, kv_full, kv_empty, q_full, q_empty, queue, units, pairs,
    heads, num_blocks, num_heads, group, stride_rows, seqlen_q, shift, left, right, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2,
    pk_s2, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr,
    RANK: gl.constexpr, CENTRES: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr, CONSUMERS: gl.constexpr, KV_STAGES: gl.constexpr,
    ALTERNATES: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys and values of every tile, and the queries that see them."""
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    HAS_SUM: gl.constexpr = SUM_DPQ and RANK > 0
    width: gl.constexpr = BLOCK_D + BLOCK_DV + (BLOCK_R if HAS_PHI else 0)
    key_width: gl.constexpr = width + (BLOCK_G if HAS_SUM else 0)
    per_lane: gl.constexpr = gl.BlockedLayout([SLAB // 32], [32], [1], [0])
    offs_m = gl.arange(0, SLAB, per_lane)
    turn = 0
    step = 0
    unit = 0
    turns = turns_of(units, ALTERNATES)
    if REPEATABLE:
        unit, turns = claim(0, units, queue)
    while turn < turns:
        if not REPEATABLE:
            unit = unit_of(turn, ALTERNATES)
        b, hk, block = key_tile_of(
            unit, num_blocks, pairs, heads, num_heads // group, HAS_LEFT or HAS_RIGHT or REPEATABLE
        )
        start_n = block * BLOCK_N
        lo, _, _, hi = query_tiles(start_n, seqlen_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        slot = turn % KV_STAGES
        mbarrier.wait(kv_empty.index(slot), ((turn // KV_STAGES) & 1) ^ 1)
        full = kv_full.index(slot)
        mbarrier.expect(full, 2 * BLOCK_N * key_width)
        f_k = own_index(b * num_heads + hk * group, pk_s1, pk_v2, pk_s2)
        for w in gl.static_range(CONSUMERS):
            place = slot * CONSUMERS + w
            load(k_desc, [b, hk, start_n + w * ROWS, 0], full, k_smem.index(place))
            load(v_desc, [b, hk, start_n + w * ROWS, 0], full, v_smem.index(place))
            if HAS_PHI:
                load(pk_desc, [f_k, start_n + w * ROWS, 0], full, pk_smem.index(place))
            if HAS_SUM:
                load(sum_desc, [f_k, start_n + w * ROWS, 0], full, sum_smem.index(place))
        for g in range(group):
            h = hk * group + g
            bh = b * num_heads + h
            f_q = own_index(bh, pq_s1, pq_v2, pq_s2)
            turned = turn_of(block, num_blocks, hi - lo, HAS_LEFT or HAS_RIGHT)
            for n in range(hi - lo):
                start_m = tile_at(lo, n, hi - lo, turned, REPEATABLE) * SLAB
                stage = step % STAGES
                rows = bh.to(gl.int64) * stride_rows + start_m
                lse = gl.load(lse_ptr + rows + offs_m)
                delta = gl.load(delta_ptr + rows + offs_m)
                own = lse
                after = lse
                if RANK > 0:
                    # Scores are measured from the centre of their keys, the sum from that opposite to the queries.
                    found = centring_of(centring, bh, start_m, seqlen_q, RANK)
                    own = lse - tile_offset(found, start_n, RANK, per_lane)
                    if CENTRES > 1:
                        after = lse - tile_offset(found, start_n + CENTRE_TILE, RANK, per_lane)
                mbarrier.wait(q_empty.index(stage), ((step // STAGES) & 1) ^ 1)
                full = q_full.index(stage)
                mbarrier.expect(full, 2 * SLAB * width)
                load(q_desc, [b, h, start_m, 0], full, q_smem.index(stage))
                if HAS_PHI:
                    load(pq_desc, [f_q, start_m, 0], full, pq_smem.index(stage))
                load(do_desc, [b, h, start_m, 0], full, do_smem.index(stage))
                lse_smem.index(stage * CENTRES).store(own)
                if CENTRES > 1:
                    lse_smem.index(stage * CENTRES + 1).store(after)
                delta_smem.index(stage).store(delta)
                mbarrier.arrive(full)
                step += 1
        turn += 1
        if REPEATABLE:
            unit, turns = claim(turn, units, queue)


@jit
def key_tile_of(unit, num_blocks, pairs, heads, kv_heads, IS_BANDED: gl.constexpr):
    """Batch, head of keys and block of keys of a unit; under a causal mask the first blocks are the longest."""
    pair, block = place_of(unit, num_blocks, pairs, heads, IS_BANDED)
    return pair // kv_heads, pair % kv_heads, block


@jit
def weights(s, lse_smem, start_m, start_n, seqlen_k, shift, left, right, qk_scale, IS_EDGE: gl.constexpr,
             HAS_TAIL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    """P^T of a tile, 0 where the band or the end of the keys hides."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    p = exp2(s * qk_scale - lse_smem.load(columns)[None, :])
    if IS_EDGE or HAS_TAIL:
        j = start_n + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))[:, None]
        keep = j < seqlen_k
        if IS_EDGE:
            i = start_m + gl.arange(0, SLAB, columns)[None, :]
            if HAS_RIGHT:
                keep = keep & (j - i <= shift + right)
            if HAS_LEFT:
                keep = keep & (j - i >= shift - left)
        p = gl.where(keep, p, 0.0)
    return p
