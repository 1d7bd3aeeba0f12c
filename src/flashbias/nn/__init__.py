"""Layers for new models, built of the library's biases and attention."""

from __future__ import annotations

from flashbias.nn.biased import BiasedSelfAttention
from flashbias.nn.spatial import SpatialBiasAttention, SpatialTransformerLayer

__all__ = ["BiasedSelfAttention", "SpatialBiasAttention", "SpatialTransformerLayer"]
