"""Attention of protein models whose scores carry a pair bias, in the shapes that they use."""

from __future__ import annotations

from flashbias.integrations.protein.triangle import pair_bias_attention, triangle_attention

__all__ = ["pair_bias_attention", "triangle_attention"]
