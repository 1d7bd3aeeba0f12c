"""Attention over a sequence whose tokens, or heads, are spread over ranks: factors travel with their tokens."""

from flashbias.distributed.api import context_parallel_attention
from flashbias.distributed.context import ContextParallel, context_parallel
from flashbias.distributed.errors import DisagreementError, RankError
from flashbias.distributed.heads import bias_of_heads, head_parallel_attention, local_heads
from flashbias.distributed.shard import Layout, positions, shard, shard_bias, unshard
from flashbias.distributed.traffic import RingBytes, Traffic, count_traffic

__all__ = [
    "ContextParallel",
    "DisagreementError",
    "Layout",
    "RankError",
    "RingBytes",
    "Traffic",
    "bias_of_heads",
    "context_parallel",
    "context_parallel_attention",
    "count_traffic",
    "head_parallel_attention",
    "local_heads",
    "positions",
    "shard",
    "shard_bias",
    "unshard",
]
