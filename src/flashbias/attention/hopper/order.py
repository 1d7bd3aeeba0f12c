"""Additions in a fixed order, so that the fused backward pass is repeatable to the bit.

Blocks of keys add to the slabs of queries that see them. Here block j adds to a slab after block j - 1, where that one
sees it too. Each slab has a ticket, the number of the block whose turn it is (0 at first). A block waits until the
ticket has come to its own number, adds, and when its sum stands in memory hands the ticket to the next.

Nobody waits forever. Programs draw units from one counter, in an order in which block j - 1 comes before block j of the
same heads. So a unit waits only for units with smaller numbers; these are drawn already, by programs that run, or done.
The unit with the smallest number of all that are not done waits for none, and programs do their units in the order in
which they have drawn them. That holds for any number of programs that run at the same time, of any number that start
late: for what else runs on the GPU nobody has to make room.

Nobody waits for long. Blocks walk over their queries from the last one backwards. In a band block j then begins with
queries that block j - 1 does not see, and comes to those that both see when that one has left them. Where both begin
with the same queries (full attention, a causal mask) it stays one step and one addition behind, for all of the walk: it
waits once. Few blocks of one head run at the same time if those of many heads are drawn in turn (`schedule.ordered`).

Why the end of an addition is waited for, and nothing else: sums are added in the level-2 cache, where every number has
one place. An addition that has been completed before another one begins comes first for every number of its box. Nobody
reads a slab before the kernel ends.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from flashbias.attention.hopper.gluon import gl, jit
from flashbias.attention.hopper.tiles import LANES, tell, ticket

THREADS = gl.constexpr(128)
"""Threads of a warpgroup."""


@jit
def drawn(turn, units, queue):
    """Draw the next unit, -1 where none is left, in the loading warp; told to the other warps.

    Also the first one: a unit that belonged to a program from the beginning would wait for that to start.
    """
    unit = ticket(queue[0])
    unit = gl.where(unit < units, unit, -1)
    tell(turn, unit, queue)
    return unit


@jit
def turn_at(tile, block, end_before):
    """What the ticket of a tile of queries has come to when it is this block's turn.

    That is its number, or 0, for which nobody waits, where the block before does not see the tile. Bounds of what
    blocks see only grow with them, so of those that see a tile each follows the one before.

    Args:
        tile: of queries, which the block sees.
        block: of keys.
        end_before: end of the tiles that the block before sees; 0 for the first block.
    """
    return gl.where(tile < end_before, block, 0)


@jit
def await_turn(ticket_ptr, turn):
    """Wait until a ticket has come to a turn: in the second warp, beside the first one, which hands the last one over.

    The first warp issues additions behind a barrier of all four.
    """
    thread = gl.arange(0, THREADS, gl.BlockedLayout([1], [LANES], [4], [0]))
    gl.inline_asm_elementwise(
        """{
        .reg .pred waits;
        .reg .b32 warp, seen;
        shr.u32 warp, $3, 5;
        setp.eq.u32 waits, warp, 1;
        setp.gt.and.s32 waits, $2, 0, waits;
        @!waits bra ours;
        again:
        ld.acquire.gpu.global.s32 seen, [$1];
        setp.lt.s32 waits, seen, $2;
        @waits bra again;
        fence.proxy.async.global;
        ours:
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [ticket_ptr.to(gl.int64) + thread.to(gl.int64) * 0, turn + thread * 0, thread],
        gl.int32,
        False,
        1,
    )


@jit
def hand_over(ticket_ptr, turn):
    """Wait until all that this warpgroup has added stands in memory, then set a ticket to the next turn; 0: none.

    The thread that waits for its copies is one of the first warp, whose first thread sets the ticket. (Triton's own
    wait is for shared memory alone, which the copy engine has read long before it has added.)
    """
    thread = gl.arange(0, THREADS, gl.BlockedLayout([1], [LANES], [4], [0]))
    gl.inline_asm_elementwise(
        """{
        .reg .pred sets;
        setp.ge.u32 sets, $3, 32;
        @sets bra others;
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        setp.eq.u32 sets, $3, 0;
        setp.gt.and.s32 sets, $2, 0, sets;
        @sets st.release.gpu.global.s32 [$1], $2;
        others:
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [ticket_ptr.to(gl.int64) + thread.to(gl.int64) * 0, turn + thread * 0, thread],
        gl.int32,
        False,
        1,
    )
