"""Gradient of a relative table, bitwise repeatable.

Many score gradients fall on one entry of the table, in an order that no two runs share: they are added as whole numbers
(`fixed_point.py`).
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl

from flashbias.attention.layout import Sharing, cdiv
from flashbias.attention.triton.centring import tile_offset
from flashbias.attention.triton.configs import choose
from flashbias.attention.triton.fixed_point import FixedPoint
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, multiprocessors, walk_sizes
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import (
    LOG2E,
    add_table,
    band,
    chunked_bias,
    load_codes,
    rescaled,
    scores,
    table_index,
    tail_of,
    weights_and_gradients,
)
from flashbias.attention.triton.tiles import group_of, is_visible, load_factor, load_rows, load_tile, locate, member_of


@triton.jit
def _bwd_dtable_kernel(
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
    sum_ptr,
    power_ptr,
    failed_ptr,
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
    num_blocks_m,
    num_blocks_n,
    num_members,
    members_per_split,
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
):
    """DS of one tile, member by member, added to the entries of the table that it read."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start_n = (pid % num_blocks_n) * BLOCK_N
    start_m = ((pid // num_blocks_n) % num_blocks_m) * BLOCK_M
    walk = pid // (num_blocks_n * num_blocks_m)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_r = tl.arange(0, BLOCK_R)
    power = tl.load(power_ptr)
    sum_ptr += walk * (2 * half + 1)
    q_code = offs_m
    k_code = offs_n
    terms = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if not IS_VARLEN:
        # A branch within the walk would keep loads of the next members from being ahead.
        shift = seqlen_k - seqlen_q if BOTTOM_RIGHT else 0
        if not is_visible(start_m, start_n, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N):
            return
        # All members have these codes, this table and this band.
        q_code = load_codes(code_q_ptr, start_m, offs_m, seqlen_q, HAS_CODES)
        k_code = load_codes(code_k_ptr, start_n, offs_n, seqlen_k, HAS_CODES)
        h = tl.cast(member_of(walk, 0, walk_s1, walk_v2, walk_s2) % num_heads, tl.int64)
        terms = add_table(
            terms, table_ptr + h * stride_table, q_code, k_code, q_code[:, None], k_code[None, :], half
        )  # fmt: skip
        seen = band(
            (start_m + offs_m)[:, None], (start_n + offs_n)[None, :], shift, left, right, HAS_LEFT, HAS_RIGHT, seqlen_q,
            seqlen_k,
        )  # fmt: skip
        terms = tl.where(seen, terms / (scale * LOG2E), float("-inf"))
    ds_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    first_member = split * members_per_split
    last_member = tl.minimum(first_member + members_per_split, num_members) - 1
    lse2, delta = load_rows(lse_ptr, delta_ptr, start_m, offs_m, 0, True)
    if not IS_VARLEN:
        row = tl.cast(member_of(walk, first_member, walk_s1, walk_v2, walk_s2), tl.int64) * stride_lse
        lse2, delta = load_rows(lse_ptr + row, delta_ptr + row, start_m, offs_m, seqlen_q, True)
    for member in tl.range(first_member, last_member + 1):
        bh = member_of(walk, member, walk_s1, walk_v2, walk_s2)
        b, h, own, base_q, base_k, n_q, n_k, row_lse, shift = locate(
            bh, num_heads, seqlen_q, seqlen_k, stride_lse, cu_q_ptr, cu_k_ptr, IS_VARLEN, BOTTOM_RIGHT
        )
        visible = True
        if IS_VARLEN:
            visible = (start_m < n_q) & (start_n < n_k)
            visible &= is_visible(start_m, start_n, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
        if visible:
            q_base = q_ptr + b * stride_qb + h * stride_qh + base_q * stride_qn
            k_base = k_ptr + b * stride_kb + (h // group) * stride_kh + base_k * stride_kn
            v_base = v_ptr + b * stride_vb + (h // group) * stride_vh + base_k * stride_vn
            do_base = dout_ptr + b * stride_dob + h * stride_doh + base_q * stride_don
            q = load_tile(q_base, start_m, offs_m, offs_d, stride_qn, n_q, head_dim, True, PADDED_D)
            k = load_tile(k_base, start_n, offs_n, offs_d, stride_kn, n_k, head_dim, True, PADDED_D)
            v = load_tile(v_base, start_n, offs_n, offs_dv, stride_vn, n_k, head_dim_v, True, PADDED_DV)
            do = load_tile(do_base, start_m, offs_m, offs_dv, stride_don, n_q, head_dim_v, True, PADDED_DV)
            next_lse2, next_delta = lse2, delta
            if IS_VARLEN:
                lse2, delta = load_rows(lse_ptr + row_lse, delta_ptr + row_lse, start_m, offs_m, n_q, True)
            else:
                # Those of the next member, while this one is computed.
                following = member_of(walk, tl.minimum(member + 1, last_member), walk_s1, walk_v2, walk_s2)
                row = tl.cast(following, tl.int64) * stride_lse
                next_lse2, next_delta = load_rows(lse_ptr + row, delta_ptr + row, start_m, offs_m, seqlen_q, True)
            phi_q = q
            phi_k = k
            offset = 0.0
            used = rank
            if HAS_PHI:
                f_q = tl.cast(group_of(own, pq_s1, pq_v2, pq_s2), tl.int64)
                f_k = tl.cast(group_of(own, pk_s1, pk_v2, pk_s2), tl.int64)
                if HAS_RANKS:
                    used = tl.load(ranks_ptr + h)
                pq_base = phi_q_ptr + f_q * stride_pqf + base_q * stride_pq
                pk_base = phi_k_ptr + f_k * stride_pkf + base_k * stride_pk
                if TILE_CENTRED:
                    offset = tile_offset(
                        raw_phi_q_ptr + f_q * stride_raw_qf, raw_phi_k_ptr + f_k * stride_raw_kf, start_m, start_n,
                        offs_m, n_q, n_k, stride_raw_qn, stride_raw_qr, stride_raw_kn, stride_raw_kr, used,
                        BLOCK_RANK, CENTRE_TILE,
                    )[:, None]  # fmt: skip
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
                    phi_q = rescaled(phi_q, inv_scale, PHI_MODE)
            if HAS_PHI and PHI_CHUNKS > 1:
                s = chunked_bias(
                    pq_base, pk_base, start_m, start_n, offs_m, offs_n, stride_pq, stride_pk, n_q, n_k, columns, rank,
                    used, inv_scale, HAS_RANKS, BLOCK_M, BLOCK_N, BLOCK_R, PHI_CHUNKS, PHI_MODE, PRECISION, INTERPRETED,
                )  # fmt: skip
                s = product(q, tl.trans(k), s, PRECISION, INTERPRETED)
            else:
                s = scores(q, tl.trans(k), phi_q, phi_k, inv_scale, HAS_PHI, PHI_MODE, PRECISION, INTERPRETED)
            dp = product(do, tl.trans(v), None, PRECISION, INTERPRETED)
            if IS_VARLEN:
                q_codes = code_q_ptr
                k_codes = code_k_ptr
                if HAS_CODES:
                    q_codes = code_q_ptr + base_q
                    k_codes = code_k_ptr + base_k
                q_code = load_codes(q_codes, start_m, offs_m, n_q, HAS_CODES)
                k_code = load_codes(k_codes, start_n, offs_n, n_k, HAS_CODES)
                terms = add_table(
                    tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), table_ptr + h * stride_table, q_code, k_code,
                    q_code[:, None], k_code[None, :], half,
                ) / (scale * LOG2E)  # fmt: skip
            mask_base = mask_ptr
            if HAS_MASK:
                mask_base = mask_ptr + tl.cast(group_of(own, mask_s1, mask_v2, mask_s2), tl.int64) * stride_mask_f
            p, ds = weights_and_gradients(
                s + terms, dp, lse2[:, None], delta[:, None], q_code, k_code, (start_m + offs_m)[:, None],
                (start_n + offs_n)[None, :], q_code[:, None], k_code[None, :], offset, table_ptr + h * stride_table,
                mask_base, seed_ptr, bh, n_q, n_k, half, shift, left, right, scale * LOG2E, dropout_p,
                stride_mask_m, stride_mask_n, IS_VARLEN or HAS_MASK, HAS_LEFT, HAS_RIGHT, TILE_CENTRED, False, HAS_MASK,
                HAS_DROPOUT,
            )  # fmt: skip
            if IS_VARLEN:
                # Sequences differ in their codes: each adds its own.
                _add_entries(sum_ptr, failed_ptr, ds * power, q_code, k_code, half)
            else:
                ds_sum += ds
                lse2, delta = next_lse2, next_delta
    if not IS_VARLEN:
        _add_entries(sum_ptr, failed_ptr, ds_sum * power, q_code, k_code, half)


@triton.jit
def _add_entries(sum_ptr, failed_ptr, ds, q_code, k_code, half):
    """Add a tile to the table's sums, as integers; a tile in one tail is summed first."""
    total = tl.sum(tl.sum(ds, 1), 0)
    # Integers hold neither NaN nor infinity: that there is one is noted beside them.
    tl.store(failed_ptr, 1, mask=total - total != 0.0)
    in_tail, entry = tail_of(q_code, k_code, half)
    ds = tl.floor(ds + 0.5).to(tl.int64)
    if in_tail:
        tl.atomic_add(sum_ptr + entry, tl.sum(tl.sum(ds, 1), 0))
    else:
        tl.atomic_add(sum_ptr + table_index(q_code[:, None], k_code[None, :], half), ds)


# -------------------------------------------------------------------- launches


def launch(
    ops: Operands, grad: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None, rows: dict[str, Any]
) -> None:
    """Fill the gradient of the table, `[H or 1, T]`.

    Args:
        ops: the call.
        grad: filled.
        dout: gradient of the output.
        dlse: gradient of the log-sum-exp, or None.
        rows: arguments of the kernel for `dout`, log-sum-exp and delta, and `stride_lse` where their rows are longer.
    """
    arguments = {**ops.arguments, **rows}
    config = choose("dtable", ops)
    blocks_m = cdiv(ops.max_seqlen_q, config.block_m)
    blocks_n = cdiv(ops.max_seqlen_k, config.block_n)
    heads = grad.shape[0]
    sharing = Sharing(1, ops.num_programs // heads, heads, 1)
    programs = blocks_m * blocks_n * heads
    splits, members = sharing.parts(cdiv(8 * multiprocessors(ops.q.device), programs))
    total = FixedPoint.of(ops, grad.numel(), dout, dlse)
    start(
        _bwd_dtable_kernel,
        (programs, splits),
        **arguments,
        sum_ptr=total.sums,
        power_ptr=total.power,
        failed_ptr=total.failed,
        **walk_sizes(sharing),
        num_blocks_m=blocks_m,
        num_blocks_n=blocks_n,
        num_members=sharing.members,
        members_per_split=members,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
    )
    total.write(grad)
