"""From a tensor, a function or a network to factors: certified, learned, or distilled."""

from flashbias.decompose.compress import compress
from flashbias.decompose.cross import CrossReport, compress_function
from flashbias.decompose.distill import DistillReport, distill
from flashbias.decompose.learned import LowRankBias
from flashbias.decompose.neural import NeuralBias
from flashbias.decompose.report import HeadReport, NotLowRankError, Report

__all__ = [
    "CrossReport",
    "DistillReport",
    "HeadReport",
    "LowRankBias",
    "NeuralBias",
    "NotLowRankError",
    "Report",
    "compress",
    "compress_function",
    "distill",
]
