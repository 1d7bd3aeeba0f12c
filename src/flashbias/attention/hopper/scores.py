"""A tile of scores in registers: what they start from, what masks hide, offsets of tiles of centres, their softmax."""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention import packing
from flashbias.attention.hopper.gluon import gl, jit
from flashbias.attention.hopper.tiles import ROWS, exp2, owner_of
from flashbias.attention.triton.scores import LOG2E

CENTRE_TILE = gl.constexpr(packing.CENTRE_TILE)
"""Keys that share a centre: a tile of keys lies within them, and 64 queries lie opposite to them."""


@jit
def first_terms(table_ptr, q_code, code_k_ptr, start_m, start_n, seqlen_k, half, HAS_TABLE: gl.constexpr,
                 HAS_CODES: gl.constexpr, HAS_EDGE: gl.constexpr, KEYS: gl.constexpr,
                 s_layout: gl.constexpr):  # fmt: skip
    """What the scores of a tile start from: entries of the table, over scale, or nothing."""
    if not HAS_TABLE:
        return gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    j = start_n + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    if HAS_CODES:
        k_code = gl.load(code_k_ptr + j, mask=j < seqlen_k, other=0) if HAS_EDGE else gl.load(code_k_ptr + j)
        return entries(table_ptr, q_code[:, None], k_code[None, :], half)
    in_tail, is_after = tail_of(start_m, start_n, half, ROWS, KEYS)
    if in_tail:
        s = gl.full([ROWS, KEYS], gl.load(table_ptr + gl.where(is_after, half, -half)), gl.float32, s_layout)
    else:
        s = entries(table_ptr, q_code[:, None], j[None, :], half)
    return s


@jit
def tail_of(start_m, start_n, half, QUERIES: gl.constexpr, KEYS: gl.constexpr):
    """Whether a tile lies in one tail of the table, far from the diagonal, and whether it is the one behind.

    Of positions, which are their own codes.
    """
    is_after = start_n - (start_m + QUERIES - 1) >= half
    return is_after | (start_n + KEYS - 1 - start_m <= -half), is_after


@jit
def entry_of(q_code, k_code, half):
    """Place of the entry for a pair of codes, counted from the middle one; the first and last hold for all beyond."""
    return gl.minimum(gl.maximum(k_code - q_code, -half), half)


@jit
def entries(table_ptr, q_code, k_code, half):
    """Entries for each pair of codes, one along rows and one along columns."""
    return gl.load(table_ptr + entry_of(q_code, k_code, half))


@jit
def masked(s, start_m, start_n, seqlen_k, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
            KEYS: gl.constexpr, s_layout: gl.constexpr):  # fmt: skip
    """Scores of a tile at the edge of the band or of the keys."""
    # Where the keys that row i sees begin and end, relative to the tile: a score costs one comparison for each.
    i = start_m + shift - start_n + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    j = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))[None, :]
    if HAS_RIGHT:  # noqa: SIM108
        keep = j < gl.minimum(i + (right + 1), seqlen_k - start_n)[:, None]
    else:
        keep = j < seqlen_k - start_n
    if HAS_LEFT:
        keep = keep & (j >= (i - left)[:, None])
    return gl.where(keep, s, float("-inf"))


@jit
def centring_of(centring, bh, start_m, seqlen_q, RANK: gl.constexpr):
    """Where 64 queries find what `tile_offset` needs.

    Their first row of phi_q, the centres of their keys, the centre that they are measured from, the last row that there
    is, counted from the first, and the strides of phi_q.
    """
    phi_q_ptr, stride_f, stride_n, stride_r, centre_ptr, stride_c, tiles, owners_q, owners_k = centring
    phi_q_ptr += owner_of(bh, owners_q).to(gl.int64) * stride_f + start_m.to(gl.int64) * stride_n
    centre_ptr += owner_of(bh, owners_k).to(gl.int64) * stride_c
    reference = tiles + gl.minimum(start_m, seqlen_q - 1) // CENTRE_TILE
    return phi_q_ptr, centre_ptr, centre_ptr + reference * RANK, seqlen_q - 1 - start_m, stride_n, stride_r


@jit
def tile_offset(centring, start_n, RANK: gl.constexpr, rows: gl.constexpr):
    """What centring phi_k by tile took from the scores of 64 queries and this tile of keys, in units of log 2."""
    phi_q_ptr, centre_ptr, reference_ptr, last, stride_n, stride_r = centring
    phi_q_ptr += gl.minimum(gl.arange(0, ROWS, rows), last) * stride_n
    centre_ptr += start_n // CENTRE_TILE * RANK
    offset = gl.zeros([ROWS], gl.float32, rows)
    for r in gl.static_range(RANK):
        step = gl.load(centre_ptr + r) - gl.load(reference_ptr + r)
        offset += gl.load(phi_q_ptr + r * stride_r).to(gl.float32) * step
    return offset * LOG2E


QUAD = gl.constexpr(4)
"""Lanes that share a row of a tile; each holds two of every eight columns."""

PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
"""Layout of what each lane has of its rows, `[64, 4]`."""


@jit
def softmax(s, m_i, l_i, qk_scale, offset, HAS_OFFSET: gl.constexpr, KEYS: gl.constexpr, s_layout: gl.constexpr):
    """Weights of a tile, and what the sums so far are to be multiplied by.

    An offset of a row goes into what its scores are measured from: each still costs one multiply-add. Sums `l_i` are
    those of each lane, which meet at the end of a walk.
    """
    own = gl.max(gl.max(s.reshape([ROWS, KEYS // (2 * QUAD), QUAD, 2]), 3), 1)
    top = gl.convert_layout(gl.max(own, 1), gl.SliceLayout(1, s_layout)) * qk_scale
    if HAS_OFFSET:
        top += offset
    m_new = gl.maximum(m_i, top)
    alpha = exp2(m_i - m_new)
    base = m_new
    if HAS_OFFSET:
        base -= offset
    p = exp2(s * qk_scale - base[:, None])
    own = gl.sum(gl.sum(p.reshape([ROWS, KEYS // (2 * QUAD), QUAD, 2]), 3), 1)
    l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, PARTS))[:, None] + gl.convert_layout(own, PARTS)
    return p, alpha, m_new, l_i
