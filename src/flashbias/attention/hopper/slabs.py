"""Float32 sums over keys as the fused backward pass keeps them, and how they become gradients.

A slab holds 64 queries × W columns, in the order in which the threads of a warpgroup hold a sum of the matrix unit. A
thread's numbers at (i, j), (i, j + 1), (i + 8, j), (i + 8, j + 1) follow each other, then those of the 128 threads,
then the next eight columns. So each thread stores 16 bytes at a time, a warp 512 in a row, and no two threads meet in a
bank of shared memory; and a slab is one block of global memory, to which the copy engine adds line after line.

    index(i, j) = j₀ + 2 i₃ + 4 j₂₁ + 16 i₂₁₀ + 128 i₅₄ + 512 j₅₄₃        subscripts: bits of the number

In a packed batch every sequence begins a slab of its own, since what is added to a slab is added to all of its rows.
Sequence s of queries from e_s on begins slab e_s // 64 + s: the next one begins n_s // 64 + 1 slabs later at least, and
n_s queries fill no more. So T queries of S sequences have T // 64 + S slabs, of which some may stay empty.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.attention.hopper.configs import SLAB
from flashbias.attention.hopper.gluon import gl
from flashbias.attention.hopper.operands import described
from flashbias.attention.layout import cdiv
from flashbias.attention.triton.launcher import start

__all__ = ["LINE", "box_of", "order_of", "packed_zeros", "unfold", "zeros"]

LINE = 256
"""Numbers of a row of the copy engine's box: as many as it takes."""


def zeros(groups: int, rows: int, width: int, columns: int, device: torch.device) -> Tensor:
    """Empty sums `[groups, slabs, across, 64 * columns]` for `rows` queries of `width` columns, `columns` to a slab."""
    return torch.zeros(groups, cdiv(rows, SLAB), width // columns, SLAB * columns, dtype=torch.float32, device=device)


def packed_zeros(groups: int, tokens: int, sequences: int, width: int, columns: int, device: torch.device) -> Tensor:
    """As `zeros`, for the queries of a packed batch."""
    return zeros(groups, (tokens // SLAB + sequences) * SLAB, width, columns, device)


def box_of(sums: Tensor, columns: int) -> Any:
    """Describe slabs to the copy engine, so many of their columns to a box."""
    return described(sums.view(-1, LINE), (SLAB * columns // LINE, LINE), plain())


@functools.cache
def plain() -> Any:
    """Layout of a box in shared memory: line after line."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@functools.cache
def order_of(columns: int) -> Any:
    """Layout in shared memory of a slab as a matrix of 64 queries × `columns` columns."""
    first = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]
    wide = [[0, 1 << bit] for bit in range(3, columns.bit_length() - 1)]
    return gl.SharedLinearLayout(offset_bases=first + wide)


@triton.jit
def _rows_of_slab(cu_ptr, sequences, slab, ROWS: tl.constexpr):
    """First row of a slab of a packed batch, and the end of its sequence; none where the slab is empty.

    It belongs to the last sequence that does not begin later, which is searched for by halves.
    """
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // ROWS + middle <= slab:
            low = middle
        else:
            high = middle
    start, end = tl.load(cu_ptr + low), tl.load(cu_ptr + low + 1)
    return start + (slab - (start // ROWS + low)) * ROWS, end


@triton.jit(do_not_specialize=["sequences"])
def _unfold_kernel(
    sums_ptr, out_ptr, cu_ptr, stride_ob, stride_oh, stride_on, stride_od, num_heads, seqlen, width, slabs, across,
    sequences, factor, IS_VARLEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One slab, times a factor, to its rows of a gradient."""
    slab = tl.program_id(0)
    part, row = slab % across, slab // across % slabs
    group = slab // across // slabs
    numbers = tl.load(sums_ptr + slab.to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS))
    # From the outermost bits to the innermost: j₅₄₃, i₅₄, i₂₁₀, j₂₁, i₃, j₀.
    numbers = tl.reshape(numbers, [COLUMNS // 8, ROWS // 16, 8, 4, 2, 2])
    numbers = tl.reshape(tl.permute(numbers, [1, 4, 2, 0, 3, 5]), [ROWS, COLUMNS])
    first, end = row * ROWS, seqlen
    if IS_VARLEN:
        first, end = _rows_of_slab(cu_ptr, sequences, row, ROWS)
    i = first + tl.arange(0, ROWS)
    j = part * COLUMNS + tl.arange(0, COLUMNS)
    out_ptr += (group // num_heads).to(tl.int64) * stride_ob + (group % num_heads).to(tl.int64) * stride_oh
    ptrs = out_ptr + i.to(tl.int64)[:, None] * stride_on + j[None, :] * stride_od
    tl.store(ptrs, (numbers * factor).to(out_ptr.dtype.element_ty), mask=(i < end)[:, None] & (j < width)[None, :])


def unfold(sums: Tensor, out: Tensor, factor: float, cu_seqlens: Tensor | None = None) -> None:
    """Write sums, times a factor, to a gradient `[B, H, N, width]`.

    Args:
        sums: as `zeros` makes them, of B·H groups; columns past the width and rows past N are left out.
        out: the gradient.
        factor: what all of them are multiplied by.
        cu_seqlens: starts of packed sequences, int32 `[S + 1]`, which stay on their device; None where none are packed.
    """
    groups, slabs, across, size = sums.shape
    if sums.numel() == 0:
        return
    start(
        _unfold_kernel,
        (groups * slabs * across,),
        sums, out, cu_seqlens, *out.stride(), out.shape[1], out.shape[2], out.shape[3], slabs, across,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, factor, IS_VARLEN=cu_seqlens is not None,
        COLUMNS=size // SLAB, ROWS=SLAB, num_warps=4,
    )  # fmt: skip
