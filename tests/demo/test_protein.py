from __future__ import annotations

import numpy as np
import pytest

from flashbias.demo.protein import MAX_COPIES, NUM_RESIDUES, crystal


def test_first_copy_is_the_entry_itself() -> None:
    coordinates = crystal(1)
    assert coordinates.shape == (NUM_RESIDUES, 3)
    # First and last C-alpha of the entry as published.
    np.testing.assert_allclose(coordinates[0], [-15.918, -48.056, 5.850], atol=1e-9)


def test_neighbours_in_the_chain_are_3_8_angstrom_apart() -> None:
    steps = np.linalg.norm(np.diff(crystal(1), axis=0), axis=1)
    assert 3.7 < np.median(steps) < 3.9


def test_copies_are_congruent() -> None:
    copies = crystal(16).reshape(16, NUM_RESIDUES, 3)
    shape = np.linalg.norm(copies[0] - copies[0, :1], axis=1)
    for copy in copies:
        np.testing.assert_allclose(np.linalg.norm(copy - copy[:1], axis=1), shape, atol=1e-9)


def test_copies_touch_but_never_overlap() -> None:
    """Wrong symmetry operators or a wrong cell would put atoms of two copies on top of each other."""
    copies = crystal(12).reshape(12, NUM_RESIDUES, 3)
    nearest = [
        min(np.linalg.norm(copies[n][:, None] - copies[m][None], axis=-1).min() for m in range(12) if m != n)
        for n in range(4)
    ]
    assert min(nearest) > 3.8
    assert max(nearest) < 8.0


def test_more_copies_begin_with_the_fewer() -> None:
    np.testing.assert_array_equal(crystal(8)[: 4 * NUM_RESIDUES], crystal(4))


@pytest.mark.parametrize("copies", [0, -1, MAX_COPIES + 1])
def test_number_of_copies_is_checked(copies: int) -> None:
    with pytest.raises(ValueError, match=f"copies must lie in 1 … {MAX_COPIES}, got {copies}"):
        crystal(copies)
