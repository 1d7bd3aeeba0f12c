"""Where tiles lie, which of them see each other, and how they are read and written, in all kernels alike."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def group_of(bh, s1, v2, s2):
    """Own index of a factor for the flat (batch, head) index; see `attention/layout.py`."""
    return (bh // (s1 * v2 * s2)) * v2 + (bh // s2) % v2


@triton.jit
def member_of(f, m, s1, v2, s2):
    """Flat (batch, head) index of member m of the pairs that share factor f."""
    return (((f // v2) * s1 + m // s2) * v2 + f % v2) * s2 + m % s2


@triton.jit
def locate(
    bh,
    num_heads,
    seqlen_q,
    seqlen_k,
    stride_lse,
    cu_q_ptr,
    cu_k_ptr,
    IS_VARLEN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
):
    """Where a (batch or sequence, head) lies.

    Returns batch (0 if packed), head, index among the factors' owners, first query, first key, number of both,
    first row of the log-sum-exp, shift of the diagonal.
    """
    b = bh // num_heads
    h = bh % num_heads
    own = bh
    base_q = tl.cast(0, tl.int64)
    base_k = tl.cast(0, tl.int64)
    row_lse = tl.cast(bh, tl.int64) * stride_lse
    if IS_VARLEN:
        base_q = tl.load(cu_q_ptr + b).to(tl.int64)
        base_k = tl.load(cu_k_ptr + b).to(tl.int64)
        seqlen_q = (tl.load(cu_q_ptr + b + 1) - base_q).to(tl.int32)
        seqlen_k = (tl.load(cu_k_ptr + b + 1) - base_k).to(tl.int32)
        row_lse = tl.cast(h, tl.int64) * stride_lse + base_q
        b = b * 0
        own = h
    shift = 0
    if BOTTOM_RIGHT:
        shift = seqlen_k - seqlen_q
    return tl.cast(b, tl.int64), tl.cast(h, tl.int64), own, base_q, base_k, seqlen_q, seqlen_k, row_lse, shift


@triton.jit
def is_visible(
    start_m,
    start_n,
    shift,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether the band leaves anything of a tile."""
    visible = start_m >= 0
    if HAS_RIGHT:
        visible &= start_n - (start_m + BLOCK_M - 1) - shift <= right
    if HAS_LEFT:
        visible &= start_n + BLOCK_N - 1 - start_m - shift >= -left
    return visible


@triton.jit
def key_range(
    start_m,
    seqlen_k,
    shift,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that a block of queries sees: from, first full tile, end of full tiles, to."""
    lo = 0
    hi = seqlen_k
    full_lo = 0
    full_hi = seqlen_k
    if HAS_LEFT:
        lo = tl.maximum(start_m + shift - left, 0) // BLOCK_N * BLOCK_N
        full_lo = (tl.maximum(start_m + BLOCK_M - 1 + shift - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        hi = tl.minimum(hi, tl.maximum(start_m + BLOCK_M + shift + right, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(start_m + shift + right + 1, 0))
    lo = tl.minimum(lo, hi)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(full_hi // BLOCK_N * BLOCK_N, full_lo)
    return lo, full_lo, tl.minimum(full_hi, hi), hi


@triton.jit
def query_range(
    start_n,
    seqlen_q,
    shift,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries that see a block of keys: from, first full tile, end of full tiles, to."""
    lo = 0
    hi = seqlen_q
    full_lo = 0
    full_hi = seqlen_q
    if HAS_RIGHT:
        lo = tl.maximum(start_n - shift - right, 0) // BLOCK_M * BLOCK_M
        full_lo = (tl.maximum(start_n + BLOCK_N - 1 - shift - right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        hi = tl.minimum(hi, tl.maximum(start_n + BLOCK_N - shift + left, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(start_n - shift + left + 1, 0))
    lo = tl.minimum(lo, hi)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(full_hi // BLOCK_M * BLOCK_M, full_lo)
    return lo, full_lo, tl.minimum(full_hi, hi), hi


@triton.jit
def load_tile(ptr, start, rows, cols, stride, num_rows, num_cols, BOUNDED: tl.constexpr, PADDED: tl.constexpr):
    """`[rows, cols]` of a row-major matrix; BOUNDED rows may pass the end, PADDED columns may pass the width."""
    # The start is multiplied in 64 bits; offsets within a tile fit into 32.
    ptrs = (ptr + tl.cast(start, tl.int64) * stride) + (rows[:, None] * stride + cols[None, :])
    if BOUNDED and PADDED:
        return tl.load(ptrs, mask=((start + rows) < num_rows)[:, None] & (cols < num_cols)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(ptrs, mask=((start + rows) < num_rows)[:, None], other=0.0)
    elif PADDED:
        return tl.load(ptrs, mask=(cols < num_cols)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_factor(
    ptr,
    start,
    rows,
    cols,
    stride,
    num_rows,
    columns: tl.constexpr,
    rank: tl.constexpr,
    used,
    BOUNDED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_RANKS: tl.constexpr,
):
    """`[rows, cols]` of a packed factor; a head with a rank of its own leaves out what it does not use."""
    ptrs = (ptr + tl.cast(start, tl.int64) * stride) + (rows[:, None] * stride + cols[None, :])
    inside = (cols < columns)[None, :]
    if HAS_RANKS:
        inside = inside & ((cols % rank) < used)[None, :]
    if BOUNDED:
        inside = inside & ((start + rows) < num_rows)[:, None]
    if BOUNDED or PADDED or HAS_RANKS:
        return tl.load(ptrs, mask=inside, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rows(lse2_ptr, delta_ptr, start_m, offs_m, seqlen_q, BOUNDED: tl.constexpr):
    """Log-sum-exp in units of log 2 (+inf past the end, so that weights there are 0) and delta."""
    if BOUNDED:
        inside = (start_m + offs_m) < seqlen_q
        lse2 = tl.load(lse2_ptr + start_m + offs_m, mask=inside, other=float("inf"))
        return lse2, tl.load(delta_ptr + start_m + offs_m, mask=inside, other=0.0)
    else:
        return tl.load(lse2_ptr + start_m + offs_m), tl.load(delta_ptr + start_m + offs_m)


@triton.jit
def store_tile(ptr, start, rows, cols, stride, num_rows, num_cols, tile):
    """Store a tile within the bounds of a row-major matrix, rounded to its dtype."""
    ptrs = (ptr + tl.cast(start, tl.int64) * stride) + (rows[:, None] * stride + cols[None, :])
    inside = ((start + rows) < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=inside)
