"""What becomes of a tile of scores, in the forward and backward kernels alike: factors, tables, masks, dropout.

A score tile is kept as S / scale until the exponential, so that `exp2(s * scale * log2(e) - m)` is one multiply-add.
Tiles come in two orientations, queries by keys and keys by queries; functions take index tensors `i` (queries) and
`j` (keys) that broadcast to the tile, so that one text serves both.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl

from flashbias.attention.triton.products import product
from flashbias.attention.triton.tiles import load_factor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

FLOOR = tl.constexpr(-(2.0**27))
"""From where the maximum of a row starts, in units of log 2: scores below it are hidden.

Numbers of that size are 8 apart in float32, so that weights measured from there are 2^8 at most. Where a column of the
factors masks keys by -1e9 and they come first, rounding would leave weights of 2^64, which float16 cannot hold.
"""

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
