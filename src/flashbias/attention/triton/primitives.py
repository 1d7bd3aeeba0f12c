"""Pieces that the forward and backward kernels share: tiles, products, masks, tables, dropout.

A score tile is kept as S / scale until the exponential, so that `exp2(s * scale * log2(e) - m)` is one multiply-add.
Tiles come in two orientations, queries by keys and keys by queries; functions take index tensors `i` (queries) and
`j` (keys) that broadcast to the tile, so that one text serves both.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

# Kernels are compiled from source: annotations such as tl.constexpr must stay objects.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def store_tile(ptr, start, rows, cols, stride, num_rows, num_cols, tile):
    """Store a tile within the bounds of a row-major matrix, rounded to its dtype."""
    ptrs = (ptr + tl.cast(start, tl.int64) * stride) + (rows[:, None] * stride + cols[None, :])
    inside = ((start + rows) < num_rows)[:, None] & (cols < num_cols)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """`acc + a @ b` on the matrix unit; acc None starts from zero."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16 operands as if they were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        return tl.dot(a, b) if acc is None else tl.dot(a, b, acc)
    elif PRECISION == "tf32x3" and a.dtype == tl.float32:
        # a b = a0 b0 + (a0 b1 + a1 b0) + a1 b1, the last of which is lost in rounding. Triton's own tf32x3 cuts the
        # small parts off where this rounds them: every score came out smaller by a few units of its last place.
        a0, a1 = two_parts(a)
        b0, b1 = two_parts(b)
        s = tl.dot(a1, b0, input_precision="tf32")
        s = tl.dot(a0, b1, s, input_precision="tf32")
        s = tl.dot(a0, b0, s, input_precision="tf32")
        return s if acc is None else acc + s
    elif acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def two_parts(x):
    """float32 as a sum of two TF32 numbers, to 2^-23; infinities are all in the first."""
    x0 = nearest_tf32(x)
    return x0, nearest_tf32(tl.where(x == x0, 0.0, x - x0))


@triton.jit
def nearest_tf32(x):
    """A float32 rounded to the 10 explicit bits of TF32, ties away from zero."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


# How a bias is brought to S / scale (`PHI_MODE`); see `pack.Factors`.
READY = tl.constexpr(0)  # the factor was packed with the scale in it
EXACT = tl.constexpr(1)  # the factor in registers is multiplied by a power of two
UNSCALED = tl.constexpr(2)  # the product is multiplied


@triton.jit
def rescaled(phi, inv_scale, PHI_MODE: tl.constexpr):
    """The factor that stays in registers, over scale where that is exact."""
    if PHI_MODE == EXACT:
        phi = (phi.to(tl.float32) * inv_scale).to(phi.dtype)
    return phi


@triton.jit
def scores(
    a,
    b_t,
    phi_a,
    phi_b,
    inv_scale,
    HAS_PHI: tl.constexpr,
    PHI_MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """S / scale of a tile: the factors first, as one more chunk of the same sum of products."""
    if HAS_PHI:
        s = product(phi_a, tl.trans(phi_b), None, PRECISION, INTERPRETED)
        if PHI_MODE == UNSCALED:
            s *= inv_scale
        return product(a, b_t, s, PRECISION, INTERPRETED)
    else:
        return product(a, b_t, None, PRECISION, INTERPRETED)


@triton.jit
def add_factor_gradient(
    dphi,
    ds,
    phi,
    ptr,
    start,
    rows,
    cols,
    stride,
    num_rows,
    columns: tl.constexpr,
    rank: tl.constexpr,
    used,
    SECOND_PART: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`dphi + ds @ phi`: the leading parts are the first columns of a packed factor; later ones are not stored.

    Beside float16 queries a bfloat16 part alone would be too coarse: with `SECOND_PART` (its distance in columns)
    the two are added, and the product is one in TF32, which has float16's precision.
    """
    if IN_REGISTERS:
        return product(ds.to(phi.dtype), phi, dphi, PRECISION, INTERPRETED)
    else:
        lead = load_factor(ptr, start, rows, cols, stride, num_rows, columns, rank, used, BOUNDED, True, HAS_RANKS)
        if SECOND_PART > 0:
            second = load_factor(
                ptr,
                start,
                rows,
                cols + SECOND_PART,
                stride,
                num_rows,
                columns,
                rank,
                used,
                BOUNDED,
                True,
                HAS_RANKS,
            )
            return product(ds, lead.to(tl.float32) + second.to(tl.float32), dphi, "tf32", INTERPRETED)
        else:
            return product(ds.to(lead.dtype), lead, dphi, PRECISION, INTERPRETED)


