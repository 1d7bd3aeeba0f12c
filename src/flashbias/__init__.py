"""flashbias: attention with an additive bias at the price of attention without one."""

from flashbias.attention import (
    Explanation,
    attention,
    explain,
    implementations,
    multiplicative_attention,
    varlen_attention,
)
from flashbias.biases import Alibi, CosineDifference, RelativeBuckets, SquaredDistance, WindowBias
from flashbias.factored import FactoredBias
from flashbias.mixed import MixedBias

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "CosineDifference",
    "Explanation",
    "FactoredBias",
    "MixedBias",
    "RelativeBuckets",
    "SquaredDistance",
    "WindowBias",
    "attention",
    "explain",
    "implementations",
    "multiplicative_attention",
    "varlen_attention",
]
