"""Results of parts of a split key range, joined."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from flashbias.attention.layout import next_power_of_2
from flashbias.attention.triton.launcher import start

__all__ = ["join"]


@triton.jit
def _join_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    num_heads,
    seqlen_q,
    head_dim_v,
    num_splits,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Weight the parts of one query row by their log-sum-exp."""
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.num_programs(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_DV)
    inside = offs_s < num_splits
    lse = tl.load(part_lse_ptr + offs_s * rows + row, mask=inside, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    ptrs = part_ptr + (offs_s[:, None] * rows + row) * head_dim_v + offs_d[None, :]
    parts = tl.load(ptrs, mask=inside[:, None] & (offs_d < head_dim_v)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    bh = row // seqlen_q
    base = (bh // num_heads) * stride_ob + (bh % num_heads) * stride_oh + (row % seqlen_q) * stride_on
    tl.store(out_ptr + base + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < head_dim_v)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))


def join(parts: torch.Tensor, parts_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill `out` and `lse` from what was computed of each part of the keys, one program to a query row.

    Args:
        parts: outputs of the parts, float32 `[splits, B, H, N, head_dim_v]`.
        parts_lse: their log-sum-exp, `[splits, *]` with `lse`'s shape.
        out: `[B, H, N, head_dim_v]`.
        lse: float32, `[B, H, N]` or any shape of as many elements.
    """
    splits, _, num_heads, seqlen_q, head_dim_v = parts.shape
    start(
        _join_kernel,
        (lse.numel(),),
        parts,
        parts_lse,
        out,
        lse,
        *out.stride()[:3],
        num_heads,
        seqlen_q,
        head_dim_v,
        splits,
        BLOCK_S=next_power_of_2(splits),
        BLOCK_DV=next_power_of_2(head_dim_v),
    )
