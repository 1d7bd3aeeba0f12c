"""From factors to kernel operands. All numerics of the factors live here, once.

What a kernel adds to its scores is `packed_q @ packed_k.T`, where the packed operands are made so that the
sum is the bias up to a constant in each row, which softmax cancels:

- **Centring.** `phi_k - c` in place of `phi_k`. It changes row i by the constant `phi_q[i] @ c`, so no probability
  changes, and it removes most of the cancellation between large products. c is the median of three keys, entry by
  entry, so that no single outlying key spoils the others; entries beyond `FURTHEST_CENTRE` are left out, so that
  neither do many, masked by a column of -1e9. Packed batches are not centred, so that no sequence sees
  another. Beyond `TILE_CENTRE_FROM` keys, and beside float32 queries, float32 sums of such products would still be
  too coarse (an ALiBi column reaches 2^20): then c is taken per tile of `CENTRE_TILE` keys, and kernels add
  `phi_q[i] @ (c - c_ref(i))`, with c_ref that of the keys opposite to the query, so that what is near the diagonal
  is summed near zero.
- **Splitting.** In half precision x = x0 + x1 + x2 with each part rounded to bfloat16 (8 bits each, 24 in all).
  Kept are the products whose size reaches the accuracy wanted; each is one column of the operands, and
  columns up to the next multiple of 16 cost nothing, since the matrix unit works through 16 at a time.
- **Scale.** Scores are accumulated as S / scale, so `phi_q / scale` is packed.
- **Order of columns.** `column = t * rank + r`: the leading parts, which are what gradients need, come first.

Factors that come in half precision are products of exact operands already: they are used as they are.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.attention.call import HALF
from flashbias.attention.layout import cdiv, next_power_of_2
from flashbias.factored import FactoredBias

__all__ = [
    "CENTRE_TILE",
    "Form",
    "Handed",
    "centre_of",
    "centre_offsets",
    "chunk_of",
    "form_of",
    "is_packed",
    "is_power_of_two",
    "is_tile_centred",
    "pack",
    "products",
    "ready_products",
    "reference_starts",
    "row_constant",
    "row_sums",
    "split",
    "within_reach",
]

CENTRE_TILE = 128
"""Keys that share one centre when centring goes by tile."""

TILE_CENTRE_FROM = 32_768
"""Number of keys beyond which centring goes by tile: half of it times 2^-24 is 2^-10, half bfloat16's rounding."""

# (part of phi_q, part of phi_k) of every column. A part is 2^-8 of the one before it (2^-9 after rounding),
# so three products leave 3 * 2^-18, six leave about 2^-25 of |phi_q||phi_k|.
_THREE = ((0, 0), (0, 1), (1, 0))
_SIX = (*_THREE, (1, 1), (0, 2), (2, 0))

SIX_UP_TO_RANK = 5
"""Ranks whose factors are carried to float32's own accuracy; 6 * 5 columns still fit into 32."""

WIDEST_CHUNK = 128
"""Packed columns that a portable kernel holds at once; wider factors go chunk by chunk."""

FURTHEST_CENTRE = 2.0**24
"""From further out float32 tells only whole numbers apart: what lies there is a mask (-1e9)."""

FLOATS_OF_A_LOAD = 4
"""A thread loads 16 bytes at once."""


