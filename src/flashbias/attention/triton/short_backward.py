"""Backward pass of short windows that share their bias: as `short.py`, from one recomputation of the weights.

One tile holds all keys of a row, so delta is a sum over it, and the output of the forward pass is not read:

    u = P dP,   delta = rowsum(u) / rowsum(P) - dlse,   dS = u - P delta

The rows of P sum to 1 only as well as a large log-sum-exp is rounded; without that sum below, rows of dS would not sum
to 0 where the bias is large.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.attention.layout import next_power_of_2
from flashbias.attention.triton import short
from flashbias.attention.triton.configs import walk_config
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, multiprocessors, strides_of
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import LOG2E, dropout_keep
from flashbias.attention.triton.short import place_of, power, window_bias
from flashbias.attention.triton.tiles import group_of, load_factor, load_tile, member_of, store_tile

__all__ = ["fits", "launch"]


@triton.jit
def _bwd_short_kernel(
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
    dlse_ptr,
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
    FTZ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    STORE_DPHI: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All gradients of windows that share their bias, one after the other."""
    walk = tl.program_id(0)
    first = tl.program_id(1) * members_per_split
    last = tl.minimum(first + members_per_split, walk_s1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    bias = window_bias(
        member_of(walk, 0, walk_s1, walk_v2, 1), offs_m, offs_n, phi_q_ptr, phi_k_ptr, ranks_ptr, table_ptr,
        code_q_ptr, code_k_ptr, mask_ptr, stride_pqf, stride_pq, stride_pkf, stride_pk, stride_table, stride_mask_f,
        stride_mask_m, stride_mask_n, num_heads, seqlen_q, seqlen_k, columns, rank, half, left, right, scale, pq_s1,
        pq_v2, pq_s2, pk_s1, pk_v2, pk_s2, mask_s1, mask_v2, mask_s2, HAS_LEFT, HAS_RIGHT, BOTTOM_RIGHT, HAS_PHI,
        HAS_RANKS, PHI_MODE, PHI_CHUNKS, HAS_TABLE, HAS_CODES, HAS_MASK, PRECISION, INTERPRETED, BLOCK_M, BLOCK_N,
        BLOCK_R,
    )  # fmt: skip
    first_b, b_step, h = place_of(walk, walk_s1, walk_v2, num_heads)
    q_ptr += h * stride_qh
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    dout_ptr += h * stride_doh
    dq_ptr += h * stride_dqh
    dk_ptr += h * stride_dkh
    dv_ptr += h * stride_dvh
    ds_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    inside = offs_m < seqlen_q
    for member in tl.range(first, last, num_stages=STAGES):
        b = tl.cast(first_b + member * b_step, tl.int64)
        q = load_tile(q_ptr + b * stride_qb, 0, offs_m, offs_d, stride_qn, seqlen_q, head_dim, True, PADDED_D)
        k = load_tile(k_ptr + b * stride_kb, 0, offs_n, offs_d, stride_kn, seqlen_k, head_dim, True, PADDED_D)
        v = load_tile(v_ptr + b * stride_vb, 0, offs_n, offs_dv, stride_vn, seqlen_k, head_dim_v, True, PADDED_DV)
        do = load_tile(dout_ptr + b * stride_dob, 0, offs_m, offs_dv, stride_don, seqlen_q, head_dim_v, True, PADDED_DV)
        row = (b * num_heads + h) * stride_lse
        lse = tl.load(lse_ptr + row + offs_m, mask=inside, other=float("-inf"))
        # Rows that attend to nothing get weights exp2(-inf) = 0.
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        s = product(q, tl.trans(k), None, PRECISION, INTERPRETED)
        dp = product(do, tl.trans(v), None, PRECISION, INTERPRETED)
        p = power((s * (scale * LOG2E) + bias) - lse2[:, None], FTZ)
        p_dropped = p
        if HAS_DROPOUT:
            bh = b * num_heads + h
            keep = dropout_keep(seed_ptr, bh, offs_m[:, None], offs_n[None, :], seqlen_q, seqlen_k, dropout_p)
            p_dropped = tl.where(keep, p / (1.0 - dropout_p), 0.0)
            dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
        dv = product(tl.trans(p_dropped.to(do.dtype)), do, None, PRECISION, INTERPRETED)
        u = p * dp
        total = tl.sum(p, 1)
        delta = tl.sum(u, 1) / tl.where(total == 0.0, 1.0, total)
        if HAS_DLSE:
            delta -= tl.load(dlse_ptr + row + offs_m, mask=inside, other=0.0)
        ds = u - p * delta[:, None]
        ds_half = ds.to(q.dtype)
        dq = product(ds_half, k, None, PRECISION, INTERPRETED)
        dk = product(tl.trans(ds_half), q, None, PRECISION, INTERPRETED)
        store_tile(dq_ptr + b * stride_dqb, 0, offs_m, offs_d, stride_dqn, seqlen_q, head_dim, dq * scale)
        store_tile(dk_ptr + b * stride_dkb, 0, offs_n, offs_d, stride_dkn, seqlen_k, head_dim, dk * scale)
        store_tile(dv_ptr + b * stride_dvb, 0, offs_n, offs_dv, stride_dvn, seqlen_k, head_dim_v, dv)
        if STORE_DPHI:
            ds_sum += ds

    if STORE_DPHI:
        bh = member_of(walk, 0, walk_s1, walk_v2, 1)
        used = rank
        if HAS_RANKS:
            used = tl.load(ranks_ptr + bh % num_heads)
        pq_base = phi_q_ptr + tl.cast(group_of(bh, pq_s1, pq_v2, pq_s2), tl.int64) * stride_pqf
        pk_base = phi_k_ptr + tl.cast(group_of(bh, pk_s1, pk_v2, pk_s2), tl.int64) * stride_pkf
        grad_q = leading_parts(
            pq_base, offs_m, stride_pq, seqlen_q, columns, rank, used, 2 * rank, IS_PACKED, HAS_RANKS, BLOCK_G
        )
        grad_k = leading_parts(
            pk_base, offs_n, stride_pk, seqlen_k, columns, rank, used, rank, IS_PACKED, HAS_RANKS, BLOCK_G
        )
        dphi_q = product(ds_sum, grad_k, None, PRECISION, INTERPRETED)
        dphi_k = product(tl.trans(ds_sum), grad_q, None, PRECISION, INTERPRETED) * dphi_k_mult
        offs_g = tl.arange(0, BLOCK_G)
        part = tl.cast(tl.program_id(1), tl.int64)
        dphi_q_ptr += part * stride_dphi_qs + tl.cast(walk, tl.int64) * seqlen_q * rank
        dphi_k_ptr += part * stride_dphi_ks + tl.cast(walk, tl.int64) * seqlen_k * rank
        store_tile(dphi_q_ptr, 0, offs_m, offs_g, rank, seqlen_q, rank, dphi_q)
        store_tile(dphi_k_ptr, 0, offs_n, offs_g, rank, seqlen_k, rank, dphi_k)


@triton.jit
def leading_parts(
    ptr,
    rows,
    stride: tl.constexpr,
    length,
    columns: tl.constexpr,
    rank: tl.constexpr,
    used,
    second: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A factor for gradients, in float32: of a packed one its first part and its second, which begins at `second`."""
    cols = tl.arange(0, BLOCK_G)
    phi = load_factor(ptr, 0, rows, cols, stride, length, columns, rank, used, True, True, HAS_RANKS).to(tl.float32)
    if IS_PACKED:
        # Its columns past the rank, which another part follows, are not stored.
        phi += load_factor(
            ptr, 0, rows, cols + second, stride, length, columns, rank, used, True, True, HAS_RANKS
        ).to(tl.float32)  # fmt: skip
    return phi


def fits(ops: Operands, needs_grad: tuple[bool, ...]) -> bool:
    """Whether `launch` takes the call."""
    if not short.fits(ops) or ops.group > 1 or not any(needs_grad[:5]):
        return False
    return ops.factors is None or (ops.factors.chunks == 1 and ops.factors.rank <= short.WIDEST)


def launch(
    ops: Operands,
    grads: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    needs_grad: tuple[bool, ...],
) -> None:
    """Fill the gradients of query, key, value and the factors for a call that `fits`."""
    need_phi = needs_grad[3] or needs_grad[4]
    walk, factors, config = short.walk_of(ops), ops.factors, walk_config("backward", ops)
    assert walk is not None
    splits = short.splits_of(walk, config.resident * multiprocessors(ops.q.device))
    arguments: dict[str, Any] = {}
    for name, grad, like in (("dq", grads[0], ops.q), ("dk", grads[1], ops.k), ("dv", grads[2], ops.v)):
        target = ops.flat(grad) if grad.numel() else torch.empty_like(like)
        arguments[f"{name}_ptr"] = target
        arguments |= strides_of(name, target)
    rank = factors.rank if factors is not None else 0
    partials = [
        lse.new_empty((splits, walk.groups, length, rank) if need_phi else (0,))
        for length in (ops.seqlen_q, ops.seqlen_k)
    ]
    start(
        _bwd_short_kernel,
        (walk.groups, splits),
        **ops.arguments,
        **arguments,
        dout_ptr=dout,
        **strides_of("do", dout),
        lse_ptr=lse,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        dphi_q_ptr=partials[0],
        dphi_k_ptr=partials[1],
        stride_dphi_qs=partials[0].stride(0),
        stride_dphi_ks=partials[1].stride(0),
        **short.walk_arguments(ops, walk, splits, config),
        dphi_k_mult=1.0 if factors is None else factors.dphi_k_mult,
        HAS_DLSE=dlse is not None,
        IS_PACKED=factors is not None and factors.terms > 1,
        STORE_DPHI=need_phi,
        BLOCK_G=max(16, next_power_of_2(rank)),
    )
    for need, grad, partial, sharing in (
        (needs_grad[3], grads[3], partials[0], ops.sharing_q),
        (needs_grad[4], grads[4], partials[1], ops.sharing_k),
    ):
        if need:
            # Walks of one head each: those that share a factor follow one another.
            own = partial.view(splits, sharing.groups, -1, *partial.shape[2:])
            grad.copy_(own.sum((0, 2)).view(grad.shape))
