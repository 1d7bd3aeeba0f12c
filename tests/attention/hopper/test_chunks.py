"""How columns are cut: into what Gluon can slice and hold, without one that no instruction needs."""

from __future__ import annotations

import pytest
from tests.conftest import INTERPRETED

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from flashbias.attention.hopper.chunks import chunks_of, half_columns, sums_of
from flashbias.attention.hopper.configs import columns_of, width_of

WIDTHS = range(16, 257, 16)
PANEL = 64


@pytest.mark.parametrize(("head_dim", "width"), [(8, 16), (16, 16), (24, 32), (72, 80), (80, 80), (200, 208)])
def test_widths_are_whole_instructions(head_dim: int, width: int) -> None:
    assert width_of(head_dim) == width


@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_are_all_columns_once(width: int) -> None:
    """Each a power of two that begins at a multiple of itself, as slices of shared memory do."""
    end = 0
    for start, columns in chunks_of(width):
        assert start == end
        assert columns.bit_count() == 1
        assert start % columns == 0
        end = start + columns
    assert end == width


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_hold_all_columns(width: int) -> None:
    """In tensors that are powers of two and begin with a panel, no wider than what is held."""
    end = 0
    for start, columns in sums_of(width):
        assert start == end
        assert columns.bit_count() == 1
        assert start % PANEL == 0
        end = start + columns
    assert width <= end <= columns_of(width)


@pytest.mark.parametrize(
    ("width", "sums"),
    [
        (48, [64]),
        (64, [64]),
        (80, [64, 16]),
        (96, [64, 32]),
        (112, [128]),
        (144, [128, 16]),
        (176, [128, 64]),
        (192, [128, 64]),
        (208, [256]),
        (256, [256]),
    ],
)
def test_sums_save_what_they_can(width: int, sums: list[int]) -> None:
    assert [columns for _, columns in sums_of(width)] == sums


@pytest.mark.parametrize("width", [80, 96, 112, 128])
def test_two_warpgroups_have_all_columns_of_dq(width: int) -> None:
    """The second one begins at half of what is held."""
    first, second = (half_columns(width, 128, w) for w in range(2))
    assert first == 64
    assert width <= 64 + second <= 128
