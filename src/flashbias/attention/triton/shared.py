"""Gradients of factors that many (batch, head) pairs share, where the factors are wide.

A program owns a tile of scores and walks over the members. What does not change from member to member is made once:
the tile of the bias, with everything that is masked at -inf, before the walk, and both products with the factors

    dphi_q += (sum of dS) phi_k        dphi_k += (sum of dS)^T phi_q

after it. So the walk costs two products as wide as a head, however many columns the factors have. The sums of tiles
meet in float32 buffers by additions whose order varies: fast, and not repeatable to the bit.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.attention.layout import Sharing, cdiv, next_power_of_2
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, multiprocessors
from flashbias.attention.triton.products import product
from flashbias.attention.triton.scores import LOG2E
from flashbias.attention.triton.tiles import is_visible, load_rows, load_tile, member_of

__all__ = ["is_possible", "launch"]

CHUNK = 32
"""Columns of the factors that are multiplied at once."""

FEWEST_MEMBERS = 4
"""Members that a part of a walk has at least, so that the bias is not made for nothing."""

PROGRAMS = 6
"""Programs wanted for each multiprocessor."""


@triton.jit
def _bwd_shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    phi_q_ptr,
    phi_k_ptr,
    lse_ptr,
    delta_ptr,
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
    stride_pqf,
    stride_pq,
    stride_pkf,
    stride_pk,
    stride_dpqf,
    stride_dpq,
    stride_dpkf,
    stride_dpk,
    stride_rows,
    num_heads,
    group,
    seqlen_q,
    seqlen_k,
    head_dim: tl.constexpr,
    head_dim_v: tl.constexpr,
    columns,
    rank,
    shift,
    left,
    right,
    scale,
    s1,
    v2,
    s2,
    blocks_m,
    blocks_n,
    num_members,
    members_per_split,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SUM_DPQ: tl.constexpr,
    SUM_DPK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum dS of one tile over the members of a part, then multiply it by the factors."""
    start_n = (tl.program_id(0) % blocks_n) * BLOCK_N
    start_m = ((tl.program_id(0) // blocks_n) % blocks_m) * BLOCK_M
    f = tl.program_id(0) // (blocks_n * blocks_m)
    if not is_visible(start_m, start_n, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N):
        return
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_dv, offs_c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_C)
    own_f = tl.cast(f, tl.int64)
    phi_q_ptr += own_f * stride_pqf
    phi_k_ptr += own_f * stride_pkf

    bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, columns, BLOCK_C):
        pq = load_tile(phi_q_ptr, start_m, offs_m, c + offs_c, stride_pq, seqlen_q, columns, True, True)
        pk = load_tile(phi_k_ptr, start_n, offs_n, c + offs_c, stride_pk, seqlen_k, columns, True, True)
        bias = product(pq, tl.trans(pk), bias, PRECISION, INTERPRETED)
    i, j = (start_m + offs_m)[:, None], (start_n + offs_n)[None, :]
    keep = (i < seqlen_q) & (j < seqlen_k)
    if HAS_RIGHT:
        keep = keep & (j - i <= shift + right)
    if HAS_LEFT:
        keep = keep & (j - i >= shift - left)
    bias = tl.where(keep, bias, float("-inf"))

    qk_scale = scale * LOG2E
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = tl.program_id(1) * members_per_split
    last = min(first + members_per_split, num_members) - 1
    row = tl.cast(member_of(f, first, s1, v2, s2), tl.int64) * stride_rows
    lse, delta = load_rows(lse_ptr + row, delta_ptr + row, start_m, offs_m, seqlen_q, True)
    for m in range(first, last + 1):
        bh = member_of(f, m, s1, v2, s2)
        head = bh % num_heads
        b, h = tl.cast(bh // num_heads, tl.int64), tl.cast(head, tl.int64)
        hk = tl.cast(head // group, tl.int64)
        q = load_tile(
            q_ptr + b * stride_qb + h * stride_qh, start_m, offs_m, offs_d, stride_qn, seqlen_q, head_dim, True,
            head_dim != BLOCK_D,
        )  # fmt: skip
        k = load_tile(
            k_ptr + b * stride_kb + hk * stride_kh, start_n, offs_n, offs_d, stride_kn, seqlen_k, head_dim, True,
            head_dim != BLOCK_D,
        )  # fmt: skip
        do = load_tile(
            do_ptr + b * stride_dob + h * stride_doh, start_m, offs_m, offs_dv, stride_don, seqlen_q, head_dim_v, True,
            head_dim_v != BLOCK_DV,
        )  # fmt: skip
        v = load_tile(
            v_ptr + b * stride_vb + hk * stride_vh, start_n, offs_n, offs_dv, stride_vn, seqlen_k, head_dim_v, True,
            head_dim_v != BLOCK_DV,
        )  # fmt: skip
        # Those of the next member, while this one is computed: nothing else loads them ahead.
        row = tl.cast(member_of(f, min(m + 1, last), s1, v2, s2), tl.int64) * stride_rows
        next_lse, next_delta = load_rows(lse_ptr + row, delta_ptr + row, start_m, offs_m, seqlen_q, True)
        s = product(q, tl.trans(k), None, PRECISION, INTERPRETED) + bias
        p = tl.exp2(s * qk_scale - lse[:, None])
        dp = product(do, tl.trans(v), None, PRECISION, INTERPRETED)
        total += p * (dp - delta[:, None])
        lse, delta = next_lse, next_delta

    for c in range(0, rank, BLOCK_C):
        cols = c + offs_c
        if SUM_DPQ:
            pk = load_tile(phi_k_ptr, start_n, offs_n, cols, stride_pk, seqlen_k, rank, True, True).to(tl.float32)
            ptrs = dphi_q_ptr + own_f * stride_dpqf + i * stride_dpq + cols[None, :]
            own = product(total, pk, None, "tf32", INTERPRETED)
            tl.atomic_add(ptrs, own, mask=(i < seqlen_q) & (cols < rank)[None, :], sem="relaxed")
        if SUM_DPK:
            pq = load_tile(phi_q_ptr, start_m, offs_m, cols, stride_pq, seqlen_q, rank, True, True).to(tl.float32)
            j_rows = (start_n + offs_n)[:, None]
            ptrs = dphi_k_ptr + own_f * stride_dpkf + j_rows * stride_dpk + cols[None, :]
            own = product(tl.trans(total), pq, None, "tf32", INTERPRETED) * scale
            tl.atomic_add(ptrs, own, mask=(j_rows < seqlen_k) & (cols < rank)[None, :], sem="relaxed")


def is_possible(ops: Operands) -> bool:
    """Whether the same (batch, head) pairs share both factors, so that one sum of dS serves both gradients."""
    return ops.sharing_q == ops.sharing_k


def launch(
    ops: Operands,
    factors: tuple[Tensor, Tensor],
    sums: tuple[Tensor | None, Tensor | None],
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
) -> None:
    """Add the gradients of shared factors to buffers.

    Args:
        ops: the call, without table, mask, dropout, packed batches and ranks per head.
        factors: phi_q over scale and phi_k, `[groups, N or M, columns]`, whose product over all columns is the bias
            over scale; the first R columns are what the gradients are made of.
        sums: of dphi_q and dphi_k, float32 `[groups, N or M, R or more]`; None where no gradient is needed.
        dout: gradient of the output, `[B, H, N, head_dim_v]`.
        lse2: as `backward.rows_of` makes it.
        delta: likewise.
    """
    (phi_q, phi_k), (dphi_q, dphi_k), sharing = factors, sums, ops.sharing_q
    block_m, block_n, num_warps, num_stages = tile_of(ops)
    blocks_m, blocks_n = cdiv(ops.seqlen_q, block_m), cdiv(ops.seqlen_k, block_n)
    splits, members = _parts(sharing, blocks_m * blocks_n, ops.q.device)
    assert ops.phi_q is not None
    start(
        _bwd_shared_kernel,
        (blocks_m * blocks_n * sharing.groups, splits),
        ops.q, ops.k, ops.v, dout, phi_q, phi_k, lse2, delta, dphi_q, dphi_k,
        *ops.q.stride()[:3], *ops.k.stride()[:3], *ops.v.stride()[:3], *dout.stride()[:3],
        *phi_q.stride()[:2], *phi_k.stride()[:2], *_steps(dphi_q), *_steps(dphi_k), lse2.shape[-1],
        ops.num_heads, ops.group, ops.seqlen_q, ops.seqlen_k, ops.head_dim, ops.head_dim_v,
        phi_q.shape[-1], ops.phi_q.shape[-1], ops.seqlen_k - ops.seqlen_q if ops.bottom_right else 0,
        ops.window_left, ops.window_right, ops.scale, *sharing.sizes, blocks_m, blocks_n, sharing.members,
        members,
        HAS_LEFT=ops.window_left >= 0,
        HAS_RIGHT=ops.window_right >= 0,
        SUM_DPQ=dphi_q is not None,
        SUM_DPK=dphi_k is not None,
        PRECISION=ops.precision,
        INTERPRETED=ops.q.device.type == "cpu",
        BLOCK_D=ops.block_d,
        BLOCK_DV=ops.block_dv,
        BLOCK_C=CHUNK,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def tile_of(ops: Operands) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, and members in flight."""
    is_wide = max(ops.block_d, ops.block_dv) > 64
    block_m = min(128 if is_wide else 64, max(16, next_power_of_2(ops.seqlen_q)))
    return block_m, 64, 8 if block_m == 128 else 4, 2 if is_wide else 3


def _parts(sharing: Sharing, tiles: int, device: torch.device) -> tuple[int, int]:
    """Parts into which the members are split so that programs fill the GPU, and members of each."""
    wanted = cdiv(PROGRAMS * multiprocessors(device), tiles * sharing.groups)
    return sharing.parts(max(1, min(sharing.members // FEWEST_MEMBERS, wanted)))


def _steps(sums: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if sums is None else sums.stride()[:2]
