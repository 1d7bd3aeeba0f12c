"""Exact bias families, one per file. A call turns positions or coordinates into a `FactoredBias`."""

from __future__ import annotations

from flashbias.biases.alibi import Alibi, alibi_slopes
from flashbias.biases.base import About, Bias, Example, registry
from flashbias.biases.buckets import RelativeBuckets, relative_bucket
from flashbias.biases.cosine import CosineDifference
from flashbias.biases.distance import SquaredDistance
from flashbias.biases.earth import EarthSpecificBias
from flashbias.biases.regions import RegionMask, ShiftedWindowMask
from flashbias.biases.sum import Sum
from flashbias.biases.window import WindowBias

__all__ = [
    "About",
    "Alibi",
    "Bias",
    "CosineDifference",
    "EarthSpecificBias",
    "Example",
    "RegionMask",
    "RelativeBuckets",
    "ShiftedWindowMask",
    "SquaredDistance",
    "Sum",
    "WindowBias",
    "alibi_slopes",
    "registry",
    "relative_bucket",
]


def __getattr__(name: str) -> type[Bias]:
    """Find a family that only its own file names."""
    if not name.startswith("_") and name in (families := registry()):
        return families[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
