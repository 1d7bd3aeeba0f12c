"""One call as the kernels see it: flat tensors, strides, sizes and flags, built once for both passes."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.layout import Sharing, cdiv, flatten_heads, next_power_of_2, share
from flashbias.attention.packing import Handed
from flashbias.attention.triton.configs import WIDEST_SPLIT
from flashbias.attention.triton.pack import FACTOR_STRIDES, Factors
from flashbias.constants import on_device

__all__ = ["Operands", "flattened", "strides_of", "walk_sizes"]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU (1 under the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_NO_FACTORS = dict.fromkeys(FACTOR_STRIDES, 0)


# Not frozen, and sizes are fields: one is made for every pass, and each size is read many times.
@dataclass(eq=False)
class Operands:
    """The arguments of the operators in `attention/registration.py`, flattened to `[B, H, N, D]`.

    Attributes:
        batch: B, the product of all batch dimensions.
        num_heads: query heads.
        group: query heads for each key and value head.
        seqlen_q: N (all tokens of a packed batch).
        seqlen_k: M (all tokens of a packed batch).
        head_dim: width of queries and keys.
        head_dim_v: width of values.
        block_d: head_dim as a power of two that the matrix unit takes.
        block_dv: head_dim_v likewise.
        is_varlen: whether sequences are packed one after the other.
        sequences: batch elements, or sequences of a packed batch.
        num_programs: pairs (sequence, head).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    table: Tensor | None
    code_q: Tensor | None
    code_k: Tensor | None
    mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    dropout_seed: Tensor | None
    ranks_per_head: Tensor | None
    sharing_q: Sharing
    sharing_k: Sharing
    sharing_mask: Sharing
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    dropout_p: float
    handed: Handed | None

    factors_type: ClassVar[type[Factors]] = Factors
    """How factors are brought into the form that the kernels read."""

    def __post_init__(self) -> None:
        """Work out the sizes."""
        self.batch, self.num_heads, self.seqlen_q, self.head_dim = self.q.shape
        _, kv_heads, self.seqlen_k, self.head_dim_v = self.v.shape
        self.group = self.num_heads // kv_heads
        self.block_d = max(16, next_power_of_2(self.head_dim))
        self.block_dv = max(16, next_power_of_2(self.head_dim_v))
        self.is_varlen = self.cu_seqlens_q is not None
        self.sequences = self.batch if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1
        self.num_programs = self.sequences * self.num_heads

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        phi_q: Tensor | None,
        phi_k: Tensor | None,
        table: Tensor | None,
        code_q: Tensor | None,
        code_k: Tensor | None,
        attn_mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        dropout_seed: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        ranks: list[int],
        scale: float,
        window_left: int,
        window_right: int,
        bottom_right: bool,
        dropout_p: float,
        handed: Handed | None = None,
    ) -> Self:
        """Flatten; arguments as in the operators' schema. Factors are packed when they are asked for.

        `handed` is where the forward pass leaves them and the backward pass finds them.
        """
        full = query.shape[:-2]
        everyone = _everyone(math.prod(full))
        per_head_ranks, sharing_q, sharing_k = None, everyone, everyone
        if phi_q is not None and phi_k is not None:
            sharing_q, sharing_k = _shared(full, phi_q.shape[:-2]), _shared(full, phi_k.shape[:-2])
            if ranks:
                every_head = tuple(ranks) * (query.shape[-3] // len(ranks))
                per_head_ranks = on_device(every_head, query.device, torch.int32)
        mask, sharing_mask = None, everyone
        if attn_mask is not None:
            mask = flatten_heads(attn_mask).view(torch.uint8)
            sharing_mask = _shared(full, attn_mask.shape[:-2])
        return cls(
            cls.readable(query),
            cls.readable(key),
            cls.readable(value),
            phi_q,
            phi_k,
            None if table is None else table.float().contiguous(),
            None if code_q is None else code_q.to(torch.int32).contiguous(),
            None if code_k is None else code_k.to(torch.int32).contiguous(),
            mask,
            cu_seqlens_q,
            cu_seqlens_k,
            dropout_seed,
            per_head_ranks,
            sharing_q,
            sharing_k,
            sharing_mask,
            max_seqlen_q,
            max_seqlen_k,
            scale,
            window_left,
            window_right,
            bottom_right,
            dropout_p,
            handed,
        )

    @staticmethod
    def readable(x: Tensor) -> Tensor:
        """`[B, H, N, D]` as the kernels can read it; a view where strides allow it."""
        return flattened(x)

    @functools.cached_property
    def factors(self) -> Factors | None:
        """The factors as the kernels read them; a call that ends in other kernels never packs them."""
        if self.phi_q is None or self.phi_k is None:
            return None
        return self.factors_type.of(
            self.phi_q, self.phi_k, self.scale, self.q.dtype, centred=not self.is_varlen, handed=self.handed
        )

    # ---------------------------------------------------------------- sizes

    @property
    def is_half(self) -> bool:
        """Whether queries are float16 or bfloat16."""
        return self.q.dtype != torch.float32

    @property
    def needs_two_parts(self) -> bool:
        """Whether gradients of packed factors need their second part too (float16 resolves more than bfloat16)."""
        return self.q.dtype == torch.float16 and self.factors is not None and self.factors.terms > 1

    @property
    def has_extras(self) -> bool:
        """Whether scores get more than factors: a table, a user's mask, dropout, offsets of tiles, packed batches."""
        tiled = self.factors is not None and self.factors.tile_centred
        return tiled or self.table is not None or self.mask is not None or self.dropout_p > 0 or self.is_varlen

    @property
    def precision(self) -> str:
        """How float32 operands are multiplied: three TF32 products stand for one, but not in the widest heads."""
        is_split = self.is_half or max(self.block_d, self.block_dv) <= WIDEST_SPLIT
        return "tf32x3" if is_split and torch.version.hip is None else "ieee"

    def has_edge(self, length: int, block: int) -> bool:
        """Whether a walk over `length` in steps of `block` meets tiles that need bounds or masks."""
        banded = self.window_left >= 0 or self.window_right >= 0
        return banded or self.is_varlen or self.mask is not None or length % block != 0

    def walk(self, sharing: Sharing) -> Sharing:
        """Sharing among all (sequence, head) pairs; sequences of a packed batch never share a factor's rows."""
        if not self.is_varlen:
            return sharing
        return Sharing(self.sequences * sharing.v1, sharing.s1, sharing.v2, sharing.s2)

    def flat(self, x: Tensor) -> Tensor:
        """A tensor of the queries' leading shape as `[B, H, N, D]`, without a copy."""
        return x if x.dim() == 4 else x.view(math.prod(x.shape[:-3]), *x.shape[-3:])

    def key_splits(self, blocks: int, block_n: int) -> tuple[int, int]:
        """Parts into which the key range is split so that few queries still fill the GPU, and their size."""
        programs = blocks * self.num_programs
        tiles = cdiv(self.max_seqlen_k, block_n)
        if self.is_varlen or self.max_seqlen_q > 64 or tiles < 8:
            return 1, self.seqlen_k
        splits = min(64, tiles // 4, 2 * multiprocessors(self.q.device) // programs)
        if splits <= 1:
            return 1, self.seqlen_k
        size = cdiv(tiles, splits) * block_n
        return cdiv(self.seqlen_k, size), size

    # ---------------------------------------------------------------- kernel arguments

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What every kernel takes, by name; made once for all launches of a pass."""
        return {**self._tensors(), **self._strides(), **self._numbers(), **self._flags()}

    def _tensors(self) -> dict[str, Tensor | None]:
        """Pointers."""
        factors = self.factors
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "phi_q_ptr": None if factors is None else factors.phi_q,
            "phi_k_ptr": None if factors is None else factors.phi_k,
            "raw_phi_q_ptr": None if factors is None else factors.raw_q,
            "raw_phi_k_ptr": None if factors is None else factors.raw_k,
            "ranks_ptr": self.ranks_per_head,
            "table_ptr": self.table,
            "code_q_ptr": self.code_q,
            "code_k_ptr": self.code_k,
            "mask_ptr": self.mask,
            "cu_q_ptr": self.cu_seqlens_q,
            "cu_k_ptr": self.cu_seqlens_k,
            "seed_ptr": self.dropout_seed,
        }

    def _strides(self) -> dict[str, int]:
        """Strides, in elements."""
        factors, (mask_f, mask_m, mask_n) = self.factors, self._mask_strides()
        result = {
            **strides_of("q", self.q),
            **strides_of("k", self.k),
            **strides_of("v", self.v),
            # The log-sum-exp of (batch, head) lies at a row of its own, that of packed tokens at the head's row.
            "stride_lse": self.seqlen_q,
            "stride_table": self.table.stride(0) if self.table is not None and self.table.shape[0] > 1 else 0,
            "stride_mask_f": mask_f,
            "stride_mask_m": mask_m,
            "stride_mask_n": mask_n,
        }
        return result | (_NO_FACTORS if factors is None else factors.strides())

    def _mask_strides(self) -> tuple[int, ...]:
        if self.mask is None:
            return 0, 0, 0
        return tuple(0 if size == 1 else step for size, step in zip(self.mask.shape, self.mask.stride(), strict=True))

    def _numbers(self) -> dict[str, int | float]:
        """Sizes, and what scores are multiplied by."""
        factors = self.factors
        pq_s1, pq_v2, pq_s2 = self.sharing_q.sizes
        pk_s1, pk_v2, pk_s2 = self.sharing_k.sizes
        mask_s1, mask_v2, mask_s2 = self.sharing_mask.sizes
        return {
            "num_heads": self.num_heads,
            "group": self.group,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "columns": 0 if factors is None else factors.columns,
            "rank": 0 if factors is None else factors.rank,
            "half": 0 if self.table is None else self.table.shape[1] // 2,
            "left": self.window_left,
            "right": self.window_right,
            "scale": self.scale,
            "inv_scale": 1.0 / self.scale,
            "dropout_p": self.dropout_p,
            "pq_s1": pq_s1,
            "pq_v2": pq_v2,
            "pq_s2": pq_s2,
            "pk_s1": pk_s1,
            "pk_v2": pk_v2,
            "pk_s2": pk_s2,
            "mask_s1": mask_s1,
            "mask_v2": mask_v2,
            "mask_s2": mask_s2,
        }

    def _flags(self) -> dict[str, Any]:
        """Compile-time constants."""
        factors = self.factors
        interpreted = self.q.device.type == "cpu"
        return {
            "HAS_LEFT": self.window_left >= 0,
            "HAS_RIGHT": self.window_right >= 0,
            "BOTTOM_RIGHT": self.bottom_right,
            "IS_VARLEN": self.is_varlen,
            "HAS_PHI": factors is not None,
            "HAS_RANKS": self.ranks_per_head is not None,
            "PHI_MODE": 0 if factors is None else factors.mode,
            "PHI_CHUNKS": 1 if factors is None else factors.chunks,
            "PADDED_R": factors is not None and factors.columns != factors.block_r * factors.chunks,
            "TILE_CENTRED": factors is not None and factors.tile_centred,
            "CENTRE_TILE": packing.CENTRE_TILE,
            "BLOCK_RANK": 16 if factors is None else next_power_of_2(factors.rank),
            "HAS_TABLE": self.table is not None,
            "HAS_CODES": self.code_q is not None,
            "HAS_MASK": self.mask is not None,
            "HAS_DROPOUT": self.dropout_p > 0.0,
            "PADDED_D": self.head_dim != self.block_d,
            "PADDED_DV": self.head_dim_v != self.block_dv,
            "PRECISION": self.precision,
            "INTERPRETED": interpreted,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "BLOCK_R": 16 if factors is None else factors.block_r,
        }


def flattened(x: Tensor) -> Tensor:
    """`[B, H, N, D]` with unit stride in the last dimension; a view where strides allow it."""
    x = x if x.dim() == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(name: str, x: Tensor) -> dict[str, int]:
    """Strides of `[B, H, N, D]`, as kernels name them."""
    b, h, n, _ = x.stride()
    return {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}n": n}


def walk_sizes(sharing: Sharing) -> dict[str, int]:
    """Sizes of the levels over which a program walks, as kernels name them."""
    s1, v2, s2 = sharing.sizes
    return {"walk_s1": s1, "walk_v2": v2, "walk_s2": s2}


_everyone = functools.lru_cache(maxsize=1024)(Sharing.nothing)


@functools.lru_cache(maxsize=1024)
def _shared(full: torch.Size, own: torch.Size) -> Sharing:
    sharing = share(full, own)
    if sharing is None:
        raise ValueError(f"a factor of leading shape {tuple(own)} alternates too often among {tuple(full)}")
    return sharing
