"""Results of tiles whose keys were cut into parts, joined."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from flashbias.attention.hopper.schedule import Schedule
from flashbias.attention.layout import next_power_of_2
from flashbias.attention.triton.launcher import start

__all__ = ["join"]

CHUNK = 16
"""Queries of a program."""


@triton.jit
def _join_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_ob, stride_oh, stride_on,
    first_tile, parts, num_blocks, num_heads, seqlen_q, head_dim_v,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Weight the parts of a few queries of one tile by their log-sum-exp."""
    cut = tl.program_id(0)
    within = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    tile = first_tile + cut
    bh = tile // num_blocks
    i = tile % num_blocks * BLOCK_M + within
    inside = i < seqlen_q
    s = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_DV)
    # [BLOCK_S, CHUNK]
    rows = (cut * parts + s)[:, None] * BLOCK_M + within[None, :]
    lse = tl.load(part_lse_ptr + rows, mask=(s < parts)[:, None], other=float("-inf"))
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - base[None, :]), 0)
    out = tl.zeros([CHUNK, BLOCK_DV], tl.float32)
    for part in range(parts):
        row = (cut * parts + part) * BLOCK_M + within
        weight = tl.exp(tl.load(part_lse_ptr + row) - base)
        out += weight[:, None] * tl.load(part_ptr + row[:, None] * BLOCK_DV + columns[None, :])
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    b = (bh // num_heads).to(tl.int64)
    h = bh % num_heads
    ptrs = out_ptr + b * stride_ob + h * stride_oh + i.to(tl.int64)[:, None] * stride_on + columns[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < head_dim_v)[None, :])
    tl.store(lse_ptr + bh.to(tl.int64) * seqlen_q + i, base + tl.log(total), mask=inside)


def join(
    schedule: Schedule, parts: torch.Tensor, parts_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, blocks: int
) -> None:
    """Fill the rows of `out` and `lse` that belong to tiles which were cut.

    Args:
        schedule: by which they were cut.
        parts: outputs of the parts, float32 `[cut * parts, block_m, block_dv]`.
        parts_lse: their log-sum-exp, `[cut * parts, block_m]`.
        out: `[B, H, N, head_dim_v]`.
        lse: float32, `[B, H, N]` or any shape of as many elements.
        blocks: tiles of one (batch, head) pair.
    """
    rows, block_dv = parts.shape[1:]
    start(
        _join_kernel,
        (schedule.cut, rows // CHUNK),
        parts,
        parts_lse,
        out,
        lse,
        *out.stride()[:3],
        schedule.whole,
        schedule.parts,
        blocks,
        out.shape[1],
        out.shape[2],
        out.shape[3],
        BLOCK_M=rows,
        BLOCK_S=next_power_of_2(schedule.parts),
        BLOCK_DV=block_dv,
        CHUNK=CHUNK,
        num_warps=4,
    )
