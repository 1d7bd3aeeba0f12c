"""Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation.

https://arxiv.org/abs/2108.12409

Causal (keys at or before the query):

    b[h, i, j]  = slope_h * (j - i)           never positive: the nearer the key, the larger
    phi_q[h, i] = [-slope_h * i, slope_h]
    phi_k[j]    = [1, j]                      shared by all heads
    rank        = 2
    exactness   : positions are exact in float32 up to 2^24; slope_h * i is rounded once. That rounding is
                  the same for every key of a query, so no attention weight sees it.

Symmetric (encoders):

    b[h, i, j]  = -slope_h * |i - j|          through the relative table: |d| is not of low rank
    table[h, d] = -slope_h * |d|              2N - 1 entries for N queries and N keys
    rank        = 0
    exactness   : slope_h * |d| is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashbias.biases.base import About, Bias, Example, check_positions, position_codes
from flashbias.factored import FactoredBias

__all__ = ["Alibi", "alibi_slopes"]

LARGEST_EXACT_FLOAT32 = 2**24
"""Up to here, every integer is a float32."""


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the official slope of every head.

    For n heads, n a power of two: `slope_h = 2^(-8 (h+1) / n)`. Otherwise the slopes of the next smaller
    power of two, followed by every other slope of the next larger one.

    Args:
        num_heads: the model's number of heads; not the number on one shard of it.

    Returns:
        `[num_heads]`, float32.

    Raises:
        ValueError: `num_heads` is not positive.

    Examples:
        >>> import flashbias as fb
        >>> fb.biases.alibi_slopes(3)
        tensor([0.0625, 0.0039, 0.2500])

    Reference:
        Press et al., https://arxiv.org/abs/2108.12409, section 3, and the authors' code for other counts.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive, got {num_heads}")
    power = 2 ** int(math.log2(num_heads))
    slopes = _geometric_slopes(power) + _geometric_slopes(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32)


def _geometric_slopes(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]


class Alibi(Bias):
    """Attention with linear biases: a penalty that grows with the distance, at one slope per head.

    Formula: `b[h, i, j] = slope_h * (j - i)`, or `-slope_h * |i - j|` if symmetric.

    Use the causal form with `is_causal=True`; it costs two columns. The symmetric form costs a table of
    `seqlen_q + seqlen_k - 1` entries per head (for queries and keys that start together).

    Args:
        num_heads: number of heads of the whole model, from which the official slopes follow.
        slopes: `[num_heads]` numbers to use in place of the official ones; kept as float32 constants.
        symmetric: penalise `|i - j|` rather than `i - j`.
        heads: which heads this module stands for, as indices into the whole model's; default all. A shard
            of a tensor-parallel model says `heads=range(start, stop)`.

    Raises:
        ValueError: `slopes` has another length than `num_heads` or needs a gradient; `heads` is empty or
            out of range.

    Examples:
        >>> import flashbias as fb
        >>> bias = fb.Alibi(num_heads=8)(seqlen_q=3, seqlen_k=3)
        >>> bias.rank, bias.dense()[0, 2]
        (2, tensor([-1.0000, -0.5000,  0.0000]))

    Reference:
        Press et al., https://arxiv.org/abs/2108.12409.
    """

    about = About(
        title="Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        url="https://arxiv.org/abs/2108.12409",
        formula="slope_h * (j - i), or -slope_h * |i - j|",
        rank="2 (symmetric: 0, a table)",
        exactness="slope * position is rounded once, to float32",
        bound=2.0**-24,
    )

    def __init__(
        self,
        num_heads: int,
        slopes: Tensor | Sequence[float] | None = None,
        symmetric: bool = False,
        heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__(num_heads)
        chosen = list(range(num_heads) if heads is None else heads)
        if not chosen or min(chosen) < 0 or max(chosen) >= num_heads:
            raise ValueError(f"heads must be indices into 0 … {num_heads - 1}, and at least one, got {heads}")
        self.num_heads = len(chosen)
        self.symmetric = symmetric
        every = alibi_slopes(num_heads) if slopes is None else torch.as_tensor(slopes)
        if every.shape != (num_heads,):
            raise ValueError(f"slopes must have shape ({num_heads},), got {tuple(every.shape)}")
        if every.requires_grad:
            raise ValueError("slopes are constants and must not require a gradient; detach them")
        self.register_constant("slopes", every.to(torch.float32)[chosen])

    @property
    def slopes(self) -> Tensor:
        """`[H]` float32, on the module's device, whatever dtype the module was cast to."""
        return self.constant("slopes").to(torch.float32)

    def forward(
        self,
        seqlen_q: int,
        seqlen_k: int,
        query_offset: int = 0,
        key_offset: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FactoredBias:
        """Make the bias between two runs of consecutive positions.

        Args:
            seqlen_q: N.
            seqlen_k: M.
            query_offset: position of the first query; `M - 1` when one query is decoded after M keys.
            key_offset: position of the first key.
            device: where the factors live; default where the module lives.
            dtype: float32 or float64.

        Returns:
            phi_q `[H, N, 2]` and phi_k `[1, M, 2]`; if symmetric, a table of rank 0.

        Raises:
            ValueError: a half-precision `dtype`, or positions beyond 2^24 in float32.
        """
        device = self.slopes.device if device is None else torch.device(device)
        first, last = min(query_offset, key_offset), max(query_offset + seqlen_q, key_offset + seqlen_k)
        self._check_positions(max(-first, last - 1), dtype)
        if not self.symmetric:
            position_q = torch.arange(query_offset, query_offset + seqlen_q, device=device)
            position_k = torch.arange(key_offset, key_offset + seqlen_k, device=device)
            return self._low_rank(position_q, position_k, dtype)
        reach = max(query_offset + seqlen_q - 1 - key_offset, key_offset + seqlen_k - 1 - query_offset, 0)
        codes = position_codes(seqlen_q, seqlen_k, query_offset, key_offset, device)
        return FactoredBias.from_table(self._table(reach, device, dtype), seqlen_q, seqlen_k, *codes)

    def at(self, position_q: Tensor, position_k: Tensor, dtype: torch.dtype = torch.float32) -> FactoredBias:
        """Make the bias between any positions: packed sequences, reordered shards.

        Args:
            position_q: `[N]` integers.
            position_k: `[M]` integers.
            dtype: float32 or float64.

        Returns:
            As `forward` does. The symmetric form reads the largest distance, which synchronises a GPU.

        Raises:
            TypeError: positions are not tensors of integers.
            ValueError: positions are not vectors, or `dtype` is a half.
        """
        check_positions(position_q=position_q, position_k=position_k)
        self._check_positions(0, dtype)
        if not self.symmetric:
            return self._low_rank(position_q, position_k, dtype)
        position_q, position_k = position_q.long(), position_k.long()  # their difference may not fit a narrow dtype
        reach = 0
        if len(position_q) and len(position_k):
            apart = torch.stack([position_k.max() - position_q.min(), position_q.max() - position_k.min()])
            reach = int(apart.max())
        table = self._table(reach, position_q.device, dtype)
        return FactoredBias.from_table(table, len(position_q), len(position_k), position_q, position_k)

    def _low_rank(self, position_q: Tensor, position_k: Tensor, dtype: torch.dtype) -> FactoredBias:
        slope = self.slopes.to(position_q.device, dtype)[:, None]
        i, j = position_q.to(dtype), position_k.to(dtype)
        phi_q = torch.stack([-slope * i, slope.expand(-1, i.shape[0])], dim=-1)
        phi_k = torch.stack([torch.ones_like(j), j], dim=-1)
        return FactoredBias(phi_q, phi_k[None])

    def _table(self, reach: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        distance = torch.arange(-reach, reach + 1, device=device).abs().to(dtype)
        return -self.slopes.to(device, dtype)[:, None] * distance

    @staticmethod
    def _check_positions(largest: int, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64 (a half rounds positions), got {dtype}")
        if dtype == torch.float32 and largest > LARGEST_EXACT_FLOAT32:
            raise ValueError(
                f"position {largest} is beyond {LARGEST_EXACT_FLOAT32}, the last that float32 holds "
                "exactly; ask for dtype=torch.float64, or give offsets relative to a nearer origin"
            )

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, symmetric={self.symmetric}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Causal and symmetric; a power of two and another; offsets; a shard."""

        def example(name: str, bias: Alibi, n: int, m: int, offsets: tuple[int, int] = (0, 0)) -> Example:
            query_offset, key_offset = offsets

            def build(bias: Alibi, queries: range, keys: range) -> FactoredBias:
                return bias(len(queries), len(keys), query_offset + queries.start, key_offset + keys.start)

            def dense(bias: Alibi) -> Tensor:
                i = torch.arange(n, dtype=torch.float64)[:, None] + query_offset
                j = torch.arange(m, dtype=torch.float64)[None, :] + key_offset
                distance = -(i - j).abs() if bias.symmetric else j - i
                return bias.slopes.cpu().double()[:, None, None] * distance

            return Example(name, bias, n, m, build, dense)

        return [
            example("causal", cls(8), 13, 17),
            example("decode", cls(12), 1, 33, (32, 0)),
            example("far", cls(20), 7, 9, (1_048_570, 1_048_500)),
            example("shard", cls(12, heads=range(4, 8)), 5, 5),
            example("symmetric", cls(6, symmetric=True), 9, 14, (3, 0)),
        ]
