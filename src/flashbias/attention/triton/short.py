"""Forward pass of short windows: a program makes the bias of a window once and walks over all that share it.

    t   = q k^T scale log2(e) + bias            one multiply-add per score, the bias in registers, -inf where hidden
    out = exp2(t - max t) v / sum               one tile holds all keys, so nothing is rescaled

Whatever depends on the window alone (factors, table, mask, band, the end of the sequence) is in the tile of the bias;
the loads of the next windows are in flight while one is worked on.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.attention.layout import Sharing, cdiv, common
from flashbias.attention.triton.configs import SHORT, WalkConfig, walk_config
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, multiprocessors, strides_of
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import (
    FLOOR,
    LN2,
    LOG2E,
    READY,
    add_table,
    band,
    chunked_bias,
    dropout_keep,
    load_codes,
    load_mask,
)
from flashbias.attention.triton.tiles import group_of, load_tile, member_of, store_tile

__all__ = ["fits", "launch", "splits_of", "walk_of"]

WIDEST = 64
"""Widest head beside whose tiles that of the bias stays in registers."""

BEFORE = 2
"""Windows in whose time a program makes its bias and waits for its first loads (an estimate)."""


@triton.jit
def power(x, FTZ: tl.constexpr):
    """2^x; where FTZ, in one instruction, results below 2^-126 being 0."""
    if FTZ:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def window_bias(
    bh,
    offs_m,
    offs_n,
    phi_q_ptr,
    phi_k_ptr,
    ranks_ptr,
    table_ptr,
    code_q_ptr,
    code_k_ptr,
    mask_ptr,
    stride_pqf,
    stride_pq: tl.constexpr,
    stride_pkf,
    stride_pk: tl.constexpr,
    stride_table,
    stride_mask_f,
    stride_mask_m,
    stride_mask_n,
    num_heads,
    seqlen_q,
    seqlen_k,
    columns: tl.constexpr,
    rank: tl.constexpr,
    half,
    left,
    right,
    scale,
    pq_s1,
    pq_v2,
    pq_s2,
    pk_s1,
    pk_v2,
    pk_s2,
    mask_s1,
    mask_v2,
    mask_s2,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_PHI: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    PHI_MODE: tl.constexpr,
    PHI_CHUNKS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All that is added to a window's scores, in units of log 2; -inf for pairs that are hidden or do not exist."""
    bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_PHI:
        f_q = tl.cast(group_of(bh, pq_s1, pq_v2, pq_s2), tl.int64)
        f_k = tl.cast(group_of(bh, pk_s1, pk_v2, pk_s2), tl.int64)
        used = rank
        if HAS_RANKS:
            used = tl.load(ranks_ptr + bh % num_heads)
        # Taken as they are: 1 / scale, where factors were packed with it, is taken out again below.
        bias = chunked_bias(
            phi_q_ptr + f_q * stride_pqf, phi_k_ptr + f_k * stride_pkf, 0, 0, offs_m, offs_n, stride_pq, stride_pk,
            seqlen_q, seqlen_k, columns, rank, used, 1.0, HAS_RANKS, BLOCK_M, BLOCK_N, BLOCK_R, PHI_CHUNKS, READY,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        if PHI_MODE == READY:
            bias *= scale * LOG2E
        else:
            bias *= LOG2E
    if HAS_TABLE:
        q_code = load_codes(code_q_ptr, 0, offs_m, seqlen_q, HAS_CODES)
        k_code = load_codes(code_k_ptr, 0, offs_n, seqlen_k, HAS_CODES)
        own_table = table_ptr + tl.cast(bh % num_heads, tl.int64) * stride_table
        bias = add_table(bias, own_table, q_code, k_code, q_code[:, None], k_code[None, :], half)
    i, j = offs_m[:, None], offs_n[None, :]
    shift = 0
    if BOTTOM_RIGHT:
        shift = seqlen_k - seqlen_q
    keep = band(i, j, shift, left, right, HAS_LEFT, HAS_RIGHT, seqlen_q, seqlen_k)
    if HAS_MASK:
        own_mask = mask_ptr + tl.cast(group_of(bh, mask_s1, mask_v2, mask_s2), tl.int64) * stride_mask_f
        keep = keep & load_mask(own_mask, i, j, stride_mask_m, stride_mask_n, seqlen_q, seqlen_k)
    return tl.where(keep, bias, float("-inf"))


@triton.jit
def place_of(walk, walk_s1, walk_v2, num_heads):
    """Where the members of a walk lie: batch element of the first, distance to the next, and the head of all."""
    b_step = walk_v2 // num_heads
    first_b = (walk // walk_v2) * walk_s1 * b_step + (walk % walk_v2) // num_heads
    return first_b, b_step, tl.cast(walk % num_heads, tl.int64)


@triton.jit
def window_weights(t, FTZ: tl.constexpr):
    """Weights of all keys, the inverse of their sum, and the log-sum-exp of scores in units of log 2."""
    # As in walks over longer rows: one that sees no key, or only keys masked by -1e9, has weights of 0. The backward
    # pass could not make the latter's again from a log-sum-exp that is rounded to whole numbers.
    top = tl.maximum(tl.max(t, 1), FLOOR)
    p = power(t - top[:, None], FTZ)
    total = tl.sum(p, 1)
    dead = total == 0.0
    safe = tl.where(dead, 1.0, total)
    return p, 1.0 / safe, tl.where(dead, float("-inf"), (top + tl.log2(safe)) * LN2)


@triton.jit
def _fwd_short_kernel(
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
    walk_s1,
    walk_v2,
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
    FTZ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output and log-sum-exp of windows that share their bias, one after the other."""
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
    k_ptr += (h // group) * stride_kh
    v_ptr += (h // group) * stride_vh
    out_ptr += h * stride_oh
    lse_ptr += h * stride_lse
    for member in tl.range(first, last, num_stages=STAGES):
        b = tl.cast(first_b + member * b_step, tl.int64)
        q_base = q_ptr + b * stride_qb
        k_base = k_ptr + b * stride_kb
        v_base = v_ptr + b * stride_vb
        # Rows past the end are zeros: nothing of the next window, which may be NaN, reaches a product.
        q = load_tile(q_base, 0, offs_m, offs_d, stride_qn, seqlen_q, head_dim, True, PADDED_D)
        k = load_tile(k_base, 0, offs_n, offs_d, stride_kn, seqlen_k, head_dim, True, PADDED_D)
        v = load_tile(v_base, 0, offs_n, offs_dv, stride_vn, seqlen_k, head_dim_v, True, PADDED_DV)
        s = product(q, tl.trans(k), None, PRECISION, INTERPRETED)
        p, over_total, lse = window_weights(s * (scale * LOG2E) + bias, FTZ)
        if HAS_DROPOUT:
            bh = b * num_heads + h
            keep = dropout_keep(seed_ptr, bh, offs_m[:, None], offs_n[None, :], seqlen_q, seqlen_k, dropout_p)
            p = tl.where(keep, p / (1.0 - dropout_p), 0.0)
        out = product(p.to(v.dtype), v, None, PRECISION, INTERPRETED) * over_total[:, None]
        store_tile(out_ptr + b * stride_ob, 0, offs_m, offs_dv, stride_on, seqlen_q, head_dim_v, out)
        tl.store(lse_ptr + b * num_heads * stride_lse + offs_m, lse, mask=offs_m < seqlen_q)


def walk_of(ops: Operands) -> Sharing | None:
    """Which windows share all that is added to their scores; None if its parts are shared in different ways."""
    parts = []
    if ops.phi_q is not None:
        parts += [ops.sharing_q, ops.sharing_k]
    if ops.mask is not None:
        parts.append(ops.sharing_mask)
    if ops.ranks_per_head is not None or (ops.table is not None and ops.table.shape[0] > 1):
        parts.append(Sharing(1, ops.batch, ops.num_heads, 1))
    return common(parts, ops.num_programs, ops.num_heads)


def fits(ops: Operands) -> bool:
    """Whether one tile holds a window, and enough windows share a bias to make it once."""
    # Two TF32 parts of every float32 operand would leave no registers for the bias.
    if ops.is_varlen or not ops.is_half or max(ops.seqlen_q, ops.seqlen_k) > SHORT:
        return False
    if max(ops.head_dim, ops.head_dim_v) > WIDEST or min(ops.seqlen_q, ops.seqlen_k) == 0:
        return False
    walk = walk_of(ops)
    return walk is not None and walk.members > 1


def is_cuda(x: Tensor) -> bool:
    """Whether kernels run on an NVIDIA GPU, and not elsewhere or through the interpreter."""
    return x.device.type != "cpu" and torch.version.hip is None


def launch(ops: Operands, out: Tensor, lse: Tensor) -> None:
    """Fill `out` (as `[B, H, N, head_dim_v]`) and `lse` (`[B, H, N]`) for a call that `fits`."""
    walk, config = walk_of(ops), walk_config("forward", ops)
    assert walk is not None
    splits = splits_of(walk, config.resident * multiprocessors(ops.q.device))
    start(
        _fwd_short_kernel,
        (walk.groups, splits),
        **ops.arguments,
        out_ptr=out,
        lse_ptr=lse,
        **strides_of("o", out),
        **walk_arguments(ops, walk, splits, config),
    )


def walk_arguments(ops: Operands, walk: Sharing, splits: int, config: WalkConfig) -> dict[str, Any]:
    """What both kernels are told of a walk and of how it runs."""
    return {
        "walk_s1": walk.s1,
        "walk_v2": walk.v2,
        "members_per_split": cdiv(walk.members, splits),
        "FTZ": is_cuda(ops.q),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        # Of other loops: that over chunks of wide factors runs once, and its buffers would be in the way.
        "num_stages": 1,
    }


@functools.lru_cache(maxsize=1024)
def splits_of(walk: Sharing, slots: int) -> int:
    """Parts of a walk with which all programs end soonest, where `slots` of them run beside each other."""

    def steps(splits: int) -> int:
        return cdiv(walk.groups * splits, slots) * (cdiv(walk.members, splits) + BEFORE)

    return min(range(1, min(walk.members, slots) + 1), key=steps)
