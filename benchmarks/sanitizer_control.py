"""What compute-sanitizer's racecheck says of a handover that is right: the control for `sanitizer_shapes.py`.

One warp writes a vector into shared memory and arrives at a barrier there; a warpgroup waits for the barrier, reads,
and arrives at another one, for which the writer waits. This is all that the kernels for Hopper do between their warps,
in its smallest form. Hazards that racecheck reports here are those that it reports for any such handover.

    compute-sanitizer --tool racecheck python3 benchmarks/sanitizer_control.py
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false
from __future__ import annotations

import torch

from flashbias.attention.hopper.gluon import gl, jit, mbarrier

TURNS, LENGTH = 5, 64


@jit
def _write(source_ptr, buffer, full, empty, turns, LENGTH: gl.constexpr):
    lanes: gl.constexpr = gl.BlockedLayout([LENGTH // 32], [32], [1], [0])
    offsets = gl.arange(0, LENGTH, lanes)
    for turn in range(turns):
        values = gl.load(source_ptr + turn * LENGTH + offsets)
        mbarrier.wait(empty, (turn & 1) ^ 1)
        buffer.store(values)
        mbarrier.arrive(full)


@jit
def _read(target_ptr, buffer, full, empty, turns, LENGTH: gl.constexpr):
    threads: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.arange(0, LENGTH, threads)
    for turn in range(turns):
        mbarrier.wait(full, turn & 1)
        values = buffer.load(threads)
        mbarrier.arrive(empty)
        gl.store(target_ptr + turn * LENGTH + offsets, values)


@jit
def _handover(source_ptr, target_ptr, turns, LENGTH: gl.constexpr):
    buffer = gl.allocate_shared_memory(gl.float32, [LENGTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (_read, (target_ptr, buffer, full, empty, turns, LENGTH)),
            (_write, (source_ptr, buffer, full, empty, turns, LENGTH)),
        ],
        [1],
        [24],
    )


def main() -> None:
    """Hand five vectors over and compare them."""
    source = torch.randn(TURNS, LENGTH, device="cuda")
    target = torch.empty_like(source)
    _handover[(1,)](source, target, TURNS, LENGTH, num_warps=4, maxnreg=168)
    assert torch.equal(source, target)
    print("handed over")


if __name__ == "__main__":
    main()
