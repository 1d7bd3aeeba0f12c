"""Walks over queries as both backward kernels make them: where they begin, the loading warp, weights of a tile."""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.gluon import gl, jit, load, mbarrier
from flashbias.attention.hopper.scores import CENTRE_TILE, centring_of, tile_offset
from flashbias.attention.hopper.slabs import LINE as _LINE
from flashbias.attention.hopper.tiles import (
    ROWS,
    SLAB,
    claimed,
    exp2,
    heard_of,
    load_factor,
    load_rows,
    own_index,
    owner_of,
    place_of,
    query_tiles,
    rows_of,
    turns_of,
    unit_of,
)

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
def shown_keys(terms, bh, start_n, keys, HAS_TERMS: gl.constexpr):
    """Which of a warpgroup's keys the caller's own mask shows to a head; those past the end are none of them."""
    if HAS_TERMS:
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
        rows = owner_of(bh, terms[2]).to(gl.int64) * keys + start_n
        return gl.load(terms[0] + rows + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))) == 0.0
    else:
        return start_n


@jit
def seen_tiles(tiles, terms, bh, block, num_blocks, HAS_TERMS: gl.constexpr):
    """Tiles of queries of one head that see a block of keys: none where the caller's own mask hides all of it."""
    lo, full_lo, full_hi, hi = tiles
    if HAS_TERMS:
        most = gl.load(terms[1] + owner_of(bh, terms[2]).to(gl.int64) * num_blocks + block)
        hi = gl.where(most == 0.0, hi, lo)
        full_lo = gl.minimum(full_lo, hi)
        full_hi = gl.minimum(full_hi, hi)
    return lo, full_lo, full_hi, hi


