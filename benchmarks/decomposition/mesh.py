"""The motorbike: 132,871 vertices out of a Debian package, fetched once."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from benchmarks.debian import fetched
from torch import Tensor

__all__ = ["box_diagonal", "motorbike", "vertices"]

MOTORBIKE_SHA256 = "d06307675434ac6f1aecd458ae08efeeaae908516dce1d6b4a74db679cebc0a7"


def vertices(obj: Path) -> Tensor:
    """`[N, 3]`, float32: the lines `v x y z` of a gzipped Wavefront file."""
    with gzip.open(obj, "rt") as lines:
        places = [[float(number) for number in line.split()[1:4]] for line in lines if line.startswith("v ")]
    return torch.tensor(places)


def box_diagonal(x: Tensor) -> float:
    """Diagonal of the smallest box with all vertices."""
    return float((x.amax(0) - x.amin(0)).norm())


def motorbike() -> Path:
    """The mesh in the cache folder; fetched and checked if it is not there."""
    return fetched("openfoam-examples", "motorBike.obj.gz", MOTORBIKE_SHA256)
