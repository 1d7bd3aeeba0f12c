"""Where a program's tiles lie: arithmetic on the device that producers and consumers share; see `schedule.py`."""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.gluon import gl, jit

ROWS = gl.constexpr(64)
"""Queries of a warpgroup."""


@jit
def exp2(x):
    """2^x on the special function unit; results below 2^-126 are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], gl.float32, True, 1)


@jit
def turns_of(units, ALTERNATES: gl.constexpr):
    """Units that this program takes."""
    place = gl.program_id(0)
    full = units // gl.num_programs(0)
    if ALTERNATES:
        place += (full & 1) * (gl.num_programs(0) - 1 - 2 * place)
    return full + (place < units % gl.num_programs(0)).to(gl.int32)


@jit
def unit_of(turn, ALTERNATES: gl.constexpr):
    """Unit that this program takes in a turn; odd turns may be dealt backwards."""
    place = gl.program_id(0)
    if ALTERNATES:
        place += (turn & 1) * (gl.num_programs(0) - 1 - 2 * place)
    return turn * gl.num_programs(0) + place


@jit
def place_of(tile, num_blocks, pairs, heads, IS_BANDED: gl.constexpr):
    """(batch, head) pair of a tile, and its place in the order in which the blocks of a pair are dealt."""
    if IS_BANDED:
        first = tile // (heads * num_blocks) * heads
        within = tile % (heads * num_blocks)
        heads = gl.minimum(heads, pairs - first)
        return first + within % heads, within // heads
    else:
        return tile // num_blocks, tile % num_blocks


@jit
def tile_of(unit, whole, parts, num_blocks, num_heads, pairs, heads, IS_SPLIT: gl.constexpr, IS_BANDED: gl.constexpr):
    """Batch, head, both in one, block of queries, and part of the keys of a unit; see `schedule.py`."""
    part = unit - whole
    tile = unit
    if IS_SPLIT:  # noqa: SIM102
        if part >= 0:
            tile = whole + part // parts
            part = part % parts
    bh, block = place_of(tile, num_blocks, pairs, heads, IS_BANDED)
    if IS_BANDED:
        # Under a causal mask the last blocks are the longest: they go first.
        block = num_blocks - 1 - block
    return bh // num_heads, bh % num_heads, bh, block, part


@jit
def part_of(lo, full_lo, full_hi, hi, part, part_tiles):
    """Tiles of keys of a part, where no band but the end of the keys bounds them; all of them if part < 0."""
    if part >= 0:
        lo = part * part_tiles
        full_lo = lo
        hi = gl.minimum(hi, lo + part_tiles)
        full_hi = hi - 1
    return lo, full_lo, full_hi, hi


@jit
def key_tiles(
    start_m, seqlen_k, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Tiles of keys that a block of queries sees: from, first full one, end of full ones, to; one at least."""
    last = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    lo = 0
    full_lo = 0
    hi = last
    full_hi = seqlen_k // BLOCK_N
    if HAS_LEFT:
        lo = gl.minimum(gl.maximum(start_m + shift - left, 0) // BLOCK_N, last - 1)
        full_lo = (gl.maximum(start_m + BLOCK_M - 1 + shift - left, 0) + BLOCK_N - 1) // BLOCK_N
    if HAS_RIGHT:
        hi = gl.minimum(hi, (gl.maximum(start_m + BLOCK_M + shift + right, 0) + BLOCK_N - 1) // BLOCK_N)
        full_hi = gl.minimum(full_hi, gl.maximum(start_m + shift + right + 1, 0) // BLOCK_N)
    hi = gl.maximum(hi, lo + 1)
    # The first tile that is worked on is the last one; it stands before the loops.
    full_hi = gl.minimum(full_hi, hi - 1)
    full_lo = gl.minimum(gl.maximum(full_lo, lo), hi - 1)
    full_hi = gl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@jit
def own_index(bh, s1, v2, s2):
    """Own index of a factor for the flat (batch, head) index; see `attention/layout.py`."""
    return (bh // (s1 * v2 * s2)) * v2 + (bh // s2) % v2


@jit
def query_tiles(
    start_n, seqlen_q, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Tiles of queries that see a block of keys: from, first full one, end of full ones, to; there may be none."""
    lo = 0
    full_lo = 0
    hi = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    full_hi = hi
    if HAS_RIGHT:
        lo = gl.maximum(start_n - shift - right, 0) // BLOCK_M
        full_lo = (gl.maximum(start_n + BLOCK_N - 1 - shift - right, 0) + BLOCK_M - 1) // BLOCK_M
    if HAS_LEFT:
        hi = gl.minimum(hi, (gl.maximum(start_n + BLOCK_N - shift + left, 0) + BLOCK_M - 1) // BLOCK_M)
        full_hi = gl.minimum(full_hi, gl.maximum(start_n - shift + left + 1, 0) // BLOCK_M)
    lo = gl.minimum(lo, hi)
    full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
    full_hi = gl.maximum(gl.minimum(full_hi, hi), full_lo)
    return lo, full_lo, full_hi, hi
