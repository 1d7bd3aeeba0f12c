"""Backward pass with the keys fixed: gradients of keys, values and the key-side factor."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

from flashbias.attention.triton.centring import tile_offset
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import (
    LOG2E,
    add_factor_gradient,
    chunked_bias,
    load_codes,
    rescaled,
    scores,
    weights_and_gradients,
)
from flashbias.attention.triton.tiles import (
    group_of,
    load_factor,
    load_rows,
    load_tile,
    locate,
    member_of,
    query_range,
    store_tile,
)


@triton.jit
def _bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    phi_q_ptr,
    phi_k_ptr,
    raw_phi_q_ptr,
    raw_phi_k_ptr,
    ranks_ptr,
    table_ptr,
    code_q_ptr,
    code_k_ptr,
    mask_ptr,
    cu_q_ptr,
    cu_k_ptr,
    seed_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dphi_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_lse,
    stride_pqf,
    stride_pq: tl.constexpr,
    stride_pkf,
    stride_pk: tl.constexpr,
    stride_raw_qf,
    stride_raw_qn,
    stride_raw_qr,
    stride_raw_kf,
    stride_raw_kn,
    stride_raw_kr,
    stride_table,
    stride_mask_f,
    stride_mask_m,
    stride_mask_n,
    stride_dob,
    stride_doh,
    stride_don,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dphi_s,
    stride_dphi_f,
    stride_dphi,
    num_heads,
    group,
    seqlen_q,
    seqlen_k,
    head_dim: tl.constexpr,
    head_dim_v: tl.constexpr,
    columns: tl.constexpr,
    rank: tl.constexpr,
    half,
    left,
    right,
    scale,
    inv_scale,
    dropout_p,
    pq_s1,
    pq_v2,
    pq_s2,
    pk_s1,
    pk_v2,
    pk_s2,
    mask_s1,
    mask_v2,
    mask_s2,
    walk_s1,
    walk_v2,
    walk_s2,
    num_blocks,
    num_members,
    members_per_split,
    first_column,
    dphi_mult,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_PHI: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    PHI_MODE: tl.constexpr,
    PHI_CHUNKS: tl.constexpr,
    PADDED_R: tl.constexpr,
    TILE_CENTRED: tl.constexpr,
    CENTRE_TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SECOND_PART: tl.constexpr,
    PHI_IN_REGISTERS: tl.constexpr,
    STORE_DKDV: tl.constexpr,
    SUM_DKDV: tl.constexpr,
    STORE_DPHI: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    SUM_DPHI: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Gradients of a block of keys, for all members that its program walks over.

    SUM_DKDV: the members share their keys (grouped queries); dk and dv are summed and stored once.
    SUM_DPHI: the members share phi_k; its gradient is summed and stored once.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start_n = (pid % num_blocks) * BLOCK_N
    walk = pid // num_blocks
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    qk_scale = scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    dphi = tl.zeros([BLOCK_N, BLOCK_G], dtype=tl.float32)

    first_member = split * members_per_split
    for member in tl.range(first_member, tl.minimum(first_member + members_per_split, num_members), disable_licm=True):
        bh = member_of(walk, member, walk_s1, walk_v2, walk_s2)
        b, h, own, base_q, base_k, n_q, n_k, row_lse, shift = locate(
            bh, num_heads, seqlen_q, seqlen_k, stride_lse, cu_q_ptr, cu_k_ptr, IS_VARLEN, BOTTOM_RIGHT
        )
        q_base = q_ptr + b * stride_qb + h * stride_qh + base_q * stride_qn
        do_base = dout_ptr + b * stride_dob + h * stride_doh + base_q * stride_don
        k_base = k_ptr + b * stride_kb + (h // group) * stride_kh + base_k * stride_kn
        v_base = v_ptr + b * stride_vb + (h // group) * stride_vh + base_k * stride_vn
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        k = load_tile(k_base, start_n, offs_n, offs_d, stride_kn, n_k, head_dim, True, PADDED_D)
        v = load_tile(v_base, start_n, offs_n, offs_dv, stride_vn, n_k, head_dim_v, True, PADDED_DV)
        phi_k = k
        pq_base = phi_q_ptr
        pk_base = phi_k_ptr
        raw_q_base = raw_phi_q_ptr
        raw_k_base = raw_phi_k_ptr
        used = rank
        if HAS_PHI:
            f_q = tl.cast(group_of(own, pq_s1, pq_v2, pq_s2), tl.int64)
            f_k = tl.cast(group_of(own, pk_s1, pk_v2, pk_s2), tl.int64)
            pq_base = phi_q_ptr + f_q * stride_pqf + base_q * stride_pq
            pk_base = phi_k_ptr + f_k * stride_pkf + base_k * stride_pk
            raw_q_base = raw_phi_q_ptr + f_q * stride_raw_qf
            raw_k_base = raw_phi_k_ptr + f_k * stride_raw_kf
            if HAS_RANKS:
                used = tl.load(ranks_ptr + h)
            if PHI_CHUNKS == 1:
                phi_k = load_factor(
                    pk_base,
                    start_n,
                    offs_n,
                    offs_r,
                    stride_pk,
                    n_k,
                    columns,
                    rank,
                    used,
                    True,
                    PADDED_R,
                    HAS_RANKS,
                )
                phi_k = rescaled(phi_k, inv_scale, PHI_MODE)
        table_base = table_ptr
        q_codes = code_q_ptr
        k_code = offs_n
        if HAS_TABLE:
            table_base = table_ptr + h * stride_table
            k_codes = code_k_ptr
            if HAS_CODES:
                q_codes = code_q_ptr + base_q
                k_codes = code_k_ptr + base_k
            k_code = load_codes(k_codes, start_n, offs_n, n_k, HAS_CODES)
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base = mask_ptr + tl.cast(group_of(own, mask_s1, mask_v2, mask_s2), tl.int64) * stride_mask_f

        lo, full_lo, full_hi, hi = query_range(start_n, n_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
        if IS_VARLEN:
            if start_n >= n_k:
                lo = hi
                full_lo = hi
                full_hi = hi
        if HAS_MASK:
            full_lo = hi
            full_hi = hi
        for stage in tl.static_range(3):
            if stage == 0:
                first, last = lo, full_lo
            elif stage == 1:
                first, last = full_lo, full_hi
            else:
                first, last = full_hi, hi
            # Queries past the end have weight 0 anyway (see load_rows); only bands and masks need a where.
            if stage == 1 or (stage == 0 and (HAS_RIGHT or HAS_MASK)) or (stage == 2 and HAS_EDGE):
                # Not empty within the branch: see the forward kernel.
                if first < last:
                    for start_m in tl.range(first, last, BLOCK_M):
                        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
                        q = load_tile(q_base, start_m, offs_m, offs_d, stride_qn, n_q, head_dim, stage != 1, PADDED_D)
                        phi_q = q
                        if HAS_PHI and PHI_CHUNKS > 1:
                            s = chunked_bias(
                                pk_base, pq_base, start_n, start_m, offs_n, offs_m, stride_pk, stride_pq, n_k,
                                n_q, columns, rank, used, inv_scale, HAS_RANKS, BLOCK_N, BLOCK_M, BLOCK_R,
                                PHI_CHUNKS, PHI_MODE,
                                PRECISION, INTERPRETED,
                            )  # fmt: skip
                            s = product(k, tl.trans(q), s, PRECISION, INTERPRETED)
                        else:
                            if HAS_PHI:
                                phi_q = load_factor(
                                    pq_base,
                                    start_m,
                                    offs_m,
                                    offs_r,
                                    stride_pq,
                                    n_q,
                                    columns,
                                    rank,
                                    used,
                                    stage != 1,
                                    PADDED_R,
                                    HAS_RANKS,
                                )
                            # [BLOCK_N, BLOCK_M]: keys by queries
                            s = scores(
                                k,
                                tl.trans(q),
                                phi_k,
                                phi_q,
                                inv_scale,
                                HAS_PHI,
                                PHI_MODE,
                                PRECISION,
                                INTERPRETED,
                            )
                        lse2, delta = load_rows(
                            lse_ptr + row_lse, delta_ptr + row_lse, start_m, offs_m, n_q, stage != 1
                        )
                        do = load_tile(
                            do_base,
                            start_m,
                            offs_m,
                            offs_dv,
                            stride_don,
                            n_q,
                            head_dim_v,
                            stage != 1,
                            PADDED_DV,
                        )
                        dp = product(v, tl.trans(do), None, PRECISION, INTERPRETED)
                        offset = 0.0
                        if TILE_CENTRED:
                            offset = tile_offset(
                                raw_q_base, raw_k_base, start_m, start_n, offs_m, n_q, n_k, stride_raw_qn,
                                stride_raw_qr, stride_raw_kn, stride_raw_kr, used, BLOCK_RANK, CENTRE_TILE,
                            )[None, :]  # fmt: skip
                        q_code = offs_m
                        if HAS_TABLE:
                            q_code = load_codes(q_codes, start_m, offs_m, n_q, HAS_CODES)
                        p, ds = weights_and_gradients(
                            s, dp, lse2[None, :], delta[None, :], q_code, k_code, (start_m + offs_m)[None, :],
                            (start_n + offs_n)[:, None], q_code[None, :], k_code[:, None], offset, table_base,
                            mask_base,
                            seed_ptr, bh, n_q, n_k, half, shift, left, right, qk_scale, dropout_p,
                            stride_mask_m, stride_mask_n, stage != 1, HAS_LEFT, HAS_RIGHT, TILE_CENTRED, HAS_TABLE,
                            HAS_MASK, HAS_DROPOUT,
                        )  # fmt: skip
                        if STORE_DKDV:
                            dv = product(p.to(do.dtype), do, dv, PRECISION, INTERPRETED)
                            dk = product(ds.to(q.dtype), q, dk, PRECISION, INTERPRETED)
                        if STORE_DPHI:
                            dphi = add_factor_gradient(
                                dphi, ds, phi_q, pq_base, start_m, offs_m, first_column + offs_g, stride_pq, n_q,
                                columns, rank, used, 2 * SECOND_PART, PHI_IN_REGISTERS, stage != 1, HAS_RANKS,
                                PRECISION, INTERPRETED,
                            )  # fmt: skip

        if STORE_DKDV and not SUM_DKDV:
            dk_base = dk_ptr + b * stride_dkb + h * stride_dkh + base_k * stride_dkn
            dv_base = dv_ptr + b * stride_dvb + h * stride_dvh + base_k * stride_dvn
            store_tile(dk_base, start_n, offs_n, offs_d, stride_dkn, n_k, head_dim, dk * scale)
            store_tile(dv_base, start_n, offs_n, offs_dv, stride_dvn, n_k, head_dim_v, dv)
            dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
        if STORE_DPHI and not SUM_DPHI:
            f = tl.cast(group_of(own, pk_s1, pk_v2, pk_s2), tl.int64)
            base = dphi_ptr + f * stride_dphi_f + base_k * stride_dphi + first_column
            store_tile(base, start_n, offs_n, offs_g, stride_dphi, n_k, rank - first_column, dphi * dphi_mult)
            dphi = tl.zeros([BLOCK_N, BLOCK_G], dtype=tl.float32)

    # Members of one walk share what is summed over them: the first one tells where it belongs.
    bh = member_of(walk, 0, walk_s1, walk_v2, walk_s2)
    b, h, own, base_q, base_k, n_q, n_k, row_lse, shift = locate(
        bh, num_heads, seqlen_q, seqlen_k, stride_lse, cu_q_ptr, cu_k_ptr, IS_VARLEN, BOTTOM_RIGHT
    )
    if STORE_DKDV and SUM_DKDV:
        h = h // group
        dk_base = dk_ptr + b * stride_dkb + h * stride_dkh + base_k * stride_dkn
        dv_base = dv_ptr + b * stride_dvb + h * stride_dvh + base_k * stride_dvn
        store_tile(dk_base, start_n, offs_n, offs_d, stride_dkn, n_k, head_dim, dk * scale)
        store_tile(dv_base, start_n, offs_n, offs_dv, stride_dvn, n_k, head_dim_v, dv)
    if STORE_DPHI and SUM_DPHI:
        f = tl.cast(group_of(own, pk_s1, pk_v2, pk_s2), tl.int64)
        base = dphi_ptr + tl.cast(split, tl.int64) * stride_dphi_s + f * stride_dphi_f + base_k * stride_dphi
        store_tile(
            base + first_column,
            start_n,
            offs_n,
            offs_g,
            stride_dphi,
            n_k,
            rank - first_column,
            dphi * dphi_mult,
        )
