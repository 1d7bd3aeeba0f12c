"""Attention with a factored bias: the public call, its oracle, and its implementations."""

from flashbias.attention.api import attention, varlen_attention
from flashbias.attention.choice import Explanation, explain, implementations
from flashbias.attention.multiplicative import multiplicative_attention

__all__ = [
    "Explanation",
    "attention",
    "explain",
    "implementations",
    "multiplicative_attention",
    "varlen_attention",
]
