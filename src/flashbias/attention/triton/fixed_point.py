"""Sums of many gradients on few entries, the same to the bit in whatever order they are added: as 64-bit integers.

A gradient of a score is multiplied by a power of two, chosen from a bound on the sum so that it cannot overflow. With
|dS_ij| <= P_ij * (2 max|dout| max|v| / (1 - dropout) + max|dlse|) and rows of P that sum to 1, the sum of all |dS| is
at most rows * that bound; what is rounded off is 2^-61 of it. One dS that is not finite makes the whole gradient NaN.

Two kernels: one finds the largest rows, and its last program the power; the other brings sums to floating point.
Tensor by tensor the host would launch some thirty.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.attention.layout import cdiv
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, multiprocessors

__all__ = ["FixedPoint"]

BITS = tl.constexpr(61)
"""Bits of a sum: a sign, one for rounding, and these."""

TINY = tl.constexpr(2.0**-126)
"""float32's smallest normal number."""

DOUT, V, DLSE, COUNT = (tl.constexpr(place) for place in range(4))
"""Places of what the power is made of: squares of the largest rows, the largest |dlse|, programs that have come."""

POWER = 4
"""Place of the power of two, a float32 number among integers."""

FAILED = 5
"""Place of what is not 0 where something is not finite."""

PLACES = 6
"""How many numbers of 32 bits stand behind the sums."""