@jit
def produce(
    q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc, lse_ptr, delta_ptr, centring, terms, q_smem, k_smem,
    v_smem, do_smem, pq_smem, pk_smem, sum_smem, lse_smem, delta_smem, kv_full, kv_empty, q_full, q_empty, starts,
    queue, units, pairs, heads, num_blocks, num_heads, group, stride_rows, seqlen_q, shift, left, right, pq_s1, pq_v2,
    pq_s2, pk_s1, pk_v2, pk_s2, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_TERMS: gl.constexpr,
    HAS_PHI: gl.constexpr, SUM_DPQ: gl.constexpr, RANK: gl.constexpr, CENTRES: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr,
    CONSUMERS: gl.constexpr, KV_STAGES: gl.constexpr, ALTERNATES: gl.constexpr, IS_VARLEN: gl.constexpr,
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
    walk = (-1, 0)
    turns = turns_of(units, ALTERNATES)
    if IS_VARLEN:
        unit, walk, turns = next_unit(0, walk, starts, queue, pairs, num_heads // group, BLOCK_N)
    while turn < turns:
        if not IS_VARLEN:
            unit = unit_of(turn, ALTERNATES)
        b, hk, block, blocks, queries, keys, diagonal, _slab = place_of_keys(
            unit, walk, starts, num_blocks, pairs, heads, num_heads // group, seqlen_q, 0, shift, IS_VARLEN,
            HAS_LEFT or HAS_RIGHT, BLOCK_N,
        )  # fmt: skip
        start_n = block * BLOCK_N
        own_q = queries[1]
        b_q = queries[2]
        row_q = queries[3]
        b_k = keys[2]
        row_k = keys[3]
        tiles = query_tiles(start_n, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        slot = turn % KV_STAGES
        mbarrier.wait(kv_empty.index(slot), ((turn // KV_STAGES) & 1) ^ 1)
        full = kv_full.index(slot)
        mbarrier.expect(full, 2 * BLOCK_N * key_width)
        f_k = own_index(b * num_heads + hk * group, pk_s1, pk_v2, pk_s2)
        for w in gl.static_range(CONSUMERS):
            place = slot * CONSUMERS + w
            load_rows(k_desc, b_k, hk, row_k + start_n + w * ROWS, full, k_smem.index(place), IS_VARLEN)
            load_rows(v_desc, b_k, hk, row_k + start_n + w * ROWS, full, v_smem.index(place), IS_VARLEN)
            if HAS_PHI:
                load_factor(pk_desc, b_k, f_k, row_k + start_n + w * ROWS, full, pk_smem.index(place), IS_VARLEN)
            if HAS_SUM:
                load(sum_desc, [f_k, start_n + w * ROWS, 0], full, sum_smem.index(place))
        for g in range(group):
            h = hk * group + g
            bh = b * num_heads + h
            f_q = own_index(bh, pq_s1, pq_v2, pq_s2)
            lo, _, _, hi = seen_tiles(tiles, terms, bh, block, blocks, HAS_TERMS)
            turned = turn_of(block, blocks, hi - lo, HAS_LEFT or HAS_RIGHT)
            for n in range(hi - lo):
                start_m = turned_tile(lo, n, hi - lo, turned) * SLAB
                stage = step % STAGES
                rows = bh.to(gl.int64) * stride_rows + start_m
                if IS_VARLEN:
                    # Rows past the end are those of the next sequence, queries there zeros: they get weights of 0.
                    inside = start_m + offs_m < own_q
                    rows += queries[0]
                    lse = gl.load(lse_ptr + rows + offs_m, mask=inside, other=float("inf"))
                    delta = gl.load(delta_ptr + rows + offs_m, mask=inside, other=0.0)
                else:
                    lse = gl.load(lse_ptr + rows + offs_m)
                    delta = gl.load(delta_ptr + rows + offs_m)
                own = lse
                after = lse
                if RANK > 0:
                    # Scores are measured from the centre of their keys, the sum from that opposite to the queries.
                    found = centring_of(centring, bh, start_m, own_q, RANK)
                    own = lse - tile_offset(found, start_n, RANK, per_lane)
                    if CENTRES > 1:
                        after = lse - tile_offset(found, start_n + CENTRE_TILE, RANK, per_lane)
                mbarrier.wait(q_empty.index(stage), ((step // STAGES) & 1) ^ 1)
                full = q_full.index(stage)
                mbarrier.expect(full, 2 * SLAB * width)
                load_rows(q_desc, b_q, h, row_q + start_m, full, q_smem.index(stage), IS_VARLEN)
                if HAS_PHI:
                    load_factor(pq_desc, b_q, f_q, row_q + start_m, full, pq_smem.index(stage), IS_VARLEN)
                load_rows(do_desc, b_q, h, row_q + start_m, full, do_smem.index(stage), IS_VARLEN)
                lse_smem.index(stage * CENTRES).store(own)
                if CENTRES > 1:
                    lse_smem.index(stage * CENTRES + 1).store(after)
                delta_smem.index(stage).store(delta)
                mbarrier.arrive(full)
                step += 1
        turn += 1
        if IS_VARLEN:
            # Late, so that programs end together; the others have all stages before them meanwhile.
            unit, walk, turns = next_unit(turn, walk, starts, queue, pairs, num_heads // group, BLOCK_N)


@jit
def next_unit(turn, walk, starts, queue, sequences, kv_heads, BLOCK_N: gl.constexpr):
    """The next unit of a packed batch, in the loading warp.

    Returns the unit, how far the walk along the sequences has come, and the number of turns with this one; without it
    where none is left.
    """
    unit, walk = claimed(turn, walk, (starts[0], starts[1], sequences, kv_heads), queue, BLOCK_N)
    return unit, walk, gl.where(unit >= 0, turn + 1, turn)


@jit
def told_unit(turn, walk, starts, queue, sequences, kv_heads, BLOCK_N: gl.constexpr):
    """As `next_unit`, in the warps that are told."""
    unit, walk = heard_of(turn, walk, (starts[0], starts[1], sequences, kv_heads), queue, BLOCK_N)
    return unit, walk, gl.where(unit >= 0, turn + 1, turn)


@jit
def place_of_keys(
    unit, walk, starts, num_blocks, pairs, heads, kv_heads, seqlen_q, seqlen_k, shift, IS_VARLEN: gl.constexpr,
    IS_BANDED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Where a unit lies; in a packed batch `walk` has come to its sequence, and `starts` are those of keys and queries.

    Batch element, head of keys, block of keys, and how many there are; of queries and of keys start, length, and what
    the copy engine takes for a batch element and its first row; shift of the diagonal; first slab of the sequence.
    """
    if IS_VARLEN:
        # All heads of a block come together; the first block of a sequence, under a causal mask the longest, is first.
        sequence, end = walk
        keys = rows_of(starts[0], sequence)
        queries = rows_of(starts[1], sequence)
        blocks = (keys[1] + BLOCK_N - 1) // BLOCK_N
        block = unit // kv_heads - (end - blocks)
        diagonal = shift * (keys[1] - queries[1])
        return 0, unit % kv_heads, block, blocks, queries, keys, diagonal, queries[0] // SLAB + sequence
    else:
        b, hk, block = key_tile_of(unit, num_blocks, pairs, heads, kv_heads, IS_BANDED)
        return b, hk, block, num_blocks, (0, seqlen_q, b, 0), (0, seqlen_k, b, 0), shift, 0


@jit
def key_tile_of(unit, num_blocks, pairs, heads, kv_heads, IS_BANDED: gl.constexpr):
    """Batch, head of keys and block of keys of a unit; under a causal mask the first blocks are the longest."""
    pair, block = place_of(unit, num_blocks, pairs, heads, IS_BANDED)
    return pair // kv_heads, pair % kv_heads, block


@jit
def weights(s, lse_smem, shown, start_m, start_n, seqlen_k, shift, left, right, qk_scale, IS_EDGE: gl.constexpr,
             HAS_TAIL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
             HAS_TERMS: gl.constexpr):  # fmt: skip
    """P^T of a tile, 0 where the band, the end of the keys or the caller's own mask hides.

    By selection: the log-sum-exp does not count what is hidden, so its power may be infinite.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    p = exp2(s * qk_scale - lse_smem.load(columns)[None, :])
    if IS_EDGE or HAS_TAIL or HAS_TERMS:
        j = start_n + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))[:, None]
        keep = shown[:, None] if HAS_TERMS else j < seqlen_k
        if IS_EDGE:
            i = start_m + gl.arange(0, SLAB, columns)[None, :]
            if HAS_RIGHT:
                keep = keep & (j - i <= shift + right)
            if HAS_LEFT:
                keep = keep & (j - i >= shift - left)
        p = gl.where(keep, p, 0.0)
    return p
