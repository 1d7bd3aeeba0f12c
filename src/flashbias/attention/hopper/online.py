"""Forward kernel for Hopper, online softmax: a warp that loads, and warpgroups that each own 64 queries."""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper import chunks
from flashbias.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    load,
    mbarrier,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashbias.attention.hopper.scores import PARTS, QUAD, centring_of, first_terms, masked, softmax, tile_offset
from flashbias.attention.hopper.tiles import (
    ROWS,
    boxes,
    claimed,
    dealt,
    heard_of,
    key_tiles,
    load_rows,
    owner_of,
    part_of,
    place_in_batch,
    store_rows,
    unit_slots,
)
from flashbias.attention.triton.scores import FLOOR, LN2, LOG2E


@jit
def _produce(
    descriptors, buffers, barriers, queue, deal, batch, group, left, right, owners_q, owners_k,
    IS_VARLEN: gl.constexpr, IS_SPLIT: gl.constexpr, ALTERNATES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr, CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries of every tile, and the keys and values that they see, last keys first."""
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    q_bytes: gl.constexpr = 2 * ROWS * (BLOCK_D + (BLOCK_R if HAS_PHI else 0))
    k_bytes: gl.constexpr = 2 * BLOCK_N * (BLOCK_D + (BLOCK_R if HAS_PHI else 0))
    v_bytes: gl.constexpr = 2 * BLOCK_N * BLOCK_DV
    q_desc, k_desc, v_desc, pq_desc, pk_desc = descriptors
    q_smem, k_smem, v_smem, pq_smem, pk_smem = buffers
    q_full, q_empty, k_full, v_full, empty = barriers
    step = 0
    turn = 0
    walk = (-1, 0)
    unit = 0
    if IS_VARLEN:
        unit, walk = claimed(turn, walk, batch, queue, BLOCK_M)
    else:
        unit = dealt(turn, deal, ALTERNATES)
    while unit >= 0:
        h, bh, block, part, queries, keys, diagonal = place_in_batch(
            unit, walk, deal, batch, IS_VARLEN, IS_SPLIT, HAS_LEFT or HAS_RIGHT
        )
        base_q = queries[0]
        b_q = queries[2]
        row_q = queries[3]
        base_k, own_k, b_k, row_k = keys
        start_m = block * BLOCK_M
        f_q = owner_of(bh, owners_q)
        f_k = owner_of(bh, owners_k)
        lo, full_lo, full_hi, hi = key_tiles(
            start_m, own_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
        if IS_SPLIT:
            lo, full_lo, full_hi, hi = part_of(lo, full_lo, full_hi, hi, part, deal[3])
        for w in gl.static_range(CONSUMERS):
            place = w * Q_STAGES + turn % Q_STAGES
            mbarrier.wait(q_empty.index(place), ((turn // Q_STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(place), q_bytes)
            load_rows(q_desc, b_q, h, row_q + start_m + w * ROWS, q_full.index(place), q_smem.index(place), IS_VARLEN)
            if HAS_PHI:
                load(pq_desc, [f_q, base_q + start_m + w * ROWS, 0], q_full.index(place), pq_smem.index(place))
        for n in range(hi - lo):
            start_n = (hi - 1 - n) * BLOCK_N
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), k_bytes)
            load_rows(k_desc, b_k, h // group, row_k + start_n, k_full.index(stage), k_smem.index(stage), IS_VARLEN)
            if HAS_PHI:
                load(pk_desc, [f_k, base_k + start_n, 0], k_full.index(stage), pk_smem.index(stage))
            # A step frees its keys and the values of the step before.
            mbarrier.wait(empty.index((step + 1) % STAGES), (((step + 1) // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), v_bytes)
            load_rows(v_desc, b_k, h // group, row_k + start_n, v_full.index(stage), v_smem.index(stage), IS_VARLEN)
            step += 1
        turn += 1
        if IS_VARLEN:
            unit, walk = claimed(turn, walk, batch, queue, BLOCK_M)
        else:
            unit = dealt(turn, deal, ALTERNATES)


@jit
def _issue_scores(s, q, k_smem, pq, pk_smem, stage, HAS_TABLE: gl.constexpr, HAS_PHI: gl.constexpr,
                  KEYS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_R: gl.constexpr,
                  WIDTH_D: gl.constexpr, k_layout: gl.constexpr, pk_layout: gl.constexpr):  # fmt: skip
    """S / scale of the first KEYS keys of a tile, in flight: a sum that starts at s; the factors are one more chunk."""
    k = k_smem.index(stage)._reinterpret(k_smem.dtype, [BLOCK_N, BLOCK_D], k_layout)
    if KEYS < BLOCK_N:
        k = k.slice(0, KEYS, 0)
    s = chunks.issue(chunks.of(q, WIDTH_D), chunks.of(k, WIDTH_D), s, HAS_TABLE)
    if HAS_PHI:
        pk = pk_smem.index(stage)._reinterpret(pk_smem.dtype, [BLOCK_N, BLOCK_R], pk_layout)
        if KEYS < BLOCK_N:
            pk = pk.slice(0, KEYS, 0)
        s = warpgroup_mma(pq, pk.permute((1, 0)), s, is_async=True)
    return s


@jit
def _await_turn(order, w: gl.constexpr, step):
    """Wait until the warpgroup before has issued its products of this step; the first one has the first turn."""
    first: gl.constexpr = 1 if w == 0 else 0
    mbarrier.wait(order.index(w), (step & 1) ^ first)


@jit
def _step(acc, p, m_i, l_i, step, start_n, q, pq, q_full, q_phase, k_smem, v_smem, pk_smem, k_full, v_full, empty,
          order, w: gl.constexpr, table_ptr, q_code, code_k_ptr, half, terms_ptr, centring,
          is_edge, start_m, seqlen_k, shift, left, right, qk_scale, HAS_LEFT: gl.constexpr,
          HAS_RIGHT: gl.constexpr, HAS_PHI: gl.constexpr, HAS_TABLE: gl.constexpr, HAS_CODES: gl.constexpr,
          HAS_TERMS: gl.constexpr, RANK: gl.constexpr, ORDERED: gl.constexpr, CONSUMERS: gl.constexpr,
          STAGES: gl.constexpr, BEFORE: gl.constexpr,
          BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
          WIDTH_D: gl.constexpr, WIDTH_DV: gl.constexpr, k_layout: gl.constexpr, v_layout: gl.constexpr,
          pk_layout: gl.constexpr, s_layout: gl.constexpr):  # fmt: skip
    """One tile of keys; P V of the tile before, of BEFORE keys, is in flight beside its scores."""
    stage = step % STAGES
    offset = m_i
    if RANK > 0:
        # Before there are scores, which fill the registers.
        offset = tile_offset(centring, start_n, RANK, gl.SliceLayout(1, s_layout))
    # Keys past the end are in the tile that comes first, before this loop, or hidden by the band.
    s = first_terms(table_ptr, q_code, code_k_ptr, start_m, start_n, seqlen_k, half, HAS_TABLE, HAS_CODES,
                     HAS_LEFT or HAS_RIGHT, BLOCK_N, s_layout)  # fmt: skip
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    if ORDERED:
        _await_turn(order, w, step)
    s = _issue_scores(s, q, k_smem, pq, pk_smem, stage, HAS_TABLE, HAS_PHI, BLOCK_N, BLOCK_N, BLOCK_D, BLOCK_R,
                      WIDTH_D, k_layout, pk_layout)  # fmt: skip
    before = (step - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    v = v_smem.index(before)._reinterpret(v_smem.dtype, [BLOCK_N, BLOCK_DV], v_layout)
    if BEFORE < BLOCK_N:
        v = v.slice(0, BEFORE, 0)
    acc = chunks.add(acc, p, v, WIDTH_DV)
    if ORDERED:
        mbarrier.arrive(order.index((w + 1) % CONSUMERS))
    s = warpgroup_mma_wait(chunks.sum_count(WIDTH_DV), deps=[s])
    # One loop for tiles with masks and without: two of them would unpack and pack P where they meet.
    if HAS_LEFT or HAS_RIGHT:  # noqa: SIM102
        if is_edge:
            s = masked(s, start_m, start_n, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N, s_layout)
    if HAS_TERMS:
        s += gl.load(terms_ptr + start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout)))[None, :]
    weights, alpha, m_i, l_i = softmax(s, m_i, l_i, qk_scale, offset, RANK > 0, BLOCK_N, s_layout)
    # Without a barrier here, passed long ago, the assembler moves the wait below above the softmax, and nothing
    # overlaps. Of one that this step waited on before, Triton would synchronise the warps once more.
    mbarrier.wait(q_full, q_phase)
    acc = chunks.settled(acc, 0)
    mbarrier.arrive(empty.index(stage))
    acc = chunks.scaled(acc, alpha, WIDTH_DV)
    p = gl.convert_layout(weights.to(v_smem.dtype), chunks.weights_layout(WIDTH_DV))
    return acc, p, m_i, l_i, step + 1


@jit
def _store_rows(acc, lse, o_desc, o_smem, lse_ptr, queries, h, start_m, IS_VARLEN: gl.constexpr,
                BLOCK_DV: gl.constexpr, WIDTH_DV: gl.constexpr, O_IN_Q: gl.constexpr, o_smem_layout: gl.constexpr,
                rows: gl.constexpr):  # fmt: skip
    """Write the output through shared memory, and the log-sum-exp."""
    base_q, own_q, b_q, row_q = queries
    if not O_IN_Q:
        store_wait(0)
    chunks.write(acc, o_smem._reinterpret(o_smem.dtype, [ROWS, BLOCK_DV], o_smem_layout), WIDTH_DV)
    fence_async_shared()
    store_rows(o_desc, b_q, h, row_q + start_m, o_smem, IS_VARLEN)
    i = start_m + gl.arange(0, ROWS, rows)
    gl.store(lse_ptr + base_q + i, lse, mask=i < own_q)


@jit
def _consume(
    w: gl.constexpr, o_desc, lse_ptr, part_ptr, part_lse_ptr, table, codes, terms, centring, buffers, o_smem, barriers,
    order, queue, deal, batch, left, right, qk_scale,
    IS_VARLEN: gl.constexpr, IS_SPLIT: gl.constexpr, ALTERNATES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_EDGE: gl.constexpr, HAS_PHI: gl.constexpr, HAS_TABLE: gl.constexpr,
    HAS_CODES: gl.constexpr, HAS_TERMS: gl.constexpr, RANK: gl.constexpr, ORDERED: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, O_IN_Q: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
    WIDTH_D: gl.constexpr, WIDTH_DV: gl.constexpr, q_layout: gl.constexpr, k_layout: gl.constexpr,
    v_layout: gl.constexpr, pq_layout: gl.constexpr, pk_layout: gl.constexpr, o_smem_layout: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: online softmax of its 64 queries of every tile."""
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    first_keys: gl.constexpr = TAIL if TAIL > 0 else BLOCK_N
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    first_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, first_keys, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q_smem, k_smem, v_smem, pq_smem, pk_smem = buffers
    q_full, q_empty, k_full, v_full, empty = barriers
    table_ptr, stride_table, half = table
    code_q_ptr, code_k_ptr = codes
    terms_ptr, stride_terms, owners_terms = terms
    whole = deal[1]
    seqlen_q = batch[4]
    step = 0
    turn = 0
    walk = (-1, 0)
    unit = 0
    if IS_VARLEN:
        unit, walk = heard_of(turn, walk, batch, queue, BLOCK_M)
    else:
        unit = dealt(turn, deal, ALTERNATES)
    while unit >= 0:
        h, bh, block, part, queries, keys, diagonal = place_in_batch(
            unit, walk, deal, batch, IS_VARLEN, IS_SPLIT, HAS_LEFT or HAS_RIGHT
        )
        base_q = queries[0]
        own_q = queries[1]
        base_k = keys[0]
        own_k = keys[1]
        # The log-sum-exp of (batch, head) lies at a row of its own, that of packed queries at their head's row.
        own_lse = lse_ptr + bh.to(gl.int64) * seqlen_q
        lo, full_lo, full_hi, hi = key_tiles(
            block * BLOCK_M, own_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
        if IS_SPLIT:
            lo, full_lo, full_hi, hi = part_of(lo, full_lo, full_hi, hi, part, deal[3])
        start_m = block * BLOCK_M + w * ROWS
        acc = chunks.zeros(WIDTH_DV)
        m_i = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, first_layout))
        l_i = gl.zeros([ROWS, QUAD], gl.float32, PARTS)

        place = w * Q_STAGES + turn % Q_STAGES
        q = q_smem.index(place)._reinterpret(q_smem.dtype, [ROWS, BLOCK_D], q_layout)
        pq = q
        if HAS_PHI:
            pq = pq_smem.index(place)._reinterpret(pq_smem.dtype, [ROWS, BLOCK_R], pq_layout)
        first = (hi - 1) * BLOCK_N
        own_table = table_ptr
        own_code_k = code_k_ptr + base_k
        q_code = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, first_layout))
        if HAS_TABLE:
            own_table = table_ptr + h * stride_table + half
            q_code = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, first_layout))
            if HAS_CODES:
                q_code = gl.load(code_q_ptr + base_q + q_code, mask=q_code < own_q, other=0)
        own_terms = terms_ptr
        if HAS_TERMS:
            own_terms = terms_ptr + owner_of(bh, owners_terms) * stride_terms
        own_centring = centring
        offset = m_i
        if RANK > 0:
            own_centring = centring_of(centring, bh, start_m, own_q, RANK)
            offset = tile_offset(own_centring, first, RANK, gl.SliceLayout(1, first_layout))
        s = first_terms(own_table, q_code, own_code_k, start_m, first, own_k, half, HAS_TABLE, HAS_CODES, HAS_EDGE,
                         first_keys, first_layout)  # fmt: skip
        mbarrier.wait(q_full.index(place), (turn // Q_STAGES) & 1)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        if ORDERED:
            _await_turn(order, w, step)
            mbarrier.arrive(order.index((w + 1) % CONSUMERS))
        s = _issue_scores(s, q, k_smem, pq, pk_smem, stage, HAS_TABLE, HAS_PHI, first_keys, BLOCK_N, BLOCK_D, BLOCK_R,
                          WIDTH_D, k_layout, pk_layout)  # fmt: skip
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(empty.index(stage))
        if HAS_EDGE:
            s = masked(s, start_m, first, own_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, first_keys,
                        first_layout)  # fmt: skip
        if HAS_TERMS:
            s += gl.load(own_terms + first + gl.arange(0, first_keys, gl.SliceLayout(0, first_layout)))[None, :]
        weights, _, m_i, l_i = softmax(s, m_i, l_i, qk_scale, offset, RANK > 0, first_keys, first_layout)
        p = gl.convert_layout(weights.to(v_smem.dtype), chunks.weights_layout(WIDTH_DV))
        m_i = gl.convert_layout(m_i, rows)
        q_code = gl.convert_layout(q_code, rows)
        step += 1
        if O_IN_Q and Q_STAGES > 1:
            # The output of the last turn has left the other buffer, which is free for the queries of the next.
            store_wait(0)
            mbarrier.arrive(q_empty.index(w * Q_STAGES + (turn + 1) % Q_STAGES), pred=turn > 0)
        last = hi - 2
        if TAIL > 0:
            acc, p, m_i, l_i, step = _step(
                acc, p, m_i, l_i, step, last * BLOCK_N, q, pq, q_full.index(place), (turn // Q_STAGES) & 1, k_smem,
                v_smem, pk_smem, k_full, v_full, empty, order, w, own_table, q_code, own_code_k, half, own_terms,
                own_centring,
                False, start_m, own_k, diagonal, left, right, qk_scale, HAS_LEFT, HAS_RIGHT, HAS_PHI,
                HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED, CONSUMERS, STAGES, TAIL, BLOCK_N, BLOCK_D, BLOCK_DV,
                BLOCK_R, WIDTH_D, WIDTH_DV, k_layout, v_layout, pk_layout, s_layout,
            )  # fmt: skip
            last -= 1
        for n in range(last + 1 - lo):
            tile = last - n
            acc, p, m_i, l_i, step = _step(
                acc, p, m_i, l_i, step, tile * BLOCK_N, q, pq, q_full.index(place), (turn // Q_STAGES) & 1, k_smem,
                v_smem, pk_smem, k_full, v_full, empty, order, w, own_table, q_code, own_code_k, half, own_terms,
                own_centring,
                (tile >= full_hi) | (tile < full_lo), start_m, own_k, diagonal, left, right, qk_scale,
                HAS_LEFT, HAS_RIGHT, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED, CONSUMERS, STAGES,
                BLOCK_N, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D, WIDTH_DV, k_layout, v_layout, pk_layout,
                s_layout,
            )  # fmt: skip
        if not O_IN_Q:
            mbarrier.arrive(q_empty.index(place))
        stage = (step - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((step - 1) // STAGES) & 1)
        v = v_smem.index(stage)._reinterpret(v_smem.dtype, [BLOCK_N, BLOCK_DV], v_layout)
        acc = chunks.settled(chunks.add(acc, p, v, WIDTH_DV), 0)

        total = gl.convert_layout(gl.sum(l_i, 1), rows)
        l_safe = gl.where(total == 0.0, 1.0, total)
        lse = gl.where(total == 0.0, float("-inf"), (m_i + gl.log2(l_safe)) * LN2)
        acc = chunks.scaled(acc, 1.0 / l_safe, WIDTH_DV)
        if O_IN_Q:
            if IS_VARLEN:
                o_rows = q_smem.index(place)._reinterpret(o_smem.dtype, [1, 1, 1, ROWS, BLOCK_DV], o_desc.layout)
            else:
                o_rows = q_smem.index(place)._reinterpret(o_smem.dtype, [1, 1, ROWS, BLOCK_DV], o_desc.layout)
        else:
            o_rows = o_smem.index(w)
        if IS_SPLIT:
            if part >= 0:
                chunks.write_rows(acc, part_ptr, (unit - whole) * BLOCK_M + w * ROWS, WIDTH_DV, BLOCK_DV)
                gl.store(part_lse_ptr + (unit - whole) * BLOCK_M + w * ROWS + gl.arange(0, ROWS, rows), lse)
            else:
                _store_rows(acc, lse, o_desc, o_rows, own_lse, queries, h, start_m, IS_VARLEN, BLOCK_DV, WIDTH_DV,
                            O_IN_Q, o_smem_layout, rows)  # fmt: skip
        else:
            _store_rows(acc, lse, o_desc, o_rows, own_lse, queries, h, start_m, IS_VARLEN, BLOCK_DV, WIDTH_DV,
                        O_IN_Q, o_smem_layout, rows)  # fmt: skip
        if O_IN_Q and Q_STAGES == 1:
            store_wait(0)
            mbarrier.arrive(q_empty.index(place))
        turn += 1
        if IS_VARLEN:
            unit, walk = heard_of(turn, walk, batch, queue, BLOCK_M)
        else:
            unit = dealt(turn, deal, ALTERNATES)
    store_wait(0)


@jit(
    do_not_specialize=[
        "units", "whole", "parts", "part_tiles", "heads", "pairs", "num_blocks", "num_heads", "group", "seqlen_q",
        "seqlen_k", "shift", "left", "right",
        "pq_s1", "pq_v2", "pq_s2", "pk_s1", "pk_v2", "pk_s2", "stride_table", "half", "mask_s1", "mask_v2", "mask_s2",
        "stride_pf", "stride_pn", "stride_pr", "stride_c", "references",
    ]
)  # fmt: skip
def _fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, pq_desc, pk_desc, lse_ptr, part_ptr, part_lse_ptr, table_ptr, code_q_ptr,
    code_k_ptr, terms_ptr, phi_q_ptr, centre_ptr, cu_q_ptr, cu_k_ptr, counter_ptr,
    units, whole, parts, part_tiles, heads, pairs, num_blocks, num_heads, group, seqlen_q, seqlen_k, shift, left, right,
    scale, pq_s1, pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, stride_table, half, stride_terms, mask_s1, mask_v2,
    mask_s2, stride_pf, stride_pn, stride_pr, stride_c, references,
    IS_VARLEN: gl.constexpr, IS_SPLIT: gl.constexpr, ALTERNATES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, HAS_EDGE: gl.constexpr, HAS_PHI: gl.constexpr, HAS_TABLE: gl.constexpr,
    HAS_CODES: gl.constexpr, HAS_TERMS: gl.constexpr, RANK: gl.constexpr, ORDERED: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, O_IN_Q: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_R: gl.constexpr,
    WIDTH_D: gl.constexpr, WIDTH_DV: gl.constexpr, REGISTERS: gl.constexpr, q_layout: gl.constexpr,
    k_layout: gl.constexpr, v_layout: gl.constexpr, pq_layout: gl.constexpr, pk_layout: gl.constexpr,
    o_layout: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp; a program takes tile after tile of 64 * CONSUMERS queries of one (batch, head)."""
    q_smem = boxes(q_desc, CONSUMERS * Q_STAGES, ROWS, BLOCK_D, IS_VARLEN)
    k_smem = boxes(k_desc, STAGES, BLOCK_N, BLOCK_D, IS_VARLEN)
    v_smem = boxes(v_desc, STAGES, BLOCK_N, BLOCK_DV, IS_VARLEN)
    o_smem = q_smem
    if not O_IN_Q:
        o_smem = boxes(o_desc, CONSUMERS, ROWS, BLOCK_DV, IS_VARLEN)
    pq_smem = q_smem
    pk_smem = k_smem
    if HAS_PHI:
        pq_smem = gl.allocate_shared_memory(pq_desc.dtype, [CONSUMERS * Q_STAGES, 1, ROWS, BLOCK_R], pq_desc.layout)
        pk_smem = gl.allocate_shared_memory(pk_desc.dtype, [STAGES, 1, BLOCK_N, BLOCK_R], pk_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS * Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS * Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(CONSUMERS):
        mbarrier.init(order.index(w), count=1)
    for place in gl.static_range(CONSUMERS * Q_STAGES):
        mbarrier.init(q_full.index(place), count=1)
        mbarrier.init(q_empty.index(place), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    queue = (counter_ptr, order, order, order)
    if IS_VARLEN:
        # Which unit comes next, as the loading warp tells the others.
        unit_smem, told, heard = unit_slots(CONSUMERS)
        queue = (counter_ptr, unit_smem, told, heard)
    fence_async_shared()
    qk_scale = scale * LOG2E
    # Numbers, addresses and buffers go to the partitions in groups, constants one by one.
    descriptors = (q_desc, k_desc, v_desc, pq_desc, pk_desc)
    buffers = (q_smem, k_smem, v_smem, pq_smem, pk_smem)
    barriers = (q_full, q_empty, k_full, v_full, empty)
    deal = (units, whole, parts, part_tiles, num_blocks, heads)
    batch = (cu_q_ptr, cu_k_ptr, pairs, num_heads, seqlen_q, seqlen_k, shift)
    owners_q = (pq_s1, pq_v2, pq_s2)
    owners_k = (pk_s1, pk_v2, pk_s2)
    table = (table_ptr, stride_table, half)
    codes = (code_q_ptr, code_k_ptr)
    terms = (terms_ptr, stride_terms, (mask_s1, mask_v2, mask_s2))
    centring = (phi_q_ptr, stride_pf, stride_pn, stride_pr, centre_ptr, stride_c, references, owners_q, owners_k)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, o_desc, lse_ptr, part_ptr, part_lse_ptr, table, codes, terms, centring, buffers, o_smem,
                            barriers, order, queue, deal, batch, left, right, qk_scale, IS_VARLEN, IS_SPLIT, ALTERNATES,
                            HAS_LEFT, HAS_RIGHT, HAS_EDGE, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED,
                            CONSUMERS, Q_STAGES, STAGES, TAIL, O_IN_Q, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D,
                            WIDTH_DV, q_layout, k_layout, v_layout, pq_layout, pk_layout, o_layout)),
                (_consume, (1, o_desc, lse_ptr, part_ptr, part_lse_ptr, table, codes, terms, centring, buffers, o_smem,
                            barriers, order, queue, deal, batch, left, right, qk_scale, IS_VARLEN, IS_SPLIT, ALTERNATES,
                            HAS_LEFT, HAS_RIGHT, HAS_EDGE, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED,
                            CONSUMERS, Q_STAGES, STAGES, TAIL, O_IN_Q, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D,
                            WIDTH_DV, q_layout, k_layout, v_layout, pq_layout, pk_layout, o_layout)),
                (_produce, (descriptors, buffers, barriers, queue, deal, batch, group, left, right, owners_q, owners_k,
                            IS_VARLEN, IS_SPLIT, ALTERNATES, HAS_LEFT, HAS_RIGHT, HAS_PHI, CONSUMERS, Q_STAGES, STAGES,
                            BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, o_desc, lse_ptr, part_ptr, part_lse_ptr, table, codes, terms, centring, buffers, o_smem,
                            barriers, order, queue, deal, batch, left, right, qk_scale, IS_VARLEN, IS_SPLIT, ALTERNATES,
                            HAS_LEFT, HAS_RIGHT, HAS_EDGE, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED,
                            CONSUMERS, Q_STAGES, STAGES, TAIL, O_IN_Q, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D,
                            WIDTH_DV, q_layout, k_layout, v_layout, pq_layout, pk_layout, o_layout)),
                (_consume, (1, o_desc, lse_ptr, part_ptr, part_lse_ptr, table, codes, terms, centring, buffers, o_smem,
                            barriers, order, queue, deal, batch, left, right, qk_scale, IS_VARLEN, IS_SPLIT, ALTERNATES,
                            HAS_LEFT, HAS_RIGHT, HAS_EDGE, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED,
                            CONSUMERS, Q_STAGES, STAGES, TAIL, O_IN_Q, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D,
                            WIDTH_DV, q_layout, k_layout, v_layout, pq_layout, pk_layout, o_layout)),
                (_consume, (2, o_desc, lse_ptr, part_ptr, part_lse_ptr, table, codes, terms, centring, buffers, o_smem,
                            barriers, order, queue, deal, batch, left, right, qk_scale, IS_VARLEN, IS_SPLIT, ALTERNATES,
                            HAS_LEFT, HAS_RIGHT, HAS_EDGE, HAS_PHI, HAS_TABLE, HAS_CODES, HAS_TERMS, RANK, ORDERED,
                            CONSUMERS, Q_STAGES, STAGES, TAIL, O_IN_Q, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R, WIDTH_D,
                            WIDTH_DV, q_layout, k_layout, v_layout, pq_layout, pk_layout, o_layout)),
                (_produce, (descriptors, buffers, barriers, queue, deal, batch, group, left, right, owners_q, owners_k,
                            IS_VARLEN, IS_SPLIT, ALTERNATES, HAS_LEFT, HAS_RIGHT, HAS_PHI, CONSUMERS, Q_STAGES, STAGES,
                            BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