@triton.jit
def _largest_row(x_ptr, sizes, first, step, width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Largest sum of squares of a row that this program takes; infinite where one is not finite in float32."""
    num_rows, num_heads, seqlen, stride_b, stride_h, stride_n = sizes
    columns = tl.arange(0, COLUMNS)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in tl.range(first, num_rows, step):
        row = begin + tl.arange(0, BLOCK).to(tl.int64)
        bh = row // seqlen
        base = (bh // num_heads) * stride_b + (bh % num_heads) * stride_h + (row % seqlen) * stride_n
        inside = (row < num_rows)[:, None] & (columns < width)[None, :]
        x = tl.load(x_ptr + base[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        squares = tl.sum(x * x, 1)
        largest = tl.maximum(largest, tl.where(squares == squares, squares, float("inf")))
    return tl.max(largest, 0)


@triton.jit
def _keep_largest(ptr, x):
    """Keep the largest of all programs' numbers, which are not negative: then their bits have the same order."""
    tl.atomic_max(ptr, x.to(tl.int32, bitcast=True))


@triton.jit
def _kept(ptr):
    """What all have kept, read where they keep it and from no cache."""
    return tl.atomic_max(ptr, 0).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(dout, v, dlse, num_rows, dropout_p):
    """By what dS is multiplied, from squares of the largest rows and the largest |dlse|."""
    # Squares below float32's smallest normal number are lost: theirs may be this large, too.
    largest = tl.sqrt(tl.maximum(dout, TINY).to(tl.float64)) * tl.sqrt(tl.maximum(v, TINY).to(tl.float64))
    bound = (2.0 * largest / (1.0 - dropout_p) + dlse) * num_rows
    exponent = ((bound.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022
    # float32 holds powers of two up to 2^127: gradients so small that more would be needed are zero.
    power = tl.minimum(tl.maximum(-exponent + BITS, -126), 126)
    return ((power + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "seqlen_q", "num_keys", "seqlen_k"])
def _bound_kernel(
    dout_ptr, v_ptr, dlse_ptr, numbers_ptr, power_ptr, failed_ptr, num_rows, num_heads, seqlen_q, stride_dob,
    stride_doh, stride_don, num_keys, kv_heads, seqlen_k, stride_vb, stride_vh, stride_vn, width, dropout_p, programs,
    HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Largest rows of dout and of v, and the largest |dlse|: the first programs take queries, the others keys."""
    first = tl.program_id(0) * BLOCK
    step = programs * BLOCK
    if tl.program_id(0) < programs:
        of_queries = (num_rows, num_heads, seqlen_q, stride_dob, stride_doh, stride_don)
        _keep_largest(numbers_ptr + DOUT, _largest_row(dout_ptr, of_queries, first, step, width, BLOCK, COLUMNS))
        if HAS_DLSE:
            of_rows = (num_rows, 1, num_rows, 0, 0, 1)
            largest = tl.sqrt(tl.maximum(_largest_row(dlse_ptr, of_rows, first, step, 1, BLOCK, 1), TINY))
            _keep_largest(numbers_ptr + DLSE, largest)
    else:
        of_keys = (num_keys, kv_heads, seqlen_k, stride_vb, stride_vh, stride_vn)
        _keep_largest(numbers_ptr + V, _largest_row(v_ptr, of_keys, first - step, step, width, BLOCK, COLUMNS))
    # The last one to come sees what all have kept.
    if tl.atomic_add(numbers_ptr + COUNT, 1) == 2 * programs - 1:
        dout, v, dlse = _kept(numbers_ptr + DOUT), _kept(numbers_ptr + V), _kept(numbers_ptr + DLSE)
        tl.store(power_ptr, _power_of_two(dout, v, dlse, num_rows, dropout_p))
        is_finite = (dout < float("inf")) & (v < float("inf")) & (dlse < float("inf"))
        tl.store(failed_ptr, 1, mask=is_finite == 0)


@triton.jit(do_not_specialize=["size"])
def _write_kernel(sum_ptr, power_ptr, failed_ptr, grad_ptr, size, BLOCK: tl.constexpr):
    """Gradients from their sums."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(sum_ptr + entry, mask=entry < size, other=0).to(tl.float64) / tl.load(power_ptr).to(tl.float64)
    sums = tl.where(tl.load(failed_ptr) == 0, sums, float("nan"))
    tl.store(grad_ptr + entry, sums.to(grad_ptr.dtype.element_ty), mask=entry < size)


class FixedPoint(NamedTuple):
    """Where gradients of scores are added, and what they are multiplied by before.

    Args:
        sums: int64, one for each entry.
        power: float32, the power of two.
        failed: int32; whoever meets a dS that is not finite stores a number that is not 0.
    """

    sums: Tensor
    power: Tensor
    failed: Tensor

    @classmethod
    def of(cls, ops: Operands, size: int, dout: Tensor, dlse: Tensor | None) -> Self:
        """Zeros, and a power for any sums of this call's dS; nothing waits for the GPU.

        Args:
            ops: the call.
            size: number of entries.
            dout: gradient of the output, `[B, H, N, head_dim_v]`.
            dlse: gradient of the log-sum-exp, or None.
        """
        # One fill for all of them.
        memory = torch.zeros(size + PLACES // 2, dtype=torch.int64, device=dout.device)
        numbers = memory[size:].view(torch.int32)
        made = cls(memory[:size], numbers.view(torch.float32)[POWER:], numbers[FAILED:])
        num_rows, num_keys = ops.batch * ops.num_heads * ops.seqlen_q, ops.v.shape[0] * ops.v.shape[1] * ops.seqlen_k
        block = max(16, 4096 // ops.block_dv)
        programs = min(cdiv(max(num_rows, num_keys), block), 4 * multiprocessors(ops.q.device))
        start(
            _bound_kernel, (2 * programs,), dout, ops.v, None if dlse is None else dlse.contiguous(), numbers,
            made.power, made.failed, num_rows, ops.num_heads, ops.seqlen_q, *dout.stride()[:3], num_keys,
            ops.v.shape[1], ops.seqlen_k, *ops.v.stride()[:3], ops.head_dim_v, ops.dropout_p, programs,
            HAS_DLSE=dlse is not None, BLOCK=block, COLUMNS=ops.block_dv, num_warps=4,
        )  # fmt: skip
        return made

    def write(self, grad: Tensor) -> None:
        """Fill a contiguous gradient of as many elements as there are entries."""
        size = grad.numel()
        # Triton's interpreter cannot round float64 to bfloat16.
        is_rounded_apart = grad.device.type == "cpu" and grad.dtype == torch.bfloat16
        written = torch.empty_like(grad, dtype=torch.float32) if is_rounded_apart else grad
        start(_write_kernel, (cdiv(size, 1024),), *self, written, size, BLOCK=1024, num_warps=4)
        if is_rounded_apart:
            grad.copy_(written)
