"""Walks over queries as both backward kernels make them: where they begin, the loading warp, weights of a tile.

What they are about is handed on in groups, beside those of `tiles.py`:

- `deal`: units, blocks of keys of a (batch, head of keys) pair, pairs (packed: sequences), pairs dealt together.
- `batch`: starts of packed keys and queries, heads of queries, of those that share their keys, queries, keys.
- `band`: shift of the diagonal, sides of the window to the left and to the right.
- `terms`: what the caller's own mask of keys adds to scores, its largest for each tile, whose mask it is.
- `table`: address, from one head's to the next, entries on each side of the middle one, codes of queries and keys.
- `of_queries`: buffers of queries, dO, factors, log-sum-exp and delta.
- `of_keys`: buffers of keys, values, factors, and of what dphi_q is summed from.
- `over_keys`, `over_queries`: boxes and buffers of dq and dphi_q, of dk, dv and dphi_k.
- `barriers`: keys are there, are free; queries are there, are free; dS is there, is free.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.gluon import gl, jit, load, mbarrier
from flashbias.attention.hopper.order import drawn
from flashbias.attention.hopper.scores import CENTRE_TILE, centring_of, entries, tail_of, tile_offset
from flashbias.attention.hopper.slabs import LINE as _LINE
from flashbias.attention.hopper.tiles import (
    ROWS,
    SLAB,
    claimed,
    exp2,
    hear,
    heard_of,
    load_factor,
    load_rows,
    owner_of,
    place_of,
    query_tiles,
    rows_of,
    turns_of,
    unit_of,
)

LINE = gl.constexpr(_LINE)
"""Numbers of a row of a box of slabs."""


# -------------------------------------------------------------------- which unit


@jit
def next_unit(turn, walk, turns, deal, batch, queue, IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr,
              BLOCK_N: gl.constexpr):  # fmt: skip
    """The next unit, in the loading warp, which tells the others where units are drawn.

    Returns the unit, how far the walk along packed sequences has come, and the number of turns with this one, or
    without it where none is left. Where units are dealt beforehand, `place_of_keys` knows them, and `turns` all.
    """
    unit = 0
    if IS_VARLEN:
        unit, walk = claimed(turn, walk, (batch[0], batch[1], deal[2], batch[2] // batch[3]), queue, BLOCK_N)
        turns = gl.where(unit >= 0, turn + 1, turn)
    if REPEATABLE:
        unit = drawn(turn, deal[0], queue)
        turns = gl.where(unit >= 0, turn + 1, turn)
    return unit, walk, turns


@jit
def told_unit(turn, walk, turns, deal, batch, queue, IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr,
              BLOCK_N: gl.constexpr):  # fmt: skip
    """As `next_unit`, in the warps that are told."""
    unit = 0
    if IS_VARLEN:
        unit, walk = heard_of(turn, walk, (batch[0], batch[1], deal[2], batch[2] // batch[3]), queue, BLOCK_N)
        turns = gl.where(unit >= 0, turn + 1, turn)
    if REPEATABLE:
        unit = hear(turn, queue)
        turns = gl.where(unit >= 0, turn + 1, turn)
    return unit, walk, turns


@jit
def place_of_keys(turn, unit, walk, deal, batch, shift, IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr,
                  ALTERNATES: gl.constexpr, IS_BANDED: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """Where the unit of a turn lies; in a packed batch `walk` has come to its sequence.

    Batch element, head of keys, block of keys, and how many there are; of queries and of keys start, length, and what
    the copy engine takes for a batch element and its first row; shift of the diagonal; first slab of the sequence.
    """
    _units, num_blocks, pairs, heads = deal
    cu_k_ptr, cu_q_ptr, num_heads, group, seqlen_q, seqlen_k = batch
    kv_heads = num_heads // group
    if IS_VARLEN:
        # All heads of a block come together; the first block of a sequence, under a causal mask the longest, is first.
        sequence, end = walk
        keys = rows_of(cu_k_ptr, sequence)
        queries = rows_of(cu_q_ptr, sequence)
        blocks = (keys[1] + BLOCK_N - 1) // BLOCK_N
        block = unit // kv_heads - (end - blocks)
        diagonal = shift * (keys[1] - queries[1])
        return 0, unit % kv_heads, block, blocks, queries, keys, diagonal, queries[0] // SLAB + sequence
    else:
        if not REPEATABLE:
            unit = unit_of(turn, ALTERNATES)
        # The first blocks of a pair, under a causal mask the longest, are first.
        pair, block = place_of(unit, num_blocks, pairs, heads, IS_BANDED or REPEATABLE)
        b = pair // kv_heads
        return b, pair % kv_heads, block, num_blocks, (0, seqlen_q, b, 0), (0, seqlen_k, b, 0), shift, 0


# -------------------------------------------------------------------- which queries


@jit
def turn_of(block, num_blocks, count, IS_BANDED: gl.constexpr):
    """Where a block of keys begins its walk: each elsewhere, so that programs do not add to the same rows at once."""
    if IS_BANDED:
        return 0
    else:
        return block * count // num_blocks


@jit
def tile_at(first, n, count, turned, REPEATABLE: gl.constexpr):
    """The n-th tile of a walk that begins `turned` steps in and goes round; backwards where additions have an order."""
    if REPEATABLE:
        return first + count - 1 - n
    else:
        m = n + turned
        return first + (m - count if m >= count else m)


@jit
def seen_tiles(tiles, terms, bh, block, num_blocks, SKIPS_HIDDEN: gl.constexpr):
    """Tiles of queries of one head that see a block of keys: none where the caller's own mask hides all of it.

    Where additions have an order none is left out: the next block waits for this one.
    """
    lo, full_lo, full_hi, hi = tiles
    if SKIPS_HIDDEN:
        most = gl.load(terms[1] + owner_of(bh, terms[2]).to(gl.int64) * num_blocks + block)
        hi = gl.where(most == 0.0, hi, lo)
        full_lo = gl.minimum(full_lo, hi)
        full_hi = gl.minimum(full_hi, hi)
    return lo, full_lo, full_hi, hi


# -------------------------------------------------------------------- the loading warp


@jit
def produce(
    descriptors, rows, centring, terms, of_queries, of_keys, barriers, queue, deal, batch, band, owners_q, owners_k,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_TERMS: gl.constexpr, HAS_PHI: gl.constexpr,
    SUM_DPQ: gl.constexpr, RANK: gl.constexpr, CENTRES: gl.constexpr, STAGES: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_G: gl.constexpr, CONSUMERS: gl.constexpr,
    KV_STAGES: gl.constexpr, ALTERNATES: gl.constexpr, IS_VARLEN: gl.constexpr, REPEATABLE: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys and values of every tile, and the queries that see them."""
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    HAS_SUM: gl.constexpr = SUM_DPQ and RANK > 0
    width: gl.constexpr = BLOCK_D + BLOCK_DV + (BLOCK_R if HAS_PHI else 0)
    key_width: gl.constexpr = width + (BLOCK_G if HAS_SUM else 0)
    per_lane: gl.constexpr = gl.BlockedLayout([SLAB // 32], [32], [1], [0])
    offs_m = gl.arange(0, SLAB, per_lane)
    q_desc, k_desc, v_desc, do_desc, pq_desc, pk_desc, sum_desc = descriptors
    lse_ptr, delta_ptr, stride_rows = rows
    q_smem, do_smem, pq_smem, lse_smem, delta_smem = of_queries
    k_smem, v_smem, pk_smem, sum_smem = of_keys
    kv_full, kv_empty, q_full, q_empty, _ds_full, _ds_empty = barriers
    num_heads = batch[2]
    group = batch[3]
    shift, left, right = band
    turn = 0
    step = 0
    unit, walk, turns = next_unit(
        0, (-1, 0), turns_of(deal[0], ALTERNATES), deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N
    )
    while turn < turns:
        b, hk, block, blocks, queries, keys, diagonal, _slab = place_of_keys(
            turn, unit, walk, deal, batch, shift, IS_VARLEN, REPEATABLE, ALTERNATES, HAS_LEFT or HAS_RIGHT, BLOCK_N
        )
        start_n = block * BLOCK_N
        base_q, own_q, b_q, row_q = queries
        b_k = keys[2]
        row_k = keys[3]
        tiles = query_tiles(start_n, own_q, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        slot = turn % KV_STAGES
        mbarrier.wait(kv_empty.index(slot), ((turn // KV_STAGES) & 1) ^ 1)
        full = kv_full.index(slot)
        mbarrier.expect(full, 2 * BLOCK_N * key_width)
        f_k = owner_of(b * num_heads + hk * group, owners_k)
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
            f_q = owner_of(bh, owners_q)
            lo, _, _, hi = seen_tiles(tiles, terms, bh, block, blocks, HAS_TERMS and not REPEATABLE)
            turned = turn_of(block, blocks, hi - lo, HAS_LEFT or HAS_RIGHT)
            for n in range(hi - lo):
                start_m = tile_at(lo, n, hi - lo, turned, REPEATABLE) * SLAB
                stage = step % STAGES
                row = bh.to(gl.int64) * stride_rows + start_m
                if IS_VARLEN:
                    # Rows past the end are those of the next sequence, queries there zeros: they get weights of 0.
                    inside = start_m + offs_m < own_q
                    row += base_q
                    lse = gl.load(lse_ptr + row + offs_m, mask=inside, other=float("inf"))
                    delta = gl.load(delta_ptr + row + offs_m, mask=inside, other=0.0)
                else:
                    lse = gl.load(lse_ptr + row + offs_m)
                    delta = gl.load(delta_ptr + row + offs_m)
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
        # Late, so that programs end together; the others have all stages before them meanwhile.
        unit, walk, turns = next_unit(turn, walk, turns, deal, batch, queue, IS_VARLEN, REPEATABLE, BLOCK_N)


# -------------------------------------------------------------------- weights of a tile


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
def key_codes(code_k_ptr, start_n, seqlen_k, HAS_CODES: gl.constexpr, keys: gl.constexpr):
    """Codes of a warpgroup's keys; positions are their own codes, and keys past the end have that of the last one."""
    j = gl.minimum(start_n + gl.arange(0, ROWS, keys), seqlen_k - 1)
    return gl.load(code_k_ptr + j) if HAS_CODES else j


@jit
def first_terms_of_keys(table_ptr, half, k_code, code_q_ptr, seqlen_q, start_m, start_n, HAS_TABLE: gl.constexpr,
                        HAS_CODES: gl.constexpr):  # fmt: skip
    """What scores held keys by queries start from: entries of the table, over scale, or nothing."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    if not HAS_TABLE:
        return gl.zeros([ROWS, SLAB], gl.float32, s_layout)
    i = gl.minimum(start_m + gl.arange(0, SLAB, gl.SliceLayout(0, s_layout)), seqlen_q - 1)
    if HAS_CODES:
        return entries(table_ptr, gl.load(code_q_ptr + i)[None, :], k_code[:, None], half)
    in_tail, is_after = tail_of(start_m, start_n, half, SLAB, ROWS)
    if in_tail:
        s = gl.full([ROWS, SLAB], gl.load(table_ptr + gl.where(is_after, half, -half)), gl.float32, s_layout)
    else:
        s = entries(table_ptr, i[None, :], k_code[:, None], half)
    return s


@jit
def weights(s, lse_smem, shown, start_m, start_n, seqlen_k, band, qk_scale, IS_EDGE: gl.constexpr,
            HAS_TAIL: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
            HAS_TERMS: gl.constexpr):  # fmt: skip
    """P^T of a tile, 0 where the band, the end of the keys or the caller's own mask hides.

    By selection: the log-sum-exp does not count what is hidden, so its power may be infinite.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLAB, 16])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    shift, left, right = band
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
