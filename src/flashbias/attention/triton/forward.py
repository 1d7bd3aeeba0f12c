"""Forward pass: one kernel for all shapes."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl

from flashbias.attention.layout import cdiv
from flashbias.attention.triton import short
from flashbias.attention.triton.assembler import soundly_assembled
from flashbias.attention.triton.centring import tile_offset
from flashbias.attention.triton.configs import choose
from flashbias.attention.triton.join import join
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import (
    FLOOR,
    LN2,
    LOG2E,
    add_table,
    band,
    chunked_bias,
    dropout_keep,
    load_codes,
    load_mask,
    rescaled,
    scores,
)
from flashbias.attention.triton.tiles import group_of, key_range, load_factor, load_tile, locate, store_tile

EDGE = 64
"""Keys of a tile at the edge of the band or of the sequence: small, so that less of it is wasted."""


@triton.jit
def _fwd_range(
    acc,
    l_i,
    m_i,
    q,
    phi_q,
    k_ptr,
    v_ptr,
    phi_q_ptr,
    phi_k_ptr,
    raw_phi_q_ptr,
    raw_phi_k_ptr,
    table_ptr,
    code_k_ptr,
    q_code,
    mask_ptr,
    seed_ptr,
    bh,
    start_m,
    lo,
    hi,
    seqlen_q,
    seqlen_k,
    head_dim: tl.constexpr,
    head_dim_v: tl.constexpr,
    columns: tl.constexpr,
    rank: tl.constexpr,
    used,
    half,
    shift,
    left,
    right,
    qk_scale,
    inv_scale,
    dropout_p,
    stride_kn,
    stride_vn,
    stride_pq: tl.constexpr,
    stride_pk: tl.constexpr,
    stride_raw_qn,
    stride_raw_qr,
    stride_raw_kn,
    stride_raw_kr,
    stride_mask_m,
    stride_mask_n,
    BOUNDED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_PHI: tl.constexpr,
    PHI_MODE: tl.constexpr,
    HAS_RANKS: tl.constexpr,
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
    """Online softmax over a range of keys, with bounds and masks only where BOUNDED."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_r = tl.arange(0, BLOCK_R)
    for start_n in tl.range(lo, hi, BLOCK_N):
        # [BLOCK_N, BLOCK_D]
        k = load_tile(k_ptr, start_n, offs_n, offs_d, stride_kn, seqlen_k, head_dim, BOUNDED, PADDED_D)
        phi_k = k
        if HAS_PHI and PHI_CHUNKS == 1:
            # [BLOCK_N, BLOCK_R]
            phi_k = load_factor(
                phi_k_ptr,
                start_n,
                offs_n,
                offs_r,
                stride_pk,
                seqlen_k,
                columns,
                rank,
                used,
                BOUNDED,
                PADDED_R,
                HAS_RANKS,
            )
        if HAS_PHI and PHI_CHUNKS > 1:
            s = chunked_bias(
                phi_q_ptr, phi_k_ptr, start_m, start_n, offs_m, offs_n, stride_pq, stride_pk, seqlen_q, seqlen_k,
                columns, rank, used, inv_scale, HAS_RANKS, BLOCK_M, BLOCK_N, BLOCK_R, PHI_CHUNKS, PHI_MODE,
                PRECISION, INTERPRETED,
            )  # fmt: skip
            s = product(q, tl.trans(k), s, PRECISION, INTERPRETED)
        else:
            s = scores(q, tl.trans(k), phi_q, phi_k, inv_scale, HAS_PHI, PHI_MODE, PRECISION, INTERPRETED)
        plain: tl.constexpr = not (BOUNDED or HAS_TABLE or HAS_MASK or TILE_CENTRED)
        if plain:
            m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - m_new[:, None])
        else:
            s = s * qk_scale
            i = (start_m + offs_m)[:, None]
            j = (start_n + offs_n)[None, :]
            if TILE_CENTRED:
                offset = tile_offset(
                    raw_phi_q_ptr, raw_phi_k_ptr, start_m, start_n, offs_m, seqlen_q, seqlen_k, stride_raw_qn,
                    stride_raw_qr, stride_raw_kn, stride_raw_kr, used, BLOCK_RANK, CENTRE_TILE,
                )  # fmt: skip
                s += offset[:, None] * LOG2E
            if HAS_TABLE:
                k_code = load_codes(code_k_ptr, start_n, offs_n, seqlen_k, HAS_CODES)
                s = add_table(s, table_ptr, q_code, k_code, q_code[:, None], k_code[None, :], half)
            if BOUNDED:
                keep = band(i, j, shift, left, right, HAS_LEFT, HAS_RIGHT, seqlen_q, seqlen_k)
                if HAS_MASK:
                    keep = keep & load_mask(mask_ptr, i, j, stride_mask_m, stride_mask_n, seqlen_q, seqlen_k)
                s = tl.where(keep, s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        if HAS_DROPOUT:
            i = (start_m + offs_m)[:, None]
            j = (start_n + offs_n)[None, :]
            keep = dropout_keep(seed_ptr, bh, i, j, seqlen_q, seqlen_k, dropout_p)
            p = tl.where(keep, p / (1.0 - dropout_p), 0.0)
        # [BLOCK_N, BLOCK_DV]
        v = load_tile(v_ptr, start_n, offs_n, offs_dv, stride_vn, seqlen_k, head_dim_v, BOUNDED, PADDED_DV)
        acc = product(p.to(v_ptr.dtype.element_ty), v, acc * alpha[:, None], PRECISION, INTERPRETED)
    return acc, l_i, m_i


@triton.jit
def _fwd_kernel(
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
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
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
    num_blocks,
    split_size,
    stride_split_out,
    stride_split_lse,
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
    IS_SPLIT: tl.constexpr,
    HAS_EDGE: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    """Output and log-sum-exp of one block of queries of one (batch, head)."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    bh = pid // num_blocks
    # Under a causal mask the last blocks are the longest: they go first.
    start_m = (num_blocks - 1 - pid % num_blocks) * BLOCK_M
    b, h, own, base_q, base_k, seqlen_q, seqlen_k, row_lse, shift = locate(
        bh, num_heads, seqlen_q, seqlen_k, stride_lse, cu_q_ptr, cu_k_ptr, IS_VARLEN, BOTTOM_RIGHT
    )
    if IS_VARLEN:
        if start_m >= seqlen_q:
            return
    q_ptr += b * stride_qb + h * stride_qh + base_q * stride_qn
    k_ptr += b * stride_kb + (h // group) * stride_kh + base_k * stride_kn
    v_ptr += b * stride_vb + (h // group) * stride_vh + base_k * stride_vn
    out_ptr += b * stride_ob + h * stride_oh + base_q * stride_on + tl.cast(split, tl.int64) * stride_split_out
    lse_ptr += row_lse + tl.cast(split, tl.int64) * stride_split_lse
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_r = tl.arange(0, BLOCK_R)

    q = load_tile(q_ptr, start_m, offs_m, offs_d, stride_qn, seqlen_q, head_dim, True, PADDED_D)
    phi_q = q
    used = rank
    if HAS_PHI:
        f_q = tl.cast(group_of(own, pq_s1, pq_v2, pq_s2), tl.int64)
        f_k = tl.cast(group_of(own, pk_s1, pk_v2, pk_s2), tl.int64)
        phi_q_ptr += f_q * stride_pqf + base_q * stride_pq
        phi_k_ptr += f_k * stride_pkf + base_k * stride_pk
        raw_phi_q_ptr += f_q * stride_raw_qf
        raw_phi_k_ptr += f_k * stride_raw_kf
        if HAS_RANKS:
            used = tl.load(ranks_ptr + h)
        if PHI_CHUNKS == 1:
            phi_q = load_factor(
                phi_q_ptr,
                start_m,
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
            phi_q = rescaled(phi_q, inv_scale, PHI_MODE)
    q_code = offs_m
    if HAS_TABLE:
        table_ptr += h * stride_table
        if HAS_CODES:
            code_q_ptr += base_q
            code_k_ptr += base_k
        q_code = load_codes(code_q_ptr, start_m, offs_m, seqlen_q, HAS_CODES)
    if HAS_MASK:
        mask_ptr += tl.cast(group_of(own, mask_s1, mask_v2, mask_s2), tl.int64) * stride_mask_f

    lo, full_lo, full_hi, hi = key_range(start_m, seqlen_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    if IS_SPLIT:
        lo = tl.maximum(lo, split * split_size)
        hi = tl.minimum(hi, (split + 1) * split_size)
        full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi) // BLOCK_N * BLOCK_N
        full_hi = tl.maximum(full_hi, full_lo)
    if HAS_MASK:
        full_lo = hi
        full_hi = hi

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], FLOOR, dtype=tl.float32)
    # Tiles at the edges of the band are smaller and carry bounds and masks; those between do not.
    for stage in tl.static_range(3):
        if stage == 0:
            first, last = lo, full_lo
        elif stage == 1:
            first, last = full_lo, full_hi
        else:
            first, last = full_hi, hi
        # Only a left bound or a user's mask leaves anything to do before the full tiles.
        if stage == 1 or (stage == 0 and (HAS_LEFT or HAS_MASK)) or (stage == 2 and HAS_EDGE):
            # Inside the branch a range is known not to be empty: otherwise the zeros of the empty path meet products
            # in flight, and the assembler runs every product by itself (its warning C7515).
            if first < last:
                acc, l_i, m_i = _fwd_range(
                    acc, l_i, m_i, q, phi_q, k_ptr, v_ptr, phi_q_ptr, phi_k_ptr, raw_phi_q_ptr, raw_phi_k_ptr,
                    table_ptr, code_k_ptr, q_code, mask_ptr, seed_ptr, bh, start_m, first, last, seqlen_q, seqlen_k,
                    head_dim, head_dim_v, columns, rank, used, half, shift, left, right, scale * LOG2E, inv_scale,
                    dropout_p,
                    stride_kn, stride_vn, stride_pq, stride_pk, stride_raw_qn, stride_raw_qr, stride_raw_kn,
                    stride_raw_kr, stride_mask_m, stride_mask_n, stage != 1, HAS_LEFT, HAS_RIGHT, HAS_PHI,
                    PHI_MODE, HAS_RANKS, PHI_CHUNKS, PADDED_R, TILE_CENTRED, CENTRE_TILE, BLOCK_RANK, HAS_TABLE,
                    HAS_CODES,
                    HAS_MASK, HAS_DROPOUT, PADDED_D, PADDED_DV, PRECISION, INTERPRETED, BLOCK_M,
                    BLOCK_N if stage == 1 else BLOCK_EDGE, BLOCK_D,
                    BLOCK_DV, BLOCK_R,
                )  # fmt: skip

    dead = l_i == 0.0
    l_safe = tl.where(dead, 1.0, l_i)
    lse = tl.where(dead, float("-inf"), (m_i + tl.log2(l_safe)) * LN2)
    store_tile(out_ptr, start_m, offs_m, offs_dv, stride_on, seqlen_q, head_dim_v, acc / l_safe[:, None])
    tl.store(lse_ptr + start_m + offs_m, lse, mask=(start_m + offs_m) < seqlen_q)


@soundly_assembled
def launch(out: torch.Tensor, lse: torch.Tensor, *arguments: Any) -> None:
    """Fill `out` and `lse`; the arguments are those that the operators share (`attention/registration.py`)."""
    ops = Operands.of(*arguments)
    if short.fits(ops):
        short.launch(ops, ops.flat(out), lse)
        return
    config = choose("forward", ops)
    blocks = cdiv(ops.max_seqlen_q, config.block_m)
    splits, split_size = ops.key_splits(blocks, config.block_n)
    out_flat = ops.flat(out)
    target, target_lse = out_flat, lse
    if splits > 1:
        target = out.new_empty((splits, *out_flat.shape), dtype=torch.float32)
        target_lse = lse.new_empty((splits, *lse.shape))
    strides = target.stride()[-4:-1]
    start(
        _fwd_kernel,
        (blocks * ops.num_programs, splits),
        **ops.arguments,
        out_ptr=target,
        lse_ptr=target_lse,
        stride_ob=strides[0],
        stride_oh=strides[1],
        stride_on=strides[2],
        num_blocks=blocks,
        split_size=split_size,
        stride_split_out=target.stride(0) if splits > 1 else 0,
        stride_split_lse=target_lse.stride(0) if splits > 1 else 0,
        IS_SPLIT=splits > 1,
        HAS_EDGE=ops.has_edge(ops.seqlen_k, config.block_n),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_EDGE=min(config.block_n, EDGE),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
    )
    if splits > 1:
        join(target, target_lse, out_flat, lse)
