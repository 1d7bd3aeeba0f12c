"""Tile shapes for each pass. Chosen by head dimension, dtype and GPU, never by the exact length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashbias.attention.triton.operands import Operands

__all__ = ["Config", "choose"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, depth of its load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def choose(name: str, ops: Operands) -> Config:
    """Pick the tile shape of a pass ("forward", "dkdv", "dq", "dtable", "window").

    Args:
        name: the pass.
        ops: the call.

    Returns:
        The configuration.
    """
    if ops.q.device.type == "cpu":
        return Config(16, 16, 4, 1)
    return Config(64, 64, 4, 2)
