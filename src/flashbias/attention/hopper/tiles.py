"""Where a program's tiles lie: arithmetic on the device that producers and consumers share; see `schedule.py`.

What it is about is handed on in groups:

- `deal`: units, whole ones, parts, tiles of keys of a part, blocks of queries of a pair, pairs that are dealt together;
- `batch`: starts of packed queries and of packed keys, pairs or packed sequences, heads, queries, keys, shift of the
  diagonal (of packed ones whether their ends are aligned);
- `queue`: the counter from which programs draw units, those of packed batches and those whose additions have an order,
  and how the loading warp tells the others: two slots of shared memory, with barriers for what has been told and heard.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.configs import ROWS as _ROWS
from flashbias.attention.hopper.configs import SLAB as _SLAB
from flashbias.attention.hopper.gluon import gl, jit, load, mbarrier, reduce_add, store
from flashbias.attention.hopper.operands import FAR as _FAR

FAR = gl.constexpr(_FAR)
"""Rows up to which boxes of packed batches count."""

ROWS = gl.constexpr(_ROWS)
"""Queries of a warpgroup; in the backward pass keys."""

SLAB = gl.constexpr(_SLAB)
"""Queries of a step of the backward pass."""

LANES = gl.constexpr(32)
"""Threads of a warp."""


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
def blocks_of(cu_ptr, sequence, BLOCK_M: gl.constexpr):
    """Blocks of queries of one sequence of a packed batch."""
    return (gl.load(cu_ptr + sequence + 1) - gl.load(cu_ptr + sequence) + BLOCK_M - 1) // BLOCK_M


@jit
def seek(cu_ptr, sequences, tile, walk, BLOCK_M: gl.constexpr):
    """Go on to the sequence that holds a tile, and to the end of its tiles; past the last one where none does.

    Tiles of a program only grow, so that it goes along the sequences once.
    """
    sequence, end = walk
    while (tile >= end) & (sequence < sequences):
        sequence += 1
        if sequence < sequences:
            end += blocks_of(cu_ptr, sequence, BLOCK_M)
    return sequence, end


@jit
def dealt(turn, deal, ALTERNATES: gl.constexpr):
    """Unit that this program takes in a turn, -1 after its last one."""
    unit = unit_of(turn, ALTERNATES)
    return gl.where(unit < deal[0], unit, -1)


@jit
def ticket(counter_ptr):
    """Draw the next number, in one warp.

    One lane draws it and the others add nothing. (Triton 3.6 cannot compile addresses as a tensor in a single warp.)
    """
    lane = gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))
    numbers = gl.inline_asm_elementwise(
        """{
        .reg .pred is_first;
        setp.eq.s32 is_first, $2, 0;
        mov.u32 $0, 0;
        @is_first atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
        }""",
        "=r,l,r",
        [counter_ptr.to(gl.int64) + lane.to(gl.int64) * 0, lane],
        gl.int32,
        False,
        1,
    )
    return gl.sum(numbers, 0)


@jit
def unit_slots(listeners: gl.constexpr):
    """Two slots of shared memory in which units are told, and barriers for what has been told and heard."""
    unit_smem = gl.allocate_shared_memory(gl.int32, [2, LANES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(heard.index(slot), count=listeners)
    return unit_smem, told, heard


@jit
def tell(turn, unit, queue):
    """Tell the other warps which unit this turn has, -1 for none."""
    _, unit_smem, told, heard = queue
    slot = turn % 2
    mbarrier.wait(heard.index(slot), ((turn // 2) & 1) ^ 1)
    unit_smem.index(slot).store(gl.full([LANES], unit, gl.int32, gl.BlockedLayout([1], [LANES], [1], [0])))
    mbarrier.arrive(told.index(slot))


@jit
def hear(turn, queue):
    """Hear which unit this turn has."""
    _, unit_smem, told, heard = queue
    slot = turn % 2
    mbarrier.wait(told.index(slot), (turn // 2) & 1)
    unit = gl.max(unit_smem.index(slot).load(gl.BlockedLayout([1], [LANES], [4], [0])), 0)
    mbarrier.arrive(heard.index(slot))
    return unit


@jit
def claimed(turn, walk, batch, queue, BLOCK_M: gl.constexpr):
    """The next unit of a packed batch that no program has taken, -1 where none is left; told to the other warps.

    Nobody knows how many there are: the walk along the sequences ends at the last one.
    """
    unit = gl.program_id(0)
    if turn > 0:
        unit = gl.num_programs(0) + ticket(queue[0])
    sequence, end = seek(batch[0], batch[2], unit // batch[3], walk, BLOCK_M)
    unit = gl.where(sequence < batch[2], unit, -1)
    tell(turn, unit, queue)
    return unit, (sequence, end)


@jit
def heard_of(turn, walk, batch, queue, BLOCK_M: gl.constexpr):
    """As `claimed`, for the warps that are told."""
    unit = hear(turn, queue)
    return unit, seek(batch[0], batch[2], gl.maximum(unit, 0) // batch[3], walk, BLOCK_M)


@jit
def rows_of(cu_ptr, sequence):
    """Where a packed sequence lies: its start, its length, and both as the copy engine takes them.

    That is its end, and which of the FAR rows up to there is its first; see `operands.packed`.
    """
    start = gl.load(cu_ptr + sequence)
    end = gl.load(cu_ptr + sequence + 1)
    return start, end - start, end, FAR - (end - start)


@jit
def load_rows(desc, b, h, row, full, smem, IS_VARLEN: gl.constexpr):
    """Load rows of one head, of a batch element or of a packed sequence."""
    if IS_VARLEN:
        load(desc, [FAR, b, h, row, 0], full, smem)
    else:
        load(desc, [b, h, row, 0], full, smem)


@jit
def store_rows(desc, b, h, row, smem, IS_VARLEN: gl.constexpr):
    """Store rows of one head, of a batch element or of a packed sequence."""
    if IS_VARLEN:
        store(desc, [FAR, b, h, row, 0], smem)
    else:
        store(desc, [b, h, row, 0], smem)


@jit
def load_factor(desc, b, f, row, full, smem, IS_VARLEN: gl.constexpr):
    """Load rows of a factor; of a packed sequence, so that what follows it is read as zeros."""
    if IS_VARLEN:
        load(desc, [FAR, b, f, row, 0], full, smem)
    else:
        load(desc, [f, row, 0], full, smem)


@jit
def add_factor(desc, b, f, row, smem, IS_VARLEN: gl.constexpr):
    """Add rows to the gradient of a factor, of a packed sequence to its own rows alone."""
    if IS_VARLEN:
        reduce_add(desc, [FAR, b, f, row, 0], smem)
    else:
        reduce_add(desc, [f, row, 0], smem)


@jit
def boxes(desc, count: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr, IS_VARLEN: gl.constexpr):
    """Shared memory for boxes of rows of one head."""
    if IS_VARLEN:
        return gl.allocate_shared_memory(desc.dtype, [count, 1, 1, 1, rows, columns], desc.layout)
    else:
        return gl.allocate_shared_memory(desc.dtype, [count, 1, 1, rows, columns], desc.layout)


@jit
def factor_boxes(desc, count: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr, IS_VARLEN: gl.constexpr):
    """Shared memory for boxes of rows of a factor."""
    if IS_VARLEN:
        return gl.allocate_shared_memory(desc.dtype, [count, 1, 1, 1, rows, columns], desc.layout)
    else:
        return gl.allocate_shared_memory(desc.dtype, [count, 1, rows, columns], desc.layout)


@jit
def place_in_batch(unit, walk, deal, batch, IS_VARLEN: gl.constexpr, IS_SPLIT: gl.constexpr, IS_BANDED: gl.constexpr):
    """Where a unit lies; in a packed batch `walk` has come to its sequence.

    Head, index among the factors' owners, block of queries, part of the keys; of queries and of keys start, length, and
    what the copy engine takes for a batch element and its first row; shift of the diagonal.
    """
    cu_q_ptr, cu_k_ptr, pairs, num_heads, seqlen_q, seqlen_k, shift = batch
    if IS_VARLEN:
        # All heads of a block come together; the last block of a sequence, under a causal mask the longest, is first.
        h = unit % num_heads
        sequence, end = walk
        queries = rows_of(cu_q_ptr, sequence)
        keys = rows_of(cu_k_ptr, sequence)
        return h, h, end - 1 - unit // num_heads, -1, queries, keys, shift * (keys[1] - queries[1])
    else:
        b, h, bh, block, part = tile_of(unit, deal[1], deal[2], deal[4], num_heads, pairs, deal[5], IS_SPLIT, IS_BANDED)
        return h, bh, block, part, (0, seqlen_q, b, 0), (0, seqlen_k, b, 0), shift


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
    # A sequence of a packed batch may have no key.
    last = gl.maximum((seqlen_k + BLOCK_N - 1) // BLOCK_N, 1)
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
def owner_of(bh, sizes):
    """As `own_index`."""
    s1, v2, s2 = sizes
    return own_index(bh, s1, v2, s2)


@jit
def query_tiles(
    start_n, seqlen_q, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Tiles of queries that see a block of keys: from, first full one, end of full ones, to; there may be none."""
    lo = 0
    full_lo = 0
    hi = (seqlen_q + SLAB - 1) // SLAB
    full_hi = hi
    if HAS_RIGHT:
        lo = gl.maximum(start_n - shift - right, 0) // SLAB
        full_lo = (gl.maximum(start_n + BLOCK_N - 1 - shift - right, 0) + SLAB - 1) // SLAB
    if HAS_LEFT:
        hi = gl.minimum(hi, (gl.maximum(start_n + BLOCK_N - shift + left, 0) + SLAB - 1) // SLAB)
        full_hi = gl.minimum(full_hi, gl.maximum(start_n - shift + left + 1, 0) // SLAB)
    lo = gl.minimum(lo, hi)
    full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
    full_hi = gl.maximum(gl.minimum(full_hi, hi), full_lo)
    return lo, full_lo, full_hi, hi
