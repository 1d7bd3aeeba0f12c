"""flashbias: attention with an additive bias at the price of attention without one."""

from flashbias.attention import (
    Explanation,
    attention,
    explain,
    implementations,
    multiplicative_attention,
    varlen_attention,
)
from flashbias.attention.plan import Plan, plan
from flashbias.attention.workload import TableSize, Workload
from flashbias.biases import (
    Alibi,
    CosineDifference,
    EarthSpecificBias,
    RegionMask,
    RelativeBuckets,
    ShiftedWindowMask,
    SquaredDistance,
    WindowBias,
)
from flashbias.decompose import (
    CrossReport,
    DistillReport,
    HeadReport,
    LowRankBias,
    NeuralBias,
    NotLowRankError,
    Report,
    compress,
    compress_function,
    distill,
)
from flashbias.factored import FactoredBias
from flashbias.integrations import PatchReport, patch, supports, unpatch
from flashbias.mixed import MixedBias
from flashbias.store import load, save
from flashbias.version import __version__ as __version__

__all__ = [
    "Alibi",
    "CosineDifference",
    "CrossReport",
    "DistillReport",
    "EarthSpecificBias",
    "Explanation",
    "FactoredBias",
    "HeadReport",
    "LowRankBias",
    "MixedBias",
    "NeuralBias",
    "NotLowRankError",
    "PatchReport",
    "Plan",
    "RegionMask",
    "RelativeBuckets",
    "Report",
    "ShiftedWindowMask",
    "SquaredDistance",
    "TableSize",
    "WindowBias",
    "Workload",
    "attention",
    "compress",
    "compress_function",
    "distill",
    "explain",
    "implementations",
    "load",
    "multiplicative_attention",
    "patch",
    "plan",
    "save",
    "supports",
    "unpatch",
    "varlen_attention",
]
