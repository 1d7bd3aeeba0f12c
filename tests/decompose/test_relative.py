"""Relative biases: found from their values, read into tables, tables shortened."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.decompose.problems import causal, generator, noise, places, toeplitz, window

from flashbias.biases import WindowBias
from flashbias.decompose.relative import Codes, codes_of_grid, codes_of_positions, find_codes, read_table, trim_tails

WINDOWS = [(3, 4), (5, 5), (2, 7), (2, 3, 4), (3, 3, 3), (4, 6)]


def lookup(table: torch.Tensor, codes: Codes) -> torch.Tensor:
    return table[codes.index(len(table) // 2)]


class TestCodes:
    @given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), min_size=1, max_size=7), st.data())
    def test_are_shared_by_equal_differences_alone(self, keys: list[tuple[int, int]], data: st.DataObject):
        queries = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5))
        q, k = torch.tensor(queries), torch.tensor(keys)
        codes = codes_of_positions(q, k)
        index = codes.index()
        assert int(index.min()) >= 0 and int(index.max()) <= 2 * codes.half_width
        difference = (k[None] - q[:, None]).flatten(0, 1)
        same = (difference[:, None] == difference[None]).all(-1)
        assert torch.equal(index.flatten()[:, None] == index.flatten()[None], same)

    @pytest.mark.parametrize("axes", WINDOWS)
    @pytest.mark.parametrize("class_token", [False, True])
    def test_of_a_grid_are_those_of_the_window_family(self, axes: tuple[int, ...], class_token: bool):
        family = WindowBias(1, axes, class_token)
        codes = codes_of_grid(axes, class_token)
        assert torch.equal(codes.code_q, family.get_buffer("code_q"))
        assert torch.equal(codes.code_k, family.get_buffer("code_k"))
        assert 2 * codes.half_width + 1 == family.table().shape[1]

    def test_of_places_in_a_row_are_positions(self):
        codes = codes_of_positions(torch.arange(5), torch.arange(8))
        assert codes.is_line and codes.is_positions and codes.half_width == 7
        assert not codes_of_positions(torch.arange(5) + 1, torch.arange(8)).is_positions

    def test_places_on_a_line_may_lie_anywhere(self):
        codes = codes_of_positions(torch.tensor([-5, 100]), torch.tensor([[7], [90]]))
        assert codes.is_line and not codes.is_positions
        assert codes.half_width == 95
        assert (codes.index() - codes.half_width).tolist() == [[12, 95], [-93, -10]]

    @pytest.mark.parametrize(
        ("codes", "text"),
        [
            (codes_of_positions(torch.arange(3), torch.arange(3)), "position"),
            (codes_of_grid((2, 3)), "place in a 2×3 window"),
            (codes_of_grid((2, 3, 4), True), "place in a 2×3×4 window behind a class token"),
        ],
    )
    def test_say_what_they_are(self, codes: Codes, text: str):
        assert str(codes) == text


class TestFinding:
    @pytest.mark.parametrize(("n", "m"), [(16, 16), (9, 30), (30, 9), (2, 2), (2, 40)])
    def test_a_line(self, n: int, m: int):
        b = toeplitz(n, m).double()
        codes = find_codes(b, 0.0)
        assert codes is not None and codes.is_line and codes.is_positions
        assert torch.equal(lookup(read_table(b, codes), codes), b)

    @pytest.mark.parametrize("axes", WINDOWS)
    @pytest.mark.parametrize("class_token", [False, True])
    def test_a_window(self, axes: tuple[int, ...], class_token: bool):
        b = window(axes, class_token=class_token).double()
        codes = find_codes(b, 0.0)
        assert codes is not None
        assert codes.axes == axes and codes.has_class_token == class_token
        assert torch.equal(lookup(read_table(b, codes), codes), b)

    @pytest.mark.parametrize("b", [noise(24), noise(24, 30), noise(1, 7), noise(7, 1), noise(1), noise(25)])
    def test_nothing_where_there_is_nothing(self, b: torch.Tensor):
        assert find_codes(b.double(), 1e-9) is None

    def test_one_entry_out_of_place_is_seen(self):
        """Also where the rows that are looked at first do not hold it."""
        b = window((8, 12)).double()
        for i, j in ((0, 0), (1, 50), (95, 95), (43, 2)):
            other = b.clone()
            other[i, j] += 0.1
            assert find_codes(other, 1e-3) is None

    def test_a_little_noise_is_allowed(self):
        b = toeplitz(40).double() + 1e-6 * noise(40).double()
        assert find_codes(b, 1e-5) is not None
        assert find_codes(b, 1e-7) is None


class TestTables:
    def test_noise_is_split_evenly(self):
        b = toeplitz(6).double()
        b[0, 0] += 0.5
        codes = codes_of_positions(torch.arange(6), torch.arange(6))
        table = read_table(b, codes)
        assert float(table[codes.half_width] - b[1, 1]) == pytest.approx(0.25)

    def test_what_nothing_reads_repeats_the_next_or_the_last(self):
        b = toeplitz(5).double()
        codes = codes_of_positions(torch.arange(5), torch.arange(5))
        table = read_table(b, codes, causal(5))
        assert torch.equal(lookup(table, codes)[causal(5)], b[causal(5)])
        assert table[codes.half_width :].unique().numel() == 1
        assert torch.equal(table[codes.half_width], b[0, 0])
        upper = read_table(b, codes, causal(5).mT)
        assert upper[: codes.half_width + 1].unique().numel() == 1

    def test_hidden_entries_may_be_anything(self):
        b = toeplitz(5).double().masked_fill(~causal(5), float("nan"))
        codes = codes_of_positions(torch.arange(5), torch.arange(5))
        assert bool(torch.isfinite(read_table(b, codes, causal(5))).all())

    def test_of_a_head_that_is_not_read_at_all_is_zero(self):
        codes = codes_of_positions(torch.arange(4), torch.arange(4))
        assert read_table(noise(4).double(), codes, torch.zeros(4, 4, dtype=torch.bool)).tolist() == [0.0] * 7


class TestTrimming:
    def test_ends_where_tails_begin(self):
        table = torch.tensor([[1.0, 1.0, 1.0, 5.0, 7.0, 6.0, 2.0, 2.0, 2.0]])
        assert trim_tails(table, 0.0).tolist() == [[1.0, 5.0, 7.0, 6.0, 2.0]]

    def test_the_longest_head_decides(self):
        tables = torch.tensor([[1.0, 1.0, 5.0, 2.0, 2.0], [1.0, 1.5, 5.0, 2.0, 2.0]])
        assert torch.equal(trim_tails(tables, 0.0), tables)

    def test_a_constant_becomes_three_entries(self):
        assert trim_tails(torch.full((1, 9), 4.0), 0.0).tolist() == [[4.0] * 3]

    def test_one_entry_stays(self):
        assert trim_tails(torch.tensor([[3.0]]), 0.0).tolist() == [[3.0]]

    @given(st.integers(1, 30), st.floats(0.0, 3.0), st.integers(0, 99))
    def test_moves_no_entry_further_than_half_of_what_is_allowed(self, half: int, allowed: float, seed: int):
        table = torch.randn(2, 2 * half + 1, generator=generator(seed), dtype=torch.float64).cumsum(1)
        table = table * torch.linspace(-1, 1, 2 * half + 1).cos() / 3
        short = trim_tails(table, allowed)
        width = short.shape[1] // 2
        index = torch.arange(-half, half + 1).clamp(-width, width) + width
        assert short.shape[1] % 2 == 1
        assert float((short[:, index] - table).abs().max()) <= allowed / 2 + 1e-12

    def test_t5_needs_its_largest_distance_alone(self):
        difference = torch.arange(-99, 100)
        table = difference.clamp(-20, 20).double().sin()[None]
        assert trim_tails(table, 0.0).shape == (1, 41)


def test_a_smooth_window_is_a_window():
    """Smooth in the places, so that neighbours differ little."""
    where = places((6, 6)).double() / 100
    b = torch.exp(-(where[:, None] - where[None]).square().sum(-1))
    codes = find_codes(b, 1e-12)
    assert codes is not None and codes.axes == (6, 6)