def products(rank: int, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """Which products of parts are kept for a factor of a given rank that is packed for `dtype` queries.

    Args:
        rank: R, at least 1.
        dtype: dtype of the queries.

    Returns:
        Pairs (part of phi_q, part of phi_k), one for each packed column of a rank.
    """
    if dtype not in HALF:
        return ((0, 0),)
    return _SIX if rank <= SIX_UP_TO_RANK else _THREE


def ready_products(
    rank: int, dtype_q: torch.dtype, dtype_k: torch.dtype, scale: float, dtype: torch.dtype
) -> tuple[tuple[int, int], ...]:
    """Which products of bfloat16 parts make `bias / scale`, for kernels that cannot multiply a product by 1 / scale.

    float32 factors take those of `products`. Of bfloat16 ones only phi_q / scale needs a second part, and none where
    the scale is a power of two; two parts hold a float16 number exactly.

    Args:
        rank: R, at least 1.
        dtype_q: dtype of phi_q.
        dtype_k: dtype of phi_k.
        scale: the factor of `q @ k.T`.
        dtype: dtype of the queries.

    Returns:
        As `products`.
    """
    if dtype_q == dtype_k == torch.bfloat16:
        return ((0, 0),) if is_power_of_two(scale) else ((0, 0), (1, 0))
    if dtype_q == dtype_k == torch.float16:
        return _THREE
    return products(rank, dtype)


def is_packed(phi_q: Tensor, phi_k: Tensor, dtype: torch.dtype) -> bool:
    """Whether factors are centred and split for queries of `dtype`, or used as they are.

    Two half-precision factors of one dtype beside half-precision queries are exact operands already.
    """
    return not (dtype in HALF and phi_q.dtype in HALF and phi_q.dtype == phi_k.dtype)


class Form(NamedTuple):
    """How packed factors stand in memory: products of parts, dtype, columns as stored; zeros fill those that are left.

    `block` is how many columns a kernel holds at once, a power of two.
    """

    terms: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    width: int
    block: int


@functools.cache
def form_of(rank: int, dtype: torch.dtype) -> Form:
    """The form in which portable kernels read factors that are packed for `dtype` queries.

    Whole chunks are stored, so that loads need no mask; a float32 factor is not blown up for that.

    Args:
        rank: R, at least 1.
        dtype: dtype of the queries.

    Returns:
        The form.
    """
    terms = products(rank, dtype)
    columns, is_half = rank * len(terms), dtype in HALF
    block = chunk_of(columns, WIDEST_CHUNK if is_half else WIDEST_CHUNK // 2)
    if not is_half and columns < block:
        return Form(terms, torch.float32, cdiv(columns, FLOATS_OF_A_LOAD) * FLOATS_OF_A_LOAD, block)
    return Form(terms, torch.bfloat16 if is_half else torch.float32, cdiv(columns, block) * block, block)


def chunk_of(columns: int, widest: int = WIDEST_CHUNK) -> int:
    """How many of a factor's columns a kernel holds at once: a power of two that the matrix unit takes."""
    return min(widest, max(16, next_power_of_2(columns)))


class Handed(NamedTuple):
    """Packed factors that the forward pass writes (`is_filled` False) and the backward pass reads (True).

    `buffer` has one dimension and holds phi_q, then phi_k, row after row in the columns of `form_of`.
    """

    buffer: Tensor
    is_filled: bool

    def sides(self, rows_q: tuple[int, int], rows_k: tuple[int, int], width: int) -> tuple[Tensor, Tensor]:
        """Views `[groups, rows, width]` of both factors, from their groups and rows."""
        (groups_q, n), (groups_k, m) = rows_q, rows_k
        return (
            self.buffer.as_strided((groups_q, n, width), (n * width, width, 1)),
            self.buffer.as_strided((groups_k, m, width), (m * width, width, 1), groups_q * n * width),
        )


def split(x: Tensor, parts: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Write x as a sum of parts that are exact in `dtype`, each the rounding of what is left.

    Three parts in bfloat16 give every float32 back exactly (8 + 8 + 8 bits), unless the last one falls
    below the range of `dtype`. Differentiable: the gradient of the sum is the identity.

    Args:
        x: float32 tensor of any shape.
        parts: number of parts.
        dtype: dtype of the parts.

    Returns:
        `parts` tensors of `dtype`.

    Examples:
        >>> import torch
        >>> x = torch.tensor([1048575.0, 0.1])
        >>> hi, mid, lo = split(x, 3)
        >>> bool((hi.double() + mid.double() + lo.double() == x.double()).all())
        True
    """
    result = []
    rest = x
    for _ in range(parts):
        part = rest.to(dtype)
        result.append(part)
        rest = rest - part.to(x.dtype)
    return result


def is_tile_centred(seqlen_k: int, dtype: torch.dtype) -> bool:
    """Whether kernels take phi_k centred tile by tile (True) or once for all keys.

    Beside float32 queries always: a sum that passes through large products is too coarse for them at any length.
    """
    return seqlen_k > (TILE_CENTRE_FROM if dtype in HALF else CENTRE_TILE)


def centre_offsets(length: int) -> tuple[int, int, int]:
    """Which three of `length` keys the centre is the median of: one at each quarter, and the middle."""
    return length // 4, length // 2, length - 1 - length // 4


def centre_of(phi_k: Tensor, starts: Tensor, length: int) -> Tensor:
    """Centre of the `length` keys from each start: the median of three rows, entry by entry, `within_reach`.

    Args:
        phi_k: `[..., M, R]`.
        starts: int64 `[S]`; rows past the end are the last one.
        length: keys that share a centre.

    Returns:
        `[..., S, R]` in at least float32, without a gradient.
    """
    wide = phi_k.detach().to(torch.promote_types(phi_k.dtype, torch.float32))
    a, b, c = (wide[..., (starts + n).clamp(0, phi_k.shape[-2] - 1), :] for n in centre_offsets(length))
    return within_reach(torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c)))


def within_reach(centre: Tensor) -> Tensor:
    """A centre with 0 in place of entries beyond `FURTHEST_CENTRE`: most keys may be masked by a column of -1e9."""
    return torch.where(centre.abs() <= FURTHEST_CENTRE, centre, 0.0)


def reference_starts(seqlen_q: int, seqlen_k: int, device: torch.device, *, tiled: bool) -> tuple[Tensor, int]:
    """From where on the keys lie whose centre the scores of each query are measured from, and how many they are.

    Tile by tile they are those opposite to the query (ends aligned, as in decoding); otherwise all.
    """
    i = torch.arange(seqlen_q, device=device)
    if not tiled:
        return torch.zeros_like(i), seqlen_k
    return i // CENTRE_TILE * CENTRE_TILE + seqlen_k - seqlen_q, CENTRE_TILE


def row_constant(bias: FactoredBias, *, tiled: bool) -> Tensor:
    """What centring took from each row: add it to the log-sum-exp of centred scores.

    The centre counts as a constant: the function does not depend on it, and neither may a gradient.

    Args:
        bias: the factors, uncentred.
        tiled: whether centring went tile by tile.

    Returns:
        `[*batch, H or 1, N]` in float32 (float64 for float64 factors), differentiable in phi_q.
    """
    bias = bias.without_ranks()
    dtype = torch.promote_types(bias.phi_q.dtype, torch.float32)
    starts, length = reference_starts(bias.seqlen_q, bias.seqlen_k, bias.device, tiled=tiled)
    centre = centre_of(bias.phi_k, starts, length).to(dtype)
    return (bias.phi_q.to(dtype) * centre).sum(-1)


def row_sums(phi_q: Tensor, rows: Tensor) -> Tensor:
    """`sum_r phi_q[i, r] * rows[i, r]` in float64, without a gradient: a constant of each row."""
    return (phi_q.detach().double() * rows.detach().double()).sum(-1)


def pack(
    phi_q: Tensor,
    phi_k: Tensor,
    scale: float,
    dtype: torch.dtype,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Make operands of `dtype` whose product is the bias over `scale`, up to a constant in each row.

    Formula: `packed_q @ packed_k.T = (phi_q @ (phi_k - centre).T) / scale`, to 2^-24 of |phi_q||phi_k| for ranks
    up to `SIX_UP_TO_RANK`, else to 2^-16; exactly rounded float32 products where `dtype` is float32.

    Args:
        phi_q: `[..., N, R]`.
        phi_k: `[..., M, R]`.
        scale: the factor of `q @ k.T`; positive.
        dtype: bfloat16, float32 or float64 (float16 has not the range for parts).
        centre: `[..., 1 or M, R]`, what to subtract from phi_k; default `centre_of` all keys.

    Returns:
        `[..., N, R * terms]` and `[..., M, R * terms]`, differentiable.

    Examples:
        >>> import torch
        >>> phi_q, phi_k = torch.full((1, 2, 1), 0.3), torch.arange(4.0).reshape(1, 4, 1)
        >>> a, b = pack(phi_q, phi_k, 1.0, torch.bfloat16)
        >>> a.shape, b.shape
        (torch.Size([1, 2, 6]), torch.Size([1, 4, 6]))
        >>> (a.double() @ b.double().mT)[0, 0]
        tensor([-0.6000, -0.3000,  0.0000,  0.3000], dtype=torch.float64)
    """
    if dtype == torch.float16:
        raise ValueError("dtype torch.float16 cannot hold the parts of a factor; pack for torch.bfloat16")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if centre is None:
        centre = centre_of(phi_k, torch.zeros(1, dtype=torch.int64, device=phi_k.device), phi_k.shape[-2])
    phi_q = phi_q.to(wide) / scale
    phi_k = phi_k.to(wide) - centre.detach().to(wide)
    terms = products(phi_q.shape[-1], dtype)
    if len(terms) == 1:
        return phi_q.to(dtype), phi_k.to(dtype)
    parts_q, parts_k = split(phi_q, 3, dtype), split(phi_k, 3, dtype)
    packed_q = torch.cat([parts_q[a] for a, _ in terms], dim=-1)
    packed_k = torch.cat([parts_k[b] for _, b in terms], dim=-1)
    return packed_q, packed_k


def is_power_of_two(x: float) -> bool:
    """Whether multiplying by x is exact in every binary format (range apart)."""
    return x > 0 and math.frexp(x)[0] == 0.5
