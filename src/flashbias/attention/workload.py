"""`Workload`: the attention whose time is asked for, and `TableSize`, how large a relative table is."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

__all__ = ["TableSize", "Training", "Workload", "round_up"]

Training = Literal["none", "frozen", "bias"]
Length = TypeVar("Length", int, np.ndarray)


@dataclass(frozen=True)
class Workload:
    """The attention whose time is asked for.

    Args:
        num_heads: H, at least 1.
        seqlen_q: N, at least 1.
        seqlen_k: M, at least 1.
        head_dim: width of queries and keys.
        head_dim_v: width of values; None for `head_dim`.
        batch: product of all batch dimensions.
        is_causal: whether keys after the query are hidden.
        shared_bias: True: one bias for the whole batch; False: each element has its own; an integer: so many
            different biases, of which `batch` is a multiple.
        training: "none" (forward only), "frozen" (forward and backward, no gradient to the bias) or "bias"
            (with one).
        dtype: of queries, keys and values.
        factor_dtype: of factors. Two half-precision factors beside half-precision queries are used as they are,
            float32 ones are split into several products.
        causal_alignment: "bottom_right" or "top_left"; matters only for a causal mask with N != M.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size below 1, an unknown name, a batch that is no multiple of the number of biases.

    Examples:
        >>> Workload(num_heads=8, seqlen_q=1024, seqlen_k=1024, head_dim=64, is_causal=True).training
        'none'
    """

    num_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int | None = None
    batch: int = 1
    is_causal: bool = False
    shared_bias: bool | int = False
    training: Training = "none"
    dtype: torch.dtype = torch.bfloat16
    factor_dtype: torch.dtype = torch.float32
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right"

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("num_heads", "seqlen_q", "seqlen_k", "head_dim", "batch"):
            _check_size(name, getattr(self, name))
        if self.head_dim_v is not None:
            _check_size("head_dim_v", self.head_dim_v)
        if self.training not in get_args(Training):
            raise ValueError(f"training must be one of {', '.join(get_args(Training))}, got {self.training!r}")
        if self.causal_alignment not in ("bottom_right", "top_left"):
            raise ValueError(f"causal_alignment must be bottom_right or top_left, got {self.causal_alignment!r}")
        for name in ("dtype", "factor_dtype"):
            dtype = getattr(self, name)
            if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise TypeError(f"{name} must be a floating point dtype, got {dtype!r}")
        if not isinstance(self.is_causal, bool):
            raise TypeError(f"is_causal must be a bool, got {self.is_causal!r}")
        if not isinstance(self.shared_bias, int):
            raise TypeError(f"shared_bias must be a bool or a number of biases, got {self.shared_bias!r}")
        if self.shared_bias < 0:
            raise ValueError(f"shared_bias must be a bool or a number of biases >= 1, got {self.shared_bias}")
        if self.batch % self.biases:
            raise ValueError(f"batch must be a multiple of the {self.biases} biases in shared_bias, got {self.batch}")

    @property
    def value_dim(self) -> int:
        """Width of values and output."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def biases(self) -> int:
        """How many different biases the batch has (for each head)."""
        return int(self.shared_bias) or self.batch

    @property
    def matrix_bytes(self) -> int:
        """Size of the dense bias in the queries' dtype, all heads."""
        return self.biases * self.num_heads * self.seqlen_q * self.seqlen_k * self.dtype.itemsize

    def pairs(
        self, tile: int, *, causal: bool | None = None, step: int | None = None, half_width: int | None = None
    ) -> int:
        """Score pairs of one head and batch element that are worked through.

        Args:
            tile: side of a tile of scores; both lengths are padded to a multiple of it.
            causal: whether keys that a causal mask hides are left out; default `is_causal`.
            step: keys that are left out together, for a block of queries; default `tile`.
            half_width: count only tiles with a difference j - i above -half_width and one below half_width.

        Returns:
            The number of pairs.
        """
        causal = self.is_causal if causal is None else causal
        shift = self.seqlen_k - self.seqlen_q if self.causal_alignment == "bottom_right" else 0
        return _tile_pairs(self.seqlen_q, self.seqlen_k, tile, step or tile, shift if causal else None, half_width)


@dataclass(frozen=True)
class TableSize:
    """Size of a relative table.

    Args:
        entries: T, odd.
        local: whether codes are positions, so that tiles away from the diagonal read one constant. Codes of
            windows in two or three dimensions are looked up everywhere.
        half_width: tiles with |j - i| < half_width look entries up; default `T // 2`.
    """

    entries: int
    local: bool = True
    half_width: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        _check_size("entries", self.entries)
        if self.entries % 2 == 0:
            raise ValueError(f"entries must be odd, got {self.entries}")
        if self.half_width is not None and not (isinstance(self.half_width, int) and self.half_width >= 0):
            raise ValueError(f"half_width must be None or an integer >= 0, got {self.half_width!r}")

    @property
    def near(self) -> int | None:
        """Half width of the band in which entries are read, None for everywhere."""
        if not self.local:
            return None
        return self.entries // 2 if self.half_width is None else self.half_width


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@functools.lru_cache(maxsize=256)
def _tile_pairs(seqlen_q: int, seqlen_k: int, tile: int, step: int, shift: int | None, half_width: int | None) -> int:
    first = np.arange(0, seqlen_q, tile, dtype=np.int64)  # query of every block of rows
    last = first + tile - 1
    start, stop = np.zeros_like(first), np.full_like(first, round_up(seqlen_k, tile))  # keys of the block
    if shift is not None:
        stop = np.minimum(stop, round_up(last + 1 + shift, step))
    if half_width is not None:
        start = np.maximum(start, round_up(first - half_width - tile + 2, tile))
        stop = np.minimum(stop, round_up(last + half_width, tile))
    return int(np.maximum(stop - start, 0).sum()) * tile


def round_up(length: Length, multiple: int) -> Length:
    """The next multiple of a number, or of each number of an array."""
    return -(-length // multiple) * multiple
