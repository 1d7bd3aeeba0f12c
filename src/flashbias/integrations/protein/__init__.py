"""Attention of protein models whose scores carry a pair bias: functions in the shapes that they use, families to patch.

`triangle.py` holds the functions. Every other file is a family, which `patch` finds; nothing here imports its library.
"""

from __future__ import annotations

from flashbias.integrations.protein.triangle import pair_bias_attention, triangle_attention

__all__ = ["pair_bias_attention", "triangle_attention"]
