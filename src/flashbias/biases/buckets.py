"""Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (T5).

https://arxiv.org/abs/1910.10683; MPNet (https://arxiv.org/abs/2004.09297) uses the same buckets.

    b[h, i, j]  = weight[bucket(j - i), h]
    table[h, d] = weight[bucket(d), h]        for |d| <= max_distance; beyond it, bucket(d) no longer changes,
                                              which is what the constant tails of a table mean
    phi_q, phi_k: none
    rank        = 0
    exactness   : equal to the bit, at any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashbias.biases.base import About, Bias, Example, check_positions, position_codes, wide_dtype
from flashbias.factored import FactoredBias

__all__ = ["RelativeBuckets", "relative_bucket"]


def relative_bucket(
    distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """Number the bucket of each signed distance, as T5 and MPNet do.

    With B buckets per direction, distances below B/2 have a bucket each; from there to `max_distance`
    buckets widen logarithmically; all further distances share the last one.

    Args:
        distance: integers, position of the key minus position of the query.
        num_buckets: number of buckets; both directions share them evenly.
        max_distance: from here on, everything is in the last bucket.
        bidirectional: tell keys ahead from keys behind. Otherwise every key ahead is in bucket 0.

    Returns:
        int64 in `0 … num_buckets - 1`, of the same shape.

    Raises:
        TypeError: distances are not integers.
        ValueError: too few buckets for one of a single step, or a `max_distance` within the range of those.

    Note:
        The logarithm is taken in float32, as the models' own code does: at 16, 32 and 64 it lands on an
        integer, and rounding decides the bucket.

    Examples:
        >>> import torch, flashbias as fb
        >>> fb.biases.relative_bucket(torch.tensor([-200, -9, -1, 0, 1, 9, 200]))
        tensor([15,  8,  1,  0, 17, 24, 31])

    Reference:
        Raffel et al., https://arxiv.org/abs/1910.10683, section 2.1.
    """
    per_direction = num_buckets // 2 if bidirectional else num_buckets
    exact = per_direction // 2
    if distance.is_floating_point():
        raise TypeError(f"distance must be integers, got {distance.dtype}")
    if exact < 1:
        raise ValueError(f"num_buckets must be at least {4 if bidirectional else 2}, got {num_buckets}")
    if max_distance <= exact:
        raise ValueError(f"max_distance must exceed {exact} (half a direction's buckets), got {max_distance}")
    distance = distance.to(torch.int64)
    is_ahead = distance > 0
    steps = distance.abs() if bidirectional else distance.clamp(max=0).neg()
    fraction = torch.log(steps.float() / exact) / math.log(max_distance / exact)
    wide = exact + (fraction.clamp(min=0) * (per_direction - exact)).to(torch.int64)
    bucket = torch.where(steps < exact, steps, wide.clamp(max=per_direction - 1))
    return bucket + is_ahead * per_direction if bidirectional else bucket


class RelativeBuckets(Bias):
    """A learned bias per bucket of relative positions: T5, MPNet and their kin.

    Formula: `b[h, i, j] = weight[bucket(j - i), h]`.

    Exact at any length through a table of `2 * max_distance + 1` entries per head; tiles of the score
    matrix that lie further than `max_distance` from the diagonal cost one constant. T5 attends without
    scaling: pass `scale=1.0` to the attention.

    Args:
        num_heads: H.
        num_buckets: number of buckets.
        max_distance: distance from which all keys share a bucket.
        bidirectional: encoders True, decoders False.

    Attributes:
        weight: `[num_buckets, H]`, the layout of the models' own embedding.

    Raises:
        ValueError: too few buckets, an odd number of them for two directions, or a `max_distance` within
            the range of the one-step buckets.

    Examples:
        >>> import flashbias as fb
        >>> bias = fb.RelativeBuckets(num_heads=12)(seqlen_q=512, seqlen_k=512)
        >>> bias.rank, bias.table.shape
        (0, torch.Size([12, 257]))

    Reference:
        Raffel et al., https://arxiv.org/abs/1910.10683; Song et al., https://arxiv.org/abs/2004.09297.
    """

    about = About(
        title="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        url="https://arxiv.org/abs/1910.10683",
        formula="weight[bucket(j - i), h]",
        rank="0, a table of 2 max_distance + 1 entries",
        exactness="equal to the bit, at any length",
        bound=0.0,
    )

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__(num_heads)
        if num_buckets < (4 if bidirectional else 2) or (bidirectional and num_buckets % 2):
            allowed = "even and at least 4 for both directions" if bidirectional else "at least 2"
            raise ValueError(f"num_buckets must be {allowed}, got {num_buckets}")
        exact = num_buckets // (4 if bidirectional else 2)
        if max_distance <= exact:
            raise ValueError(f"max_distance must exceed {exact} (half a direction's buckets), got {max_distance}")
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        # Always on the CPU first: another device's logarithm may round a bucket's edge the other way.
        self.register_buffer("bucket", torch.empty(2 * max_distance + 1, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, and fill in the buckets (needed after `to_empty`)."""
        nn.init.normal_(self.weight, std=0.02)
        distance = torch.arange(-self.max_distance, self.max_distance + 1, device="cpu")
        bucket = relative_bucket(distance, self.num_buckets, self.max_distance, self.bidirectional)
        self.get_buffer("bucket").copy_(bucket)

    def forward(self, seqlen_q: int, seqlen_k: int, query_offset: int = 0, key_offset: int = 0) -> FactoredBias:
        """Make the bias between two runs of consecutive positions.

        Args:
            seqlen_q: N.
            seqlen_k: M.
            query_offset: position of the first query; `M - 1` when one query is decoded after M keys.
            key_offset: position of the first key.

        Returns:
            A table `[H, 2 * max_distance + 1]`, differentiable with respect to `weight`.
        """
        codes = position_codes(seqlen_q, seqlen_k, query_offset, key_offset, self.weight.device)
        return FactoredBias.from_table(self.table(), seqlen_q, seqlen_k, *codes)

    def at(self, position_q: Tensor, position_k: Tensor) -> FactoredBias:
        """Make the bias between any positions: packed sequences, reordered shards.

        Args:
            position_q: `[N]` integers.
            position_k: `[M]` integers.

        Returns:
            As `forward` does.

        Raises:
            TypeError: positions are not tensors of integers.
            ValueError: positions are not vectors.
        """
        check_positions(position_q=position_q, position_k=position_k)
        return FactoredBias.from_table(self.table(), len(position_q), len(position_k), position_q, position_k)

    def table(self) -> Tensor:
        """`[H, 2 * max_distance + 1]`: the bias at each distance, in float32 at least."""
        return self.weight.to(wide_dtype(self.weight))[self.get_buffer("bucket")].mT.contiguous()

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, "
            f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"
        )

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Both directions and one, shorter and longer than `max_distance`, with and without offsets."""

        def example(name: str, bias: RelativeBuckets, n: int, m: int, query_offset: int = 0) -> Example:
            def build(bias: RelativeBuckets, queries: range, keys: range) -> FactoredBias:
                return bias(len(queries), len(keys), query_offset + queries.start, keys.start)

            def dense(bias: RelativeBuckets) -> Tensor:
                distance = torch.arange(m)[None, :] - torch.arange(n)[:, None] - query_offset
                bucket = relative_bucket(distance, bias.num_buckets, bias.max_distance, bias.bidirectional)
                return bias.weight.double()[bucket.to(bias.weight.device)].permute(2, 0, 1)

            return Example(name, bias, n, m, build, dense)

        return [
            example("bidirectional", cls(3, 8, 16), 40, 50),
            example("causal", cls(2, 6, 20, bidirectional=False), 12, 45, query_offset=33),
            example("short", cls(2), 5, 7),
        ]
