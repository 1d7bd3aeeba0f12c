"""Attention of protein models whose scores carry a pair bias: functions in the shapes that they use, families to patch.

`triangle.py` holds the functions, `pairs.py` what families with a bias of their pairs share. Every other file is a
family, which `patch` finds; nothing here imports its library.
"""

from __future__ import annotations

from flashbias.integrations.protein.pairs import PairCalls, pair_bias_calls
from flashbias.integrations.protein.triangle import pair_bias_attention, triangle_attention

__all__ = ["PairCalls", "pair_bias_attention", "pair_bias_calls", "triangle_attention"]
