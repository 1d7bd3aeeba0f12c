"""One call as the Hopper kernels see it: packed factors, and tensors as the copy engine addresses them."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.hopper.configs import NARROWEST, ready_columns
from flashbias.attention.hopper.gluon import TensorDescriptor, gl
from flashbias.attention.hopper.pack import ReadyFactors
from flashbias.attention.layout import cdiv
from flashbias.attention.registration import RANKS
from flashbias.attention.triton.operands import Operands, flattened
from flashbias.constants import made_once, on_device

__all__ = [
    "FAR",
    "HALF_BYTES",
    "HopperOperands",
    "Shape",
    "Summable",
    "addressable",
    "described",
    "descriptor",
    "is_addressable",
    "layout_of",
    "matrix",
    "or_nothing",
    "packed",
]

ALIGNMENT = 16
"""Bytes to which the copy engine wants every row to be aligned."""

HALF_BYTES = 2
"""Bytes of an element of queries, keys and values: these kernels take half precision only."""

FAR = 2**30
"""Rows up to which boxes of packed batches count."""

_ANY = 2**31 - 2**16
"""Size of a dimension in which nothing ends."""

WIDEST_BESIDE_TABLE = 64
"""Width of heads up to which the fused backward pass looks entries of a table up."""

_ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


class Shape(NamedTuple):
    """What a schedule and a kernel's constants depend on.

    (batch, head) pairs, then sizes as in `Operands`, packed columns of the factors, window, shift; whether there is a
    table, and codes for it; whether a mask of the caller's own hides keys; rank of factors that are centred tile by
    tile, else 0; sequences of a packed batch, else 0.
    """

    pairs: int
    num_heads: int
    group: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    block_d: int
    block_dv: int
    columns: int
    window_left: int
    window_right: int
    shift: int
    has_table: bool = False
    has_codes: bool = False
    hides_keys: bool = False
    centred_rank: int = 0
    sequences: int = 0

    @property
    def is_banded(self) -> bool:
        """Whether a window hides keys."""
        return self.window_left >= 0 or self.window_right >= 0


class Centring(NamedTuple):
    """What offsets are made from: phi_q as given, and centres of phi_k, `[F_k, S, R]`.

    The first `tiles` centres are those of the tiles of keys; from each of the others 128 queries measure their scores.
    """

    phi_q: Tensor | None
    centres: Tensor | None
    tiles: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Strides of phi_q, from one factor's centres to the next, and where the second kind of them begins."""
        if self.phi_q is None or self.centres is None:
            return (0,) * 5
        return *self.phi_q.stride(), self.centres.stride(0), self.tiles

    def references(self, seqlen_q: int) -> Tensor:
        """From what the scores of each query are measured, `[F_k, N, R]`."""
        assert self.centres is not None
        return self.centres[:, self.tiles :].repeat_interleave(packing.CENTRE_TILE, 1)[:, :seqlen_q]


@dataclass(frozen=True)
class Summable:
    """phi_k from which dphi_q is summed where scores have centres by tile: measured from one centre of all keys.

    dphi_q is the sum of `ds_ij (phi_k[j] - c_ref(i))`. Column by column the matrix unit sums parts of
    `phi_k - centre`, and ones; the sum of the ones times `centre - c_ref(i)` is what is missing.

    Up to rank 5 there are three parts, which in bfloat16 are the float32 number itself, beyond two, 2^-17 of it off.

    Args:
        columns: `[F_k, M, 16]`: the first part in R columns, each further one in the next R, ones in the last.
        centre: `[F_k, 1, R]`.
    """

    columns: Tensor
    centre: Tensor

    @classmethod
    def of(cls, phi_k: Tensor, dtype: torch.dtype) -> Self:
        """Take phi_k `[F_k, M, R]` apart, R less than half of the columns."""
        length, rank = phi_k.shape[-2:]
        assert 2 * rank < NARROWEST
        centre = packing.centre_of(phi_k, torch.zeros(1, dtype=torch.int64, device=phi_k.device), length)
        columns = phi_k.new_zeros((*phi_k.shape[:-1], NARROWEST), dtype=dtype)
        parts = _parts(rank)
        columns[..., : parts * rank] = torch.cat(packing.split(phi_k - centre, parts, dtype), -1)
        columns[..., -1] = 1.0
        return cls(columns, centre)

    def gradient(self, sums: Tensor, references: Tensor) -> Tensor:
        """dphi_q `[F_q, N, R]` from the sums of the columns and `c_ref(i)`, `[F_k, N, R]`; F_k is 1 or F_q."""
        rank = self.centre.shape[-1]
        parts = _parts(rank)
        own = sums[..., : parts * rank].unflatten(-1, (parts, rank)).sum(-2)
        return own + sums[..., -1:] * (self.centre - references)