@triton.jit
def chunked_bias(
    a_ptr,
    b_ptr,
    start_a,
    start_b,
    rows_a,
    rows_b,
    stride_a,
    stride_b,
    num_a,
    num_b,
    columns: tl.constexpr,
    rank: tl.constexpr,
    used,
    inv_scale,
    HAS_RANKS: tl.constexpr,
    ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    PHI_MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Bias of a tile over scale for factors wider than one chunk; a head skips the chunks it does not need."""
    s = tl.zeros([ROWS_A, ROWS_B], dtype=tl.float32)
    for chunk in tl.range(0, CHUNKS):
        # The columns of one part stand side by side: with a single part, those past `used` are whole chunks.
        if columns > rank or chunk * BLOCK_R < used:
            cols = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
            a = load_factor(a_ptr, start_a, rows_a, cols, stride_a, num_a, columns, rank, used, True, True, HAS_RANKS)
            b = load_factor(b_ptr, start_b, rows_b, cols, stride_b, num_b, columns, rank, used, True, True, HAS_RANKS)
            s = product(a, tl.trans(b), s, PRECISION, INTERPRETED)
    if PHI_MODE == UNSCALED:
        s *= inv_scale
    return s


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
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


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


@triton.jit
def load_codes(code_ptr, start, offs, length, HAS_CODES: tl.constexpr):
    """Codes of a range of positions; past the end the last one again, so that extremes stay true."""
    pos = tl.minimum(start + offs, length - 1)
    if HAS_CODES:
        return tl.load(code_ptr + pos).to(tl.int32)
    else:
        return pos.to(tl.int32)


@triton.jit
def table_index(i_code, j_code, half):
    """Entry of the relative table for each pair."""
    return tl.minimum(tl.maximum(j_code - i_code, -half), half) + half


@triton.jit
def tail_of(q_code, k_code, half):
    """Whether a tile lies wholly in one tail of the table, and the entry of that tail."""
    lowest = tl.min(k_code, 0) - tl.max(q_code, 0)
    highest = tl.max(k_code, 0) - tl.min(q_code, 0)
    in_tail = (highest <= -half) | (lowest >= half)
    entry = tl.where(lowest >= half, 2 * half, 0)
    return in_tail, entry


@triton.jit
def add_table(s, table_ptr, q_code, k_code, i_code, j_code, half):
    """`s + table[...] * log2(e)` for scores in units of log 2; a tile in a tail adds one constant."""
    in_tail, entry = tail_of(q_code, k_code, half)
    if in_tail:
        s += tl.load(table_ptr + entry).to(tl.float32) * LOG2E
    else:
        s += tl.load(table_ptr + table_index(i_code, j_code, half)).to(tl.float32) * LOG2E
    return s


@triton.jit
def band(i, j, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, seqlen_q, seqlen_k):
    """Pairs that exist and that causal masking and the window leave."""
    keep = (i < seqlen_q) & (j < seqlen_k)
    if HAS_RIGHT:
        keep = keep & (j - i <= shift + right)
    if HAS_LEFT:
        keep = keep & (j - i >= shift - left)
    return keep


@triton.jit
def load_mask(ptr, i, j, stride_m, stride_n, seqlen_q, seqlen_k):
    """A tile of the user's bool mask."""
    offsets = i.to(tl.int64) * stride_m + j.to(tl.int64) * stride_n
    return tl.load(ptr + offsets, mask=(i < seqlen_q) & (j < seqlen_k), other=0) != 0


@triton.jit
def dropout_keep(seed_ptr, bh, i, j, seqlen_q, seqlen_k, dropout_p):
    """Which weights survive: a counter-based draw of (batch, head, query, key), the same in every kernel."""
    row = tl.cast(bh, tl.int64) * seqlen_q + i
    return tl.rand(tl.load(seed_ptr), row * seqlen_k + j) >= dropout_p


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
def weights_and_gradients(
    s,
    dp,
    lse2,
    delta,
    q_code,
    k_code,
    i,
    j,
    i_code,
    j_code,
    offset,
    table_ptr,
    mask_ptr,
    seed_ptr,
    bh,
    seqlen_q,
    seqlen_k,
    half,
    shift,
    left,
    right,
    qk_scale,
    dropout_p,
    stride_mask_m,
    stride_mask_n,
    BOUNDED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    TILE_CENTRED: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """From S / scale and dP of a tile to P (with dropout applied) and dS, in either orientation."""
    s = s * qk_scale
    if TILE_CENTRED:
        s += offset * LOG2E
    if HAS_TABLE:
        s = add_table(s, table_ptr, q_code, k_code, i_code, j_code, half)
    p = tl.exp2(s - lse2)
    if BOUNDED:
        keep = band(i, j, shift, left, right, HAS_LEFT, HAS_RIGHT, seqlen_q, seqlen_k)
        if HAS_MASK:
            keep = keep & load_mask(mask_ptr, i, j, stride_mask_m, stride_mask_n, seqlen_q, seqlen_k)
        p = tl.where(keep, p, 0.0)
    p_dropped = p
    if HAS_DROPOUT:
        kept = dropout_keep(seed_ptr, bh, i, j, seqlen_q, seqlen_k, dropout_p)
        p_dropped = tl.where(kept, p / (1.0 - dropout_p), 0.0)
        dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
    return p_dropped, p * (dp - delta)


@triton.jit
def load_rows(lse2_ptr, delta_ptr, start_m, offs_m, seqlen_q, BOUNDED: tl.constexpr):
    """Log-sum-exp in units of log 2 (+inf past the end, so that weights there are 0) and delta."""
    if BOUNDED:
        inside = (start_m + offs_m) < seqlen_q
        lse2 = tl.load(lse2_ptr + start_m + offs_m, mask=inside, other=float("inf"))
        return lse2, tl.load(delta_ptr + start_m + offs_m, mask=inside, other=0.0)
    else:
        return tl.load(lse2_ptr + start_m + offs_m), tl.load(delta_ptr + start_m + offs_m)
