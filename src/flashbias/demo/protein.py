"""The protein 2XHE and its crystal, as C-alpha coordinates.

Primordial neurosecretory apparatus identified in the choanoflagellate Monosiga brevicollis.
https://doi.org/10.1073/pnas.1106189108, PDB entry https://doi.org/10.2210/pdb2XHE/pdb (CC0).

A crystal repeats its protein by the operators of its space group and by the translations of its unit cell,
so a larger assembly is made of true neighbours: nothing is invented, and no two copies overlap.
"""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUM_RESIDUES", "crystal"]

NUM_RESIDUES = 786
"""Residues of one copy: 566 of Unc18 and 220 of syntaxin 1."""

CELLS = 3
"""Unit cells to each side that copies are taken from."""

MAX_COPIES = 512
"""Beyond this number, copies at the rim of `CELLS` would be missing."""


def crystal(copies: int = 1) -> NDArray[np.float64]:
    """Return the C-alpha coordinates of the protein and of its nearest neighbours in the crystal.

    Args:
        copies: how many copies of the protein, itself included; 1 to 512.

    Returns:
        `[786 * copies, 3]` in ångström, the original first, then the others by distance of their centres.

    Raises:
        ValueError: `copies` is out of range.

    Examples:
        >>> from flashbias.demo.protein import crystal
        >>> crystal(4).shape
        (3144, 3)
    """
    if not 1 <= copies <= MAX_COPIES:
        raise ValueError(f"copies must lie in 1 … {MAX_COPIES}, got {copies}")
    entry = _entry()
    cell = _cell(entry["cell_lengths_angstrom"], entry["cell_angles_degrees"])
    original = np.array(entry["coordinates_angstrom"])
    fractional = original @ np.linalg.inv(cell)
    symmetric = [fractional @ turn.T + shift for turn, shift in map(_affine, entry["operators"])]
    shifts = np.array(list(itertools.product(range(-CELLS, CELLS + 1), repeat=3)))
    images = [(image, shift) for image in symmetric for shift in shifts]
    centres = np.array([image.mean(0) + shift for image, shift in images]) @ cell
    nearest = np.argsort(np.linalg.norm(centres - original.mean(0), axis=1), kind="stable")[:copies]
    return np.concatenate([(images[n][0] + images[n][1]) @ cell for n in nearest])


@cache
def _entry() -> dict[str, Any]:
    return json.loads(resources.files("flashbias.demo").joinpath("data", "2xhe.json").read_text("utf-8"))


def _cell(lengths: list[float], angles: list[float]) -> NDArray[np.float64]:
    """Rows are the cell's edges in ångström: a along x, b in the xy-plane, as in every PDB entry."""
    a, b, c = lengths
    cos_alpha, cos_beta, cos_gamma = np.cos(np.radians(angles))
    sin_gamma = np.sqrt(1 - cos_gamma**2)
    c_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    c_z = np.sqrt(1 - cos_beta**2 - c_y**2)
    edges = [[a, 0, 0], [b * cos_gamma, b * sin_gamma, 0], [c * cos_beta, c * c_y, c * c_z]]
    return np.array(edges)


def _affine(operator: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read a symmetry operator such as `-y,x-y,z+2/3` as a matrix and a shift of fractional coordinates."""
    turn, shift = np.zeros((3, 3)), np.zeros(3)
    for row, expression in enumerate(operator.split(",")):
        for term in expression.replace("-", "+-").split("+"):
            if not term:
                continue
            axis = "xyz".find(term[-1])
            if axis >= 0:
                turn[row, axis] = -1 if term.startswith("-") else 1
            else:
                shift[row] += float(Fraction(term))
    return turn, shift
