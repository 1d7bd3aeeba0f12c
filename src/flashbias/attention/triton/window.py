"""Backward pass of short sequences that `short_backward.py` does not take: one tile holds all queries and keys.

Everything follows from one recomputation of the weights. Windows that share their factors are walked over by one
program, which adds up dS itself: the two products with the factors are made once, at the end.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl

from flashbias.attention.layout import Sharing, cdiv, next_power_of_2
from flashbias.attention.triton.configs import SHORT, choose
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, multiprocessors, strides_of, walk_sizes
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import LOG2E, load_codes, rescaled, scores, weights_and_gradients
from flashbias.attention.triton.tiles import group_of, load_factor, load_rows, load_tile, locate, member_of, store_tile

WIDEST = 64
"""Largest rank whose factors stand beside the tile in registers."""


@triton.jit
def _bwd_window_kernel(
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
    dk_ptr,
    dv_ptr,
    dphi_q_ptr,
    dphi_k_ptr,
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dphi_qs,
    stride_dphi_ks,
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
    num_members,
    members_per_split,
    dphi_k_mult,
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
    IS_PACKED: tl.constexpr,
    STORE_DPHI: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """All gradients of the windows that share their factors, one window after the other."""
    walk = tl.program_id(0)
    split = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = tl.arange(0, BLOCK_G)
    ds_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    first_member = split * members_per_split
    for member in tl.range(first_member, tl.minimum(first_member + members_per_split, num_members)):
        bh = member_of(walk, member, walk_s1, walk_v2, walk_s2)
        b, h, own, base_q, base_k, n_q, n_k, row_lse, shift = locate(
            bh, num_heads, seqlen_q, seqlen_k, stride_lse, cu_q_ptr, cu_k_ptr, False, BOTTOM_RIGHT
        )
        q_base = q_ptr + b * stride_qb + h * stride_qh
        k_base = k_ptr + b * stride_kb + h * stride_kh
        v_base = v_ptr + b * stride_vb + h * stride_vh
        do_base = dout_ptr + b * stride_dob + h * stride_doh
        q = load_tile(q_base, 0, offs_m, offs_d, stride_qn, seqlen_q, head_dim, True, PADDED_D)
        k = load_tile(k_base, 0, offs_n, offs_d, stride_kn, seqlen_k, head_dim, True, PADDED_D)
        v = load_tile(v_base, 0, offs_n, offs_dv, stride_vn, seqlen_k, head_dim_v, True, PADDED_DV)
        do = load_tile(do_base, 0, offs_m, offs_dv, stride_don, seqlen_q, head_dim_v, True, PADDED_DV)
        lse2, delta = load_rows(lse_ptr + row_lse, delta_ptr + row_lse, 0, offs_m, seqlen_q, True)
        phi_q = q
        phi_k = k
        used = rank
        if HAS_PHI:
            f_q = tl.cast(group_of(own, pq_s1, pq_v2, pq_s2), tl.int64)
            f_k = tl.cast(group_of(own, pk_s1, pk_v2, pk_s2), tl.int64)
            if HAS_RANKS:
                used = tl.load(ranks_ptr + h)
            pq_base = phi_q_ptr + f_q * stride_pqf
            pk_base = phi_k_ptr + f_k * stride_pkf
            phi_q = load_factor(
                pq_base,
                0,
                offs_m,
                offs_r,
                stride_pq,
                seqlen_q,
                columns,
                rank,
                used,
                True,
                PADDED_R,
                HAS_RANKS,
            )
            phi_k = load_factor(
                pk_base,
                0,
                offs_n,
                offs_r,
                stride_pk,
                seqlen_k,
                columns,
                rank,
                used,
                True,
                PADDED_R,
                HAS_RANKS,
            )
            phi_q = rescaled(phi_q, inv_scale, PHI_MODE)
        s = scores(q, tl.trans(k), phi_q, phi_k, inv_scale, HAS_PHI, PHI_MODE, PRECISION, INTERPRETED)
        dp = product(do, tl.trans(v), None, PRECISION, INTERPRETED)
        table_base = table_ptr
        q_code = offs_m
        k_code = offs_n
        if HAS_TABLE:
            table_base = table_ptr + h * stride_table
            q_code = load_codes(code_q_ptr, 0, offs_m, seqlen_q, HAS_CODES)
            k_code = load_codes(code_k_ptr, 0, offs_n, seqlen_k, HAS_CODES)
        mask_base = mask_ptr
        if HAS_MASK:
            mask_base = mask_ptr + tl.cast(group_of(own, mask_s1, mask_v2, mask_s2), tl.int64) * stride_mask_f
        p, ds = weights_and_gradients(
            s, dp, lse2[:, None], delta[:, None], q_code, k_code, offs_m[:, None], offs_n[None, :],
            q_code[:, None], k_code[None, :], 0.0, table_base, mask_base, seed_ptr, bh, seqlen_q, seqlen_k, half,
            shift, left, right, scale * LOG2E, dropout_p, stride_mask_m, stride_mask_n, True, HAS_LEFT, HAS_RIGHT,
            False, HAS_TABLE, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
        ds_half = ds.to(q.dtype)
        dv = product(tl.trans(p.to(do.dtype)), do, None, PRECISION, INTERPRETED)
        dq = product(ds_half, k, None, PRECISION, INTERPRETED)
        dk = product(tl.trans(ds_half), q, None, PRECISION, INTERPRETED)
        dq_base = dq_ptr + b * stride_dqb + h * stride_dqh
        dk_base = dk_ptr + b * stride_dkb + h * stride_dkh
        dv_base = dv_ptr + b * stride_dvb + h * stride_dvh
        store_tile(dq_base, 0, offs_m, offs_d, stride_dqn, seqlen_q, head_dim, dq * scale)
        store_tile(dk_base, 0, offs_n, offs_d, stride_dkn, seqlen_k, head_dim, dk * scale)
        store_tile(dv_base, 0, offs_n, offs_dv, stride_dvn, seqlen_k, head_dim_v, dv)
        if STORE_DPHI:
            ds_sum += ds

    if STORE_DPHI:
        bh = member_of(walk, 0, walk_s1, walk_v2, walk_s2)
        used = rank
        if HAS_RANKS:
            used = tl.load(ranks_ptr + bh % num_heads)
        f_q = tl.cast(group_of(bh, pq_s1, pq_v2, pq_s2), tl.int64)
        f_k = tl.cast(group_of(bh, pk_s1, pk_v2, pk_s2), tl.int64)
        pq_base = phi_q_ptr + f_q * stride_pqf
        pk_base = phi_k_ptr + f_k * stride_pkf
        grad_q = load_factor(
            pq_base, 0, offs_m, offs_g, stride_pq, seqlen_q, columns, rank, used, True, True, HAS_RANKS
        ).to(tl.float32)
        grad_k = load_factor(
            pk_base, 0, offs_n, offs_g, stride_pk, seqlen_k, columns, rank, used, True, True, HAS_RANKS
        ).to(tl.float32)
        if IS_PACKED:
            # Packed factors: their second parts (see `packing.products`) are wanted beside a sum over many windows.
            grad_q += load_factor(
                pq_base,
                0,
                offs_m,
                offs_g + 2 * rank,
                stride_pq,
                seqlen_q,
                columns,
                rank,
                used,
                True,
                True,
                HAS_RANKS,
            ).to(tl.float32)
            grad_k += load_factor(
                pk_base,
                0,
                offs_n,
                offs_g + rank,
                stride_pk,
                seqlen_k,
                columns,
                rank,
                used,
                True,
                True,
                HAS_RANKS,
            ).to(tl.float32)
        dphi_q = product(ds_sum, grad_k, None, PRECISION, INTERPRETED)
        dphi_k = product(tl.trans(ds_sum), grad_q, None, PRECISION, INTERPRETED) * dphi_k_mult
        dphi_q_ptr += tl.cast(split, tl.int64) * stride_dphi_qs + f_q * seqlen_q * rank
        dphi_k_ptr += tl.cast(split, tl.int64) * stride_dphi_ks + f_k * seqlen_k * rank
        store_tile(dphi_q_ptr, 0, offs_m, offs_g, rank, seqlen_q, rank, dphi_q)
        store_tile(dphi_k_ptr, 0, offs_n, offs_g, rank, seqlen_k, rank, dphi_k)


def fits(ops: Operands, needs_grad: tuple[bool, ...]) -> bool:
    """Whether one tile holds a window and one walk serves both factors."""
    if ops.is_varlen or ops.group > 1 or max(ops.seqlen_q, ops.seqlen_k) > SHORT:
        return False
    if max(ops.head_dim, ops.head_dim_v) > 64 or not any(needs_grad[:5]):
        return False
    factors = ops.factors
    if factors is None:
        return True
    if factors.chunks > 1 or factors.rank > WIDEST or factors.tile_centred:
        return False
    return not (needs_grad[3] or needs_grad[4]) or ops.sharing_q == ops.sharing_k


def launch(ops: Operands, grads: list[torch.Tensor], rows: dict[str, Any], needs_grad: tuple[bool, ...]) -> None:
    """Fill the gradients of query, key, value and the factors."""
    need_phi = needs_grad[3] or needs_grad[4]
    sharing = ops.sharing_q if need_phi else Sharing.nothing(ops.num_programs)
    wanted = cdiv(8 * multiprocessors(ops.q.device), sharing.groups)
    splits = max(1, min(sharing.members, wanted)) if need_phi else 1
    config = choose("window", ops)
    arguments: dict[str, Any] = {}
    for name, grad, like in (("dq", grads[0], ops.q), ("dk", grads[1], ops.k), ("dv", grads[2], ops.v)):
        target = ops.flat(grad) if grad.numel() else torch.empty_like(like)
        arguments[f"{name}_ptr"] = target
        arguments |= strides_of(name, target)
    rank = ops.factors.rank if ops.factors is not None else 0
    partials = []
    for length in (ops.seqlen_q, ops.seqlen_k):
        shape = (splits, sharing.groups, length, rank) if need_phi else (0,)
        partials.append(ops.q.new_empty(shape, dtype=torch.float32))
    start(
        _bwd_window_kernel,
        (sharing.groups, splits),
        **ops.arguments,
        **rows,
        **arguments,
        dphi_q_ptr=partials[0],
        dphi_k_ptr=partials[1],
        stride_dphi_qs=partials[0].stride(0),
        stride_dphi_ks=partials[1].stride(0),
        **walk_sizes(sharing),
        num_members=sharing.members,
        members_per_split=cdiv(sharing.members, splits),
        dphi_k_mult=1.0 if ops.factors is None else ops.factors.dphi_k_mult,
        IS_PACKED=ops.factors is not None and ops.factors.terms > 1,
        STORE_DPHI=need_phi,
        BLOCK_G=max(16, next_power_of_2(rank)),
        BLOCK_M=max(16, next_power_of_2(ops.seqlen_q)),
        BLOCK_N=max(16, next_power_of_2(ops.seqlen_k)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
    )
    for need, grad, partial in (
        (needs_grad[3], grads[3], partials[0]),
        (needs_grad[4], grads[4], partials[1]),
    ):
        if need:
            grad.copy_(partial.sum(0).view(grad.shape))