def _parts(rank: int) -> int:
    """Parts of a number that have room beside the ones, at most all of float32's."""
    return min(3, (NARROWEST - 1) // rank)


class HopperOperands(Operands):
    """`Operands` with factors that one product turns into a bias over scale; all heads have all of their columns."""

    factors_type = ReadyFactors

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        """As `Operands.of`; what the copy engine cannot address is copied, columns that a head lacks become zeros."""
        *first, phi_q, phi_k = arguments[:5]
        ranks = arguments[RANKS]
        if ranks and phi_q is not None:
            padding = _padding(tuple(ranks), phi_q.shape[-1], phi_q.device)
            factors = (phi.masked_fill(padding, 0.0) for phi in (phi_q, phi_k))
            arguments = (*first, *factors, *arguments[5:RANKS], [], *arguments[RANKS + 1 :])
        return super().of(*arguments)

    @staticmethod
    def readable(x: Tensor) -> Tensor:
        """As `Operands.readable`; a copy where the copy engine cannot address x."""
        return addressable(flattened(x))

    def portable(self) -> Operands:
        """The same call for the portable kernels, which bring factors into a form of their own."""
        portable = object.__new__(Operands)
        vars(portable).update(
            (name, value) for name, value in vars(self).items() if name not in ("factors", "arguments")
        )
        return portable

    @functools.cached_property
    def shape(self) -> Shape:
        """What a schedule and a kernel's constants depend on."""
        return Shape(
            self.num_programs, self.num_heads, self.group, self.seqlen_q, self.seqlen_k, self.head_dim,
            self.head_dim_v, self.block_d, self.block_dv, self.columns, self.window_left, self.window_right, self.shift,
            self.table is not None, self.code_q is not None, self.mask is not None,
            self.rank if self.is_tile_centred else 0, self.sequences if self.is_varlen else 0,
        )  # fmt: skip

    def key_terms(self, keys: int) -> Tensor | None:
        """The mask as `[F, M]` that is added to scores, 0 or -inf, M up to a whole number of tiles of `keys` keys."""
        if self.mask is None:
            return None
        shown = self.mask[:, 0, :].bool().expand(-1, self.seqlen_k)
        terms = self.q.new_full((shown.shape[0], cdiv(self.seqlen_k, keys) * keys), -math.inf, dtype=torch.float32)
        terms[:, : self.seqlen_k].masked_fill_(shown, 0.0)
        return terms

    def tile_terms(self, keys: int) -> tuple[Tensor | None, Tensor | None]:
        """`key_terms`, and of each tile the largest one, `[F, tiles]`: -inf where all of its keys are hidden."""
        terms = self.key_terms(keys)
        return terms, None if terms is None else terms.unflatten(-1, (-1, keys)).amax(-1)

    @property
    def table_over_scale(self) -> Tensor | None:
        """`[H or 1, T]`: scores are sums over scale, which start from it."""
        return self.table if self.table is None or self.scale == 1.0 else self.table / self.scale

    @property
    def table_sizes(self) -> tuple[int, int]:
        """From one head's table to the next, and entries on each side of the middle one."""
        if self.table is None:
            return 0, 0
        return self.table.stride(0) if self.table.shape[0] > 1 else 0, self.table.shape[1] // 2

    @property
    def is_tile_centred(self) -> bool:
        """Whether phi_k is centred tile by tile, so that scores of a tile get an offset in each row."""
        if self.phi_q is None or self.phi_k is None or self.is_varlen:
            return False
        is_packed = packing.is_packed(self.phi_q, self.phi_k, self.q.dtype)
        return is_packed and packing.is_tile_centred(self.seqlen_k, self.q.dtype)

    @functools.cached_property
    def centring(self) -> Centring:
        """What offsets are made from."""
        if self.factors is None or not self.is_tile_centred:
            return Centring(None, None)
        tiles, opposite = (
            torch.arange(0, n, packing.CENTRE_TILE, device=self.q.device) for n in (self.seqlen_k, self.seqlen_q)
        )
        starts = torch.cat([tiles, opposite + (self.seqlen_k - self.seqlen_q)])
        # Kernels count rows of R; indexing may keep the memory order of a phi_k whose columns lie far apart.
        centres = packing.centre_of(self.factors.raw_k, starts, packing.CENTRE_TILE).contiguous()
        return Centring(self.factors.raw_q, centres, len(tiles))

    @property
    def has_portable_gradients(self) -> bool:
        """Whether the fused backward pass lacks something that the forward pass can do."""
        width = max(self.block_d, self.block_dv)
        if self.table is None:
            return width > 128
        # Codes of packed queries and keys begin elsewhere in each sequence, which that kernel does not look up.
        return width > WIDEST_BESIDE_TABLE or self.is_varlen

    @functools.cached_property
    def columns(self) -> int:
        """Packed columns of the factors, 0 without."""
        if self.phi_q is None or self.phi_k is None:
            return 0
        return ready_columns(self.rank, self.phi_q.dtype, self.phi_k.dtype, self.scale, self.q.dtype)

    @property
    def rank(self) -> int:
        """R, 0 without factors."""
        return 0 if self.phi_q is None else self.phi_q.shape[-1]

    @property
    def shift(self) -> int:
        """Of the diagonal, where the ends of queries and keys are aligned; of a packed batch whether they are."""
        if self.is_varlen:
            return int(self.bottom_right)
        return self.seqlen_k - self.seqlen_q if self.bottom_right else 0


@made_once(maxsize=256)
def _padding(ranks: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """`[H, 1, R]`, True in the columns that a head lacks."""
    return torch.arange(width, device=device) >= on_device(ranks, device, torch.int32)[:, None, None]


def or_nothing(nothing: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, with one that is never read in place of those that are missing."""
    return tuple(nothing if x is None else x for x in tensors)


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """Describe `[..., n, width]` to the copy engine, in boxes of `rows` × `columns`; past the edges it reads zeros."""
    made = object.__new__(TensorDescriptor)
    vars(made).update(_boxed(x.dtype, x.shape, x.stride(), rows, columns), base=x)
    return made


@functools.lru_cache(maxsize=1024)
def _boxed(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, columns: int
) -> dict[str, Any]:
    """Attributes of a descriptor of boxes of rows, in the layout that follows from their size."""
    box = (1,) * (len(shape) - 2) + (rows, columns)
    return _described(dtype, shape, strides, box, layout_of(box, dtype))


def packed(x: Tensor, rows: int, columns: int) -> Any:
    """Describe the tokens `[1, H, T, width]` of a packed batch, so that boxes end where a sequence ends.

    Row i of a sequence of n rows with end e has the coordinates (F, e, head, F - n + i), F = `FAR`. The last one counts
    rows up to F: those past the end have F or more, are read as zeros and never written. The second one counts rows
    too; of the first one F steps take F rows back, since addresses wrap around at 2^64. So every address that is made
    up lies in the tensor, as does the one that all are counted from.

    Args:
        x: the tokens, at most 2^30, in elements of two bytes or of four.
        rows: rows of a box.
        columns: columns of a box.

    Returns:
        A descriptor of five dimensions.

    Reference: `triton.tools.ragged_tma` ends boxes in this way.
    """
    _, heads, tokens, width = x.shape
    step = x.stride(2) if tokens > 1 else ALIGNMENT
    box = (1, 1, 1, rows, columns)
    # F steps of 2^34 elements of two bytes are 2^65 bytes, which is nothing, and of four 2^66.
    strides = (2**34 - step, step, x.stride(1), step, 1)
    made = object.__new__(TensorDescriptor)
    attributes = _described(x.dtype, (_ANY, _ANY, heads, FAR, width), strides, box, layout_of(box, x.dtype))
    vars(made).update(attributes, base=x)
    return made


def described(x: Tensor, box: tuple[int, ...], layout: Any) -> Any:
    """Describe a tensor to the copy engine, in boxes that lie in shared memory as `layout` says."""
    made = object.__new__(TensorDescriptor)
    vars(made).update(_described(x.dtype, x.shape, x.stride(), box, layout), base=x)
    return made


@functools.lru_cache(maxsize=1024)
def _described(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], layout: Any
) -> dict[str, Any]:
    """Attributes of a descriptor, checked once for all tensors that are alike but for their address."""
    # The step of a dimension of size 1 is never taken, but has to be one that could be.
    steps = [step if size > 1 else ALIGNMENT for size, step in zip(shape[:-1], strides[:-1], strict=True)]
    nowhere = torch.empty(0, dtype=dtype)
    return vars(TensorDescriptor(nowhere, list(shape), [*steps, 1], list(box), layout))


def addressable(x: Tensor) -> Tensor:
    """x, or a copy where the copy engine cannot read it."""
    return x if is_addressable(x) else x.clone(memory_format=torch.contiguous_format)


def matrix(x: Any) -> Any:
    """Layout in shared memory of one box of a descriptor, as a matrix."""
    return layout_of(tuple(x.block_shape[-2:]), x.base.dtype)


@functools.cache
def layout_of(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Layout in shared memory that the copy engine and the matrix unit agree on."""
    return gl.NVMMASharedLayout.get_default_for(list(shape), _ELEMENTS[dtype])


def is_addressable(x: Tensor) -> bool:
    """Whether the copy engine can read x: unit stride in rows, all others, and the start, a multiple of 16 bytes."""
    return x.data_ptr() % ALIGNMENT == 0 and _has_addressable_steps(x.shape, x.stride(), x.element_size())


@functools.lru_cache(maxsize=1024)
def _has_addressable_steps(shape: torch.Size, strides: tuple[int, ...], size: int) -> bool:
    steps = [step for length, step in zip(shape[:-1], strides[:-1], strict=True) if length > 1]
    return strides[-1] == 1 and all(step > 0 and step * size % ALIGNMENT == 0 for step in steps)
