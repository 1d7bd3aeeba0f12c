"""Backward pass in parts that never share an accumulator, so that every gradient is bitwise repeatable.

- `_bwd_delta_kernel`: delta = rowsum(dout * out) - dlse.
- `_bwd_dkdv_kernel`: a block of keys walks over queries: dk, dv, dphi_k.
- `_bwd_dq_kernel`: a block of queries walks over keys: dq, dphi_q.
- `_bwd_window_kernel`: short sequences, one tile for all: every gradient from one recomputation.
- `_bwd_dtable_kernel`: a tile walks over all that share the table, then adds its entries as integers.

A factor that is shared by many (batch, head) pairs gets its gradient summed in registers: its program walks over
the members. Where the members alone would leave the GPU idle they are split, and the parts summed afterwards.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from flashbias.attention.layout import Sharing
from flashbias.attention.triton import table, window
from flashbias.attention.triton.configs import Config, choose
from flashbias.attention.triton.operands import Operands, multiprocessors
from flashbias.attention.triton.primitives import (
    LOG2E,
    add_factor_gradient,
    centre_step,
    chunked_bias,
    group_of,
    key_range,
    load_codes,
    load_factor,
    load_rows,
    load_tile,
    locate,
    member_of,
    product,
    query_range,
    rescaled,
    scores,
    store_tile,
    tile_offset,
    weights_and_gradients,
)


@triton.jit
def _bwd_delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    stride_dob,
    stride_doh,
    stride_don,
    num_heads,
    seqlen_q,
    head_dim_v,
    num_blocks,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """`rowsum(dout * out) - dlse`, from which a score's gradient is measured, and lse in units of log 2.

    Rows that attend to nothing get +inf, so that their weights come out as exp2(-inf) = 0.
    """
    bh = tl.program_id(0) // num_blocks
    start_m = (tl.program_id(0) % num_blocks) * BLOCK_M
    b, h = tl.cast(bh // num_heads, tl.int64), tl.cast(bh % num_heads, tl.int64)
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    out_ptr += b * stride_ob + h * stride_oh
    dout_ptr += b * stride_dob + h * stride_doh
    out = load_tile(out_ptr, start_m, offs_m, offs_d, stride_on, seqlen_q, head_dim_v, True, True).to(tl.float32)
    dout = load_tile(dout_ptr, start_m, offs_m, offs_d, stride_don, seqlen_q, head_dim_v, True, True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    rows = tl.cast(bh, tl.int64) * seqlen_q + start_m + offs_m
    inside = (start_m + offs_m) < seqlen_q
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    tl.store(lse2_ptr + rows, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=inside)


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
                                stride_raw_qr, stride_raw_kn, stride_raw_kr, rank, BLOCK_RANK, CENTRE_TILE,
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


@triton.jit
def _bwd_dq_kernel(
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
    dq_ptr,
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
    stride_dqb,
    stride_dqh,
    stride_dqn,
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
    STORE_DQ: tl.constexpr,
    STORE_DPHI: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    SUM_DPHI: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Gradients of a block of queries, for all members that its program walks over."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start_m = (num_blocks - 1 - pid % num_blocks) * BLOCK_M
    walk = pid // num_blocks
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    qk_scale = scale * LOG2E
    dphi = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)

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
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        q = load_tile(q_base, start_m, offs_m, offs_d, stride_qn, n_q, head_dim, True, PADDED_D)
        do = load_tile(do_base, start_m, offs_m, offs_dv, stride_don, n_q, head_dim_v, True, PADDED_DV)
        lse2, delta = load_rows(lse_ptr + row_lse, delta_ptr + row_lse, start_m, offs_m, n_q, True)
        phi_q = q
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
                    True,
                    PADDED_R,
                    HAS_RANKS,
                )
                phi_q = rescaled(phi_q, inv_scale, PHI_MODE)
        table_base = table_ptr
        k_codes = code_k_ptr
        q_code = offs_m
        if HAS_TABLE:
            table_base = table_ptr + h * stride_table
            q_codes = code_q_ptr
            if HAS_CODES:
                q_codes = code_q_ptr + base_q
                k_codes = code_k_ptr + base_k
            q_code = load_codes(q_codes, start_m, offs_m, n_q, HAS_CODES)
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base = mask_ptr + tl.cast(group_of(own, mask_s1, mask_v2, mask_s2), tl.int64) * stride_mask_f

        lo, full_lo, full_hi, hi = key_range(start_m, n_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
        if IS_VARLEN:
            if start_m >= n_q:
                lo = hi
                full_lo = hi
                full_hi = hi
        if HAS_MASK:
            full_lo = hi
            full_hi = hi
        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for stage in tl.static_range(3):
            if stage == 0:
                first, last = lo, full_lo
            elif stage == 1:
                first, last = full_lo, full_hi
            else:
                first, last = full_hi, hi
            if stage == 1 or (stage == 0 and (HAS_LEFT or HAS_MASK)) or (stage == 2 and HAS_EDGE):
                # Not empty within the branch: see the forward kernel.
                if first < last:
                    for start_n in tl.range(first, last, BLOCK_N):
                        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
                        k = load_tile(k_base, start_n, offs_n, offs_d, stride_kn, n_k, head_dim, stage != 1, PADDED_D)
                        phi_k = k
                        if HAS_PHI and PHI_CHUNKS > 1:
                            s = chunked_bias(
                                pq_base, pk_base, start_m, start_n, offs_m, offs_n, stride_pq, stride_pk, n_q,
                                n_k, columns, rank, used, inv_scale, HAS_RANKS, BLOCK_M, BLOCK_N, BLOCK_R,
                                PHI_CHUNKS, PHI_MODE,
                                PRECISION, INTERPRETED,
                            )  # fmt: skip
                            s = product(q, tl.trans(k), s, PRECISION, INTERPRETED)
                        else:
                            if HAS_PHI:
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
                                    stage != 1,
                                    PADDED_R,
                                    HAS_RANKS,
                                )
                            s = scores(
                                q,
                                tl.trans(k),
                                phi_q,
                                phi_k,
                                inv_scale,
                                HAS_PHI,
                                PHI_MODE,
                                PRECISION,
                                INTERPRETED,
                            )
                        v = load_tile(
                            v_base,
                            start_n,
                            offs_n,
                            offs_dv,
                            stride_vn,
                            n_k,
                            head_dim_v,
                            stage != 1,
                            PADDED_DV,
                        )
                        dp = product(do, tl.trans(v), None, PRECISION, INTERPRETED)
                        offset = 0.0
                        if TILE_CENTRED:
                            offset = tile_offset(
                                raw_q_base, raw_k_base, start_m, start_n, offs_m, n_q, n_k, stride_raw_qn,
                                stride_raw_qr, stride_raw_kn, stride_raw_kr, rank, BLOCK_RANK, CENTRE_TILE,
                            )[:, None]  # fmt: skip
                        k_code = offs_n
                        if HAS_TABLE:
                            k_code = load_codes(k_codes, start_n, offs_n, n_k, HAS_CODES)
                        p, ds = weights_and_gradients(
                            s, dp, lse2[:, None], delta[:, None], q_code, k_code, (start_m + offs_m)[:, None],
                            (start_n + offs_n)[None, :], q_code[:, None], k_code[None, :], offset, table_base,
                            mask_base,
                            seed_ptr, bh, n_q, n_k, half, shift, left, right, qk_scale, dropout_p,
                            stride_mask_m, stride_mask_n, stage != 1, HAS_LEFT, HAS_RIGHT, TILE_CENTRED, HAS_TABLE,
                            HAS_MASK, HAS_DROPOUT,
                        )  # fmt: skip
                        if STORE_DQ:
                            dq = product(ds.to(k.dtype), k, dq, PRECISION, INTERPRETED)
                        if STORE_DPHI:
                            dphi = add_factor_gradient(
                                dphi, ds, phi_k, pk_base, start_n, offs_n, first_column + offs_g, stride_pk, n_k,
                                columns, rank, used, SECOND_PART, PHI_IN_REGISTERS, stage != 1, HAS_RANKS,
                                PRECISION, INTERPRETED,
                            )  # fmt: skip
                            if TILE_CENTRED:
                                # The operand is phi_k - c; the gradient belongs to phi_k - c_ref.
                                step = centre_step(
                                    raw_k_base, start_m, start_n, first_column + offs_g, n_q, n_k,
                                    stride_raw_kn, stride_raw_kr, rank, CENTRE_TILE,
                                )  # fmt: skip
                                dphi += tl.sum(ds, 1)[:, None] * step[None, :]

        if STORE_DQ:
            dq_base = dq_ptr + b * stride_dqb + h * stride_dqh + base_q * stride_dqn
            store_tile(dq_base, start_m, offs_m, offs_d, stride_dqn, n_q, head_dim, dq * scale)
        if STORE_DPHI and not SUM_DPHI:
            f = tl.cast(group_of(own, pq_s1, pq_v2, pq_s2), tl.int64)
            base = dphi_ptr + f * stride_dphi_f + base_q * stride_dphi + first_column
            store_tile(base, start_m, offs_m, offs_g, stride_dphi, n_q, rank - first_column, dphi)
            dphi = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)

    if STORE_DPHI and SUM_DPHI:
        bh = member_of(walk, 0, walk_s1, walk_v2, walk_s2)
        b, h, own, base_q, base_k, n_q, n_k, row_lse, shift = locate(
            bh, num_heads, seqlen_q, seqlen_k, stride_lse, cu_q_ptr, cu_k_ptr, IS_VARLEN, BOTTOM_RIGHT
        )
        f = tl.cast(group_of(own, pq_s1, pq_v2, pq_s2), tl.int64)
        base = dphi_ptr + tl.cast(split, tl.int64) * stride_dphi_s + f * stride_dphi_f + base_q * stride_dphi
        store_tile(base + first_column, start_m, offs_m, offs_g, stride_dphi, n_q, rank - first_column, dphi)


# -------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Walk:
    """Which (batch, head) pairs a program walks over, and what it stores."""

    sharing: Sharing
    store_own: bool
    sum_own: bool
    store_phi: bool
    sum_phi: bool

    def splits(self, blocks: int, ops: Operands) -> int:
        """Parts into which the members are split so that programs fill the GPU."""
        if not self.sum_phi or self.sum_own:
            return 1
        wanted = triton.cdiv(8 * multiprocessors(ops.q.device), blocks * self.sharing.groups)
        return max(1, min(self.sharing.members, wanted))


def launch(
    grads: list[torch.Tensor],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs_grad: tuple[bool, ...],
    *arguments: Any,
) -> None:
    """Fill the gradients that are needed.

    Args:
        grads: of query, key, value, phi_q, phi_k, table; empty tensors where not needed.
        dout: gradient of the output.
        dlse: gradient of the log-sum-exp, or None.
        out: output of the forward pass.
        lse: log-sum-exp of the forward pass (of centred scores).
        needs_grad: which of the six are needed.
        *arguments: those that the operators share (`attention/registration.py`).
    """
    ops = Operands.of(*arguments)
    dout = ops.flat(dout if dout.stride(-1) == 1 else dout.contiguous())
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    blocks = triton.cdiv(ops.seqlen_q, 64)
    out = ops.flat(out)
    _bwd_delta_kernel[(blocks * ops.batch * ops.num_heads,)](
        out,
        dout,
        None if dlse is None else dlse.contiguous(),
        lse,
        delta,
        lse2,
        *out.stride()[:3],
        *dout.stride()[:3],
        ops.num_heads,
        ops.seqlen_q,
        ops.head_dim_v,
        blocks,
        HAS_DLSE=dlse is not None,
        BLOCK_M=64,
        BLOCK_DV=ops.block_dv,
    )
    need_q, need_k, need_v, need_phi_q, need_phi_k, need_table = needs_grad
    rows = {"dout_ptr": dout, "lse_ptr": lse2, "delta_ptr": delta}
    rows |= {f"stride_do{axis}": dout.stride(n) for n, axis in enumerate("bhn")}
    if window.fits(ops, needs_grad):
        window.launch(ops, grads, rows, needs_grad)
    else:
        _launch_dkdv(ops, grads, rows, need_k or need_v, need_phi_k)
        _launch_dq(ops, grads, rows, need_q, need_phi_q)
    if need_table:
        table.launch(ops, grads[5], dout, dlse, rows)


def _launch_dkdv(
    ops: Operands, grads: list[torch.Tensor], rows: dict[str, Any], need_dkdv: bool, need_phi: bool
) -> None:
    if not (need_dkdv or need_phi):
        return
    dk, dv = (ops.flat(g) if g.numel() else torch.empty_like(x) for g, x in ((grads[1], ops.k), (grads[2], ops.v)))
    config = choose("dkdv", ops)
    blocks = triton.cdiv(ops.max_seqlen_k, config.block_n)
    strides = {f"stride_dk{axis}": dk.stride(n) for n, axis in enumerate("bhn")}
    strides |= {f"stride_dv{axis}": dv.stride(n) for n, axis in enumerate("bhn")}
    for walk in _key_walks(ops, need_dkdv, need_phi):
        _launch_walk(
            _bwd_dkdv_kernel, ops, walk, config, blocks, grads[4], ops.seqlen_k,
            ops.has_edge(ops.seqlen_q, config.block_m),
            rows | {"dk_ptr": dk, "dv_ptr": dv} | strides,
            lambda first, walk=walk: {
                "STORE_DKDV": walk.store_own and first, "SUM_DKDV": walk.sum_own,
                "dphi_mult": 1.0 if ops.factors is None else ops.factors.dphi_k_mult,
            },
        )  # fmt: skip


def _launch_dq(ops: Operands, grads: list[torch.Tensor], rows: dict[str, Any], need_dq: bool, need_phi: bool) -> None:
    if not (need_dq or need_phi):
        return
    dq = ops.flat(grads[0]) if need_dq else ops.q
    config = choose("dq", ops)
    blocks = triton.cdiv(ops.max_seqlen_q, config.block_m)
    sharing = ops.walk(ops.sharing_q) if need_phi else Sharing.nothing(ops.num_programs)
    walk = Walk(sharing, need_dq, False, need_phi, need_phi and sharing.members > 1)
    strides = {f"stride_dq{axis}": dq.stride(n) for n, axis in enumerate("bhn")}
    _launch_walk(
        _bwd_dq_kernel, ops, walk, config, blocks, grads[3], ops.seqlen_q,
        ops.has_edge(ops.seqlen_k, config.block_n), rows | {"dq_ptr": dq} | strides,
        lambda first: {"STORE_DQ": need_dq and first},
    )  # fmt: skip


def _key_walks(ops: Operands, need_dkdv: bool, need_phi: bool) -> list[Walk]:
    """How to reach dk, dv and dphi_k: together, unless grouped queries and a shared phi_k want different sums."""
    everyone = Sharing.nothing(ops.num_programs)
    shared = need_phi and ops.sharing_k.members > 1
    if ops.group == 1 or not need_dkdv:
        return [Walk(ops.walk(ops.sharing_k) if shared else everyone, need_dkdv, False, need_phi, shared)]
    grouped = Sharing(ops.num_programs // ops.group, 1, 1, ops.group)
    walks = [Walk(grouped, True, True, need_phi and not shared, False)]
    if shared:
        walks.append(Walk(ops.walk(ops.sharing_k), False, False, True, True))
    return walks


def _launch_walk(
    kernel: Any,
    ops: Operands,
    walk: Walk,
    config: Config,
    blocks: int,
    grad: torch.Tensor,
    length: int,
    has_edge: bool,
    arguments: dict[str, Any],
    own_flags: Callable[[bool], dict[str, Any]],
) -> None:
    """Launch a kernel for every chunk of gradient columns, and sum what the splits left."""
    splits = walk.splits(blocks, ops)
    factors = ops.factors
    rank = factors.rank if factors is not None and walk.store_phi else 0
    partial = grad.new_empty(0)
    if rank:
        target = grad.view(1, -1, length, rank)
        exact = splits == 1
        partial = target if exact else grad.new_empty(splits, *target.shape[1:], dtype=torch.float32)
    # A factor that is in registers for the scores serves its gradient too, with columns that are not stored.
    in_registers = factors is not None and factors.chunks == 1 and factors.block_r <= 64 and not ops.needs_two_parts
    block_g = (
        factors.block_r if factors is not None and in_registers else min(64, max(16, triton.next_power_of_2(rank)))
    )
    for first_column in range(0, max(rank, 1), block_g):
        kernel[(blocks * walk.sharing.groups, splits)](
            **ops.tensors(),
            **arguments,
            dphi_ptr=partial,
            **ops.strides(),
            stride_dphi_s=partial.stride(0) if rank else 0,
            stride_dphi_f=partial.stride(1) if rank else 0,
            stride_dphi=rank,
            **ops.numbers(),
            **dict(zip(("walk_s1", "walk_v2", "walk_s2"), walk.sharing.sizes, strict=True)),
            num_blocks=blocks,
            num_members=walk.sharing.members,
            members_per_split=triton.cdiv(walk.sharing.members, splits),
            first_column=first_column,
            **ops.flags(),
            **own_flags(first_column == 0),
            SECOND_PART=rank if ops.needs_two_parts else 0,
            PHI_IN_REGISTERS=in_registers,
            STORE_DPHI=walk.store_phi,
            SUM_DPHI=walk.sum_phi,
            HAS_EDGE=has_edge,
            BLOCK_G=block_g,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
        )
    if splits > 1:
        grad.copy_(partial.sum(0).view(grad.shape))
