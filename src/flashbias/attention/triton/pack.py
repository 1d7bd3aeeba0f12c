"""Factors as the kernels read them: `packing.pack` in one launch, or the tensors as they are.

The numbers (which parts, which centre) come from `attention/packing.py`; the kernel only applies them.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.layout import cdiv, flatten_heads, next_power_of_2
from flashbias.attention.packing import Form, Handed
from flashbias.attention.triton.centring import centre_of
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.scores import EXACT, READY, UNSCALED

__all__ = ["FACTOR_STRIDES", "Factors", "by_group", "packed_pair"]

BLOCK_ROWS = 64
"""Rows of a factor that one program packs; a tile of keys that share a centre is a multiple of it."""

WIDEST_BLOCK = 64
"""Columns that one program packs."""


@triton.jit
def _pack_kernel(
    q_ptr,
    k_ptr,
    packed_q_ptr,
    packed_k_ptr,
    programs_q,
    rows_q,
    rows_k,
    rank: tl.constexpr,
    width,
    stride_qf,
    stride_qn,
    stride_qr,
    stride_kf,
    stride_kn,
    stride_kr,
    centre_tile,
    scale,
    PARTS_Q: tl.constexpr,
    PARTS_K: tl.constexpr,
    TERMS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both factors in one launch: the first programs pack blocks of phi_q, the others blocks of phi_k."""
    block = tl.program_id(0)
    if block < programs_q:
        _pack_rows(
            q_ptr, packed_q_ptr, block, rows_q, rank, width, stride_qf, stride_qn, stride_qr, centre_tile, scale,
            PARTS_Q, TERMS, False, False, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    else:
        _pack_rows(
            k_ptr, packed_k_ptr, block - programs_q, rows_k, rank, width, stride_kf, stride_kn, stride_kr, centre_tile,
            scale, PARTS_K, TERMS, True, CENTRED, BLOCK_N, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _pack_rows(
    x_ptr,
    out_ptr,
    block,
    length,
    rank: tl.constexpr,
    width,
    stride_f,
    stride_n,
    stride_r,
    centre_tile,
    scale,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    IS_KEY: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of rows of a packed factor; PARTS holds two bits for each term."""
    blocks = tl.cdiv(length, BLOCK_N)
    f = tl.cast(block // blocks, tl.int64)
    n = (block % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = c % rank
    term = c // rank
    inside = (n < length)[:, None] & (term < TERMS)[None, :]
    row = x_ptr + f * stride_f + r[None, :] * stride_r
    n64 = n.to(tl.int64)
    x = tl.load(row + n64[:, None] * stride_n, mask=inside, other=0.0).to(tl.float32)
    if not IS_KEY:
        x = tl.div_rn(x, scale)
    elif CENTRED:
        # A block of rows lies within one tile: there is one centre for all of them.
        start = (block % blocks) * BLOCK_N // centre_tile * centre_tile
        r_used = tl.where(term < TERMS, r, rank)
        centre = centre_of(x_ptr + f * stride_f + r * stride_r, start, centre_tile, r_used, length, stride_n, rank)
        x -= centre[None, :]
    if TERMS > 1:
        part = (PARTS >> (2 * tl.minimum(term, TERMS - 1)))[None, :] & 3
        p0 = x.to(tl.bfloat16).to(tl.float32)
        p1 = (x - p0).to(tl.bfloat16).to(tl.float32)
        p2 = x - p0 - p1
        x = tl.where(part == 0, p0, tl.where(part == 1, p1, p2))
    ptrs = out_ptr + (f * length + n64[:, None]) * width + c[None, :]
    tl.store(ptrs, x.to(out_ptr.dtype.element_ty), mask=(n < length)[:, None] & (c < width)[None, :])


FACTOR_STRIDES = (
    "stride_pqf",
    "stride_pq",
    "stride_pkf",
    "stride_pk",
    "stride_raw_qf",
    "stride_raw_qn",
    "stride_raw_qr",
    "stride_raw_kf",
    "stride_raw_kn",
    "stride_raw_kr",
)
"""Strides of the operands, whose rows are contiguous, and of the factors as given, as kernels name them."""


@dataclass(eq=False)
class Factors:
    """Operands of one call.

    Attributes:
        phi_q: `[F_q, N, columns]`; a factor that is the same for all queries has stride 0 there.
        phi_k: `[F_k, M, columns]`.
        raw_q: `[F_q, N, R]`, the factor as given (tile offsets are made from it).
        raw_k: `[F_k, M, R]`.
        rank: R.
        terms: packed columns for each rank.
        columns: width of the operands.
        block_r: columns that a kernel holds at once, a power of two.
        mode: how kernels bring a factor in registers to S / scale (READY, EXACT, UNSCALED).
        tile_centred: whether phi_k is centred tile by tile.
        dphi_k_mult: what turns `ds^T phi_q` into the gradient of phi_k.
    """

    phi_q: Tensor
    phi_k: Tensor
    raw_q: Tensor
    raw_k: Tensor
    rank: int
    terms: int
    columns: int
    block_r: int
    mode: int
    tile_centred: bool
    dphi_k_mult: float

    @property
    def chunks(self) -> int:
        """Chunks of `block_r` columns."""
        return cdiv(self.columns, self.block_r)

    def strides(self) -> dict[str, int]:
        """By name, in elements."""
        packed = (*self.phi_q.stride()[:2], *self.phi_k.stride()[:2])
        return dict(zip(FACTOR_STRIDES, (*packed, *self.raw_q.stride(), *self.raw_k.stride()), strict=True))

    @classmethod
    def of(
        cls,
        phi_q: Tensor,
        phi_k: Tensor,
        scale: float,
        dtype: torch.dtype,
        centred: bool,
        handed: Handed | None = None,
    ) -> Factors:
        """Pack for queries of `dtype`, or take the factors as they are where their products are exact.

        Args:
            phi_q: `[*own, H or 1, N, R]`.
            phi_k: `[*own, H or 1, M, R]`.
            scale: factor of the dot products.
            dtype: dtype of the queries.
            centred: whether phi_k may be centred (packed batches are not: no sequence may see another).
            handed: what goes from the forward pass to the backward pass.

        Returns:
            The operands.
        """
        raw_q, raw_k = by_group(phi_q), by_group(phi_k)
        rank = raw_q.shape[-1]
        if not packing.is_packed(raw_q, raw_k, dtype):
            raw_q, raw_k = _unit_stride(raw_q), _unit_stride(raw_k)
            block_r = packing.chunk_of(rank)
            mode = _mode(scale, raw_q.dtype, chunked=rank > block_r)
            return cls(raw_q, raw_k, raw_q, raw_k, rank, 1, rank, block_r, mode, False, 1.0)
        tiled = centred and packing.is_tile_centred(raw_k.shape[-2], dtype)
        form = packing.form_of(rank, dtype)
        tile = packing.CENTRE_TILE if tiled else raw_k.shape[-2] if centred else 0
        packed_q, packed_k = packed_pair(raw_q, raw_k, scale, form, tile, handed)
        return cls(
            packed_q, packed_k, raw_q, raw_k, rank, len(form.terms), form.width, form.block, READY.value, tiled, scale
        )  # fmt: skip


def _mode(scale: float, dtype: torch.dtype, chunked: bool) -> int:
    """An exact way to S / scale: float16 could leave its range when multiplied, other scales are not exact."""
    exact = packing.is_power_of_two(scale) and dtype == torch.bfloat16 and not chunked
    return EXACT.value if exact else UNSCALED.value


def by_group(x: Tensor) -> Tensor:
    """`[groups, N, R]`, as `flatten_heads`; x itself where it has that form."""
    return x if x.dim() == 3 else flatten_heads(x)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def packed_pair(
    raw_q: Tensor,
    raw_k: Tensor,
    scale: float,
    form: Form,
    centre_tile: int,
    handed: Handed | None = None,
    *,
    every_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both factors in a form, by one launch; by none where the forward pass has handed them over.

    Args:
        raw_q: `[F_q, N, R]`.
        raw_k: `[F_k, M, R]`.
        scale: factor of the dot products.
        form: what to make.
        centre_tile: keys that share a centre, 0 where none is taken off.
        handed: where the pair goes or comes from; None for tensors of its own.
        every_row: whether a phi_q that is the same for all queries is written for each of them.

    Returns:
        `[F_q, N, width]`, with stride 0 where one row stands for all, and `[F_k, M, width]`.
    """
    (groups_q, n, rank), (groups_k, m, _) = raw_q.shape, raw_k.shape
    rows_q = n
    if handed is not None:
        packed_q, packed_k = handed.sides((groups_q, n), (groups_k, m), form.width)
        if handed.is_filled:
            return packed_q, packed_k
    else:
        rows_q = 1 if raw_q.stride(1) == 0 and not every_row else n
        packed_q = raw_q.new_empty((groups_q, rows_q, form.width), dtype=form.dtype)
        packed_k = raw_k.new_empty((groups_k, m, form.width), dtype=form.dtype)
    programs_q, programs_k = groups_q * cdiv(rows_q, BLOCK_ROWS), groups_k * cdiv(m, BLOCK_ROWS)
    parts_q, parts_k = _parts(form.terms)
    block_c = min(next_power_of_2(form.width), WIDEST_BLOCK)
    start(
        _pack_kernel,
        (programs_q + programs_k, cdiv(form.width, block_c)),
        raw_q,
        raw_k,
        packed_q,
        packed_k,
        programs_q,
        rows_q,
        m,
        rank,
        form.width,
        *raw_q.stride(),
        *raw_k.stride(),
        centre_tile or 1,
        scale,
        PARTS_Q=parts_q,
        PARTS_K=parts_k,
        TERMS=len(form.terms),
        CENTRED=centre_tile > 0,
        BLOCK_N=BLOCK_ROWS,
        BLOCK_C=block_c,
    )
    return packed_q if rows_q == n else packed_q.expand(-1, n, -1), packed_k


@functools.cache
def _parts(terms: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Parts of phi_q and of phi_k that the columns hold, two bits for each."""
    return sum(a << (2 * t) for t, (a, _) in enumerate(terms)), sum(b << (2 * t) for t, (_, b) in enumerate(terms))
