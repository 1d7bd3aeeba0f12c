"""What centring phi_k took from scores: centres as `packing.centre_of` makes them, and the offsets of a tile."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

from flashbias.attention import packing

FURTHEST_CENTRE = tl.constexpr(packing.FURTHEST_CENTRE)


@triton.jit
def centre_step(
    raw_k_ptr,
    start_m,
    start_n,
    cols,
    seqlen_q,
    seqlen_k,
    stride_k,
    stride_kr,
    rank,
    CENTRE_TILE: tl.constexpr,
):
    """`c - c_ref`: from the key opposite to these queries to the centre of this tile of keys, `[cols]`."""
    here = start_n // CENTRE_TILE * CENTRE_TILE
    opposite = start_m // CENTRE_TILE * CENTRE_TILE + seqlen_k - seqlen_q
    row = raw_k_ptr + cols * stride_kr
    return centre_of(row, here, CENTRE_TILE, cols, seqlen_k, stride_k, rank) - centre_of(
        row, opposite, CENTRE_TILE, cols, seqlen_k, stride_k, rank
    )


@triton.jit
def centre_of(row_ptr, start, length, cols, seqlen_k, stride_k, rank):
    """`packing.centre_of` for one start: the median of three rows, `[cols]`."""
    a = load_row(row_ptr, start + length // 4, cols, seqlen_k, stride_k, rank)
    b = load_row(row_ptr, start + length // 2, cols, seqlen_k, stride_k, rank)
    c = load_row(row_ptr, start + length - 1 - length // 4, cols, seqlen_k, stride_k, rank)
    median = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    return tl.where(tl.abs(median) <= FURTHEST_CENTRE, median, 0.0)


@triton.jit
def load_row(row_ptr, n, cols, seqlen_k, stride_k, rank):
    """One row of a factor as given, the nearest one that exists."""
    n = tl.minimum(tl.maximum(n, 0), seqlen_k - 1)
    return tl.load(row_ptr + tl.cast(n, tl.int64) * stride_k, mask=cols < rank, other=0.0).to(tl.float32)


@triton.jit
def tile_offset(
    raw_q_ptr,
    raw_k_ptr,
    start_m,
    start_n,
    offs_m,
    seqlen_q,
    seqlen_k,
    stride_q,
    stride_qr,
    stride_k,
    stride_kr,
    rank,
    BLOCK_RANK: tl.constexpr,
    CENTRE_TILE: tl.constexpr,
):
    """`phi_q[i] @ (c - c_ref)`: what centring phi_k tile by tile took from the scores of these queries."""
    cols = tl.arange(0, BLOCK_RANK)
    step = centre_step(raw_k_ptr, start_m, start_n, cols, seqlen_q, seqlen_k, stride_k, stride_kr, rank, CENTRE_TILE)
    inside = ((start_m + offs_m) < seqlen_q)[:, None] & (cols < rank)[None, :]
    ptrs = raw_q_ptr + tl.cast(start_m, tl.int64) * stride_q + offs_m[:, None] * stride_q + cols[None, :] * stride_qr
    phi_q = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    # Lanes share a row. Without the where, the last product of each would be fused into its first addition: every lane
    # would round another one, and they would write different sums to one address.
    return tl.sum(tl.where(inside, phi_q * step[None, :], 0.0), axis=1)
