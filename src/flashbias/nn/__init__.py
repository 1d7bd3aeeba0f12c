"""Layers for new models, built of the library's biases and attention."""

from __future__ import annotations

from flashbias.nn.spatial import SpatialBiasAttention, SpatialTransformerLayer

__all__ = ["SpatialBiasAttention", "SpatialTransformerLayer"]
