"""The two forms that a bias takes in language models, and the call of the factored attention.

relative table   table[h, d]: T5, MPNet. The model's own embedding, read once at each distance
per key          b[h, i, j] = 1 * bias[h, j], rank 1: BLOOM, MPT, Falcon. ALiBi up to a constant of the row,
slope_h * (j - i) + slope_h * i, which no probability sees
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashbias.biases.base import position_codes, wide_dtype
from flashbias.biases.buckets import relative_bucket
from flashbias.constants import made_once
from flashbias.factored import FactoredBias
from flashbias.integrations.call import Settings, call
from flashbias.integrations.transformers.masks import visibility

__all__ = ["BucketSettings", "Buckets", "attend", "per_key", "table_bias"]


@dataclass(frozen=True)
class Buckets:
    """The bucket of each distance from `-max_distance` to `max_distance`; beyond, buckets no longer change.

    Args:
        num_buckets: rows of the model's embedding.
        max_distance: distance from which all keys share a bucket.
        bidirectional: tell keys ahead from keys behind.
    """

    num_buckets: int
    max_distance: int
    bidirectional: bool

    @staticmethod
    def unsupported(num_buckets: int, max_distance: int, bidirectional: bool) -> str | None:
        """Say why a table of these buckets would not have constant tails, None if it would."""
        exact = num_buckets // (4 if bidirectional else 2)
        if exact >= 1 and max_distance > exact:
            return None
        return (
            f"relative_attention_num_buckets={num_buckets} and relative_attention_max_distance={max_distance}: "
            f"the distance must exceed the {exact} buckets of one step, of which there must be one"
        )

    def table(self, embedding: nn.Module) -> Tensor:
        """`[H, 2 * max_distance + 1]`, in float32 at least, differentiable with respect to the embedding."""
        device = next(embedding.parameters()).device
        values = embedding(_buckets(self.num_buckets, self.max_distance, self.bidirectional, device))
        return values.to(wide_dtype(values)).mT.contiguous()


@torch.compiler.assume_constant_result
@made_once(maxsize=64)
def _buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    # On the CPU: another device's logarithm may round a bucket's edge the other way.
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    return relative_bucket(distance, num_buckets, max_distance, bidirectional).to(device)


@dataclass
class BucketSettings(Settings):
    """Settings of an attention with an embedding of buckets.

    Args:
        buckets: how the embedding is read; None where there is none.
    """

    buckets: Buckets | None = None


def table_bias(table: Tensor, seqlen_q: int, seqlen_k: int) -> FactoredBias:
    """Read a relative table `[H, T]` with the last query at the last key.

    Args:
        table: `[H, T]`, T odd.
        seqlen_q: N.
        seqlen_k: M.

    Returns:
        A bias of rank 0.
    """
    codes = position_codes(seqlen_q, seqlen_k, query_offset=seqlen_k - seqlen_q, device=table.device)
    return FactoredBias.from_table(table, seqlen_q, seqlen_k, *codes)


def per_key(bias: Tensor, seqlen_q: int) -> FactoredBias:
    """Add one number per head and key.

    Args:
        bias: `[*batch, H, M]`, the model's own numbers: its rounding in half precision is part of the model.
        seqlen_q: N.

    Returns:
        Factors of rank 1; the query's are all one and take no memory.
    """
    return FactoredBias(bias.new_ones(1, 1, 1).expand(1, seqlen_q, 1), bias[..., None])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Compute the attention of a patched module.

    Args:
        module: the attention, patched; dropout acts if it is in training.
        query: `[*batch, H, N, head_dim]`.
        key: `[*batch, H_kv, M, head_dim]`.
        value: `[*batch, H_kv, M, head_dim]`.
        bias: for N queries and M keys, or None.
        mask: as `masks.key_mask` returns it.
        is_causal: whether queries see no later key.
        scale: factor of the dot products.
        dropout_p: probability of dropping an attention weight in training.

    Returns:
        `[*batch, N, H, head_dim]`.
    """
    seen = visibility(mask, query.shape[-2], key.shape[-2], is_causal)
    return call(module, query, key, value, bias, scale=scale, dropout_p=dropout_p, **seen)
