from __future__ import annotations

import base64
import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from flashbias.decompose.draw import BIAS_COLOURS, BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Chart, picture


def pixels(element: str) -> np.ndarray:
    """Red, green, blue and opacity of the PNG in an element."""
    data = re.search(r'src="data:image/png;base64,([^"]+)"', element)
    assert data is not None
    return image.imread(io.BytesIO(base64.b64decode(data[1])), format="png")


class TestPicture:
    def test_pixels_have_the_colours_of_their_values(self) -> None:
        values = torch.tensor([[0.0, 1.0, 2.0], [-5.0, 9.0, math.nan]])
        found = pixels(picture(values, ("#000000", "#ff0000"), 0.0, 2.0, ""))
        assert found.shape == (2, 3, 4)
        red = found[..., 0]
        assert red[0, 0] == 0 and red[0, 2] == 1 and abs(red[0, 1] - 0.5) < 0.01
        assert red[1, 0] == 0 and red[1, 1] == 1, "what is beyond the ends has their colours"
        assert (found[..., 3] == np.array([[1, 1, 1], [1, 1, 0]])).all(), "what is not read is transparent"

    @given(st.integers(1, 40), st.integers(1, 40))
    def test_any_shape(self, height: int, width: int) -> None:
        element = picture(torch.randn(height, width), BIAS_COLOURS, -3, 3, "a & b")
        assert pixels(element).shape == (height, width, 4)
        assert 'alt="a &amp; b"' in element
        ratio = float(re.search(r"aspect-ratio:([\d.]+)", element)[1])  # type: ignore[index]
        assert ratio == pytest.approx(min(3, max(1 / 3, width / height)), rel=0.01)

    def test_a_constant_matrix(self) -> None:
        assert len(np.unique(pixels(picture(torch.ones(3, 3), BIAS_COLOURS, 1.0, 1.0, "")).reshape(-1, 4), axis=0)) == 1


class TestAxis:
    @given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
    def test_ticks_are_few_and_inside(self, low: float, width: float) -> None:
        ticks = Axis("", low, low + width).ticks()
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)

    @given(st.integers(-12, 3), st.integers(1, 15))
    def test_ticks_of_decades(self, low: int, decades: int) -> None:
        ticks = Axis("", 10.0**low, 10.0 ** (low + decades), is_log=True).ticks()
        assert 1 <= len(ticks) <= 7
        assert all(math.log10(tick) == pytest.approx(round(math.log10(tick))) for tick in ticks)

    def test_shares(self) -> None:
        assert [Axis("", 1, 100, True).share(v) for v in (1, 10, 100, 1000, 0.1)] == pytest.approx([0, 0.5, 1, 1, 0])
        assert [Axis("", -1, 3).share(v) for v in (-1, 1, 3, 9)] == pytest.approx([0, 0.5, 1, 1])


class TestChart:
    def test_points_stand_where_they_should(self) -> None:
        chart = Chart(Axis("x < y", 1, 100, True), Axis("", 0, 1), 'a "chart"').line([1, 10, 100], [0, 0.5, 1], "svd")
        root = ElementTree.fromstring(chart.svg())
        (line,) = root.iter("polyline")
        found = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        middle = ((LEFT + right) / 2, (bottom + TOP) / 2)
        assert found == [(LEFT, bottom), pytest.approx(middle, abs=0.1), (right, TOP)]
        assert root.attrib["aria-label"] == 'a "chart"'
        assert "x < y" in [text.text for text in root.iter("text")]

    @pytest.mark.parametrize("is_log", [True, False])
    def test_long_curves_are_thinned_and_keep_their_ends(self, is_log: bool) -> None:
        count = 5000
        chart = Chart(Axis("", 1, count, is_log), Axis("", 0, 1), "")
        chart.line(range(1, count + 1), np.linspace(0, 1, count).tolist(), "svd")
        (line,) = ElementTree.fromstring(chart.svg()).iter("polyline")
        points = line.attrib["points"].split()
        assert len(points) <= 120
        assert points[0].startswith(f"{LEFT:.1f},") and points[-1].endswith(f",{TOP:.1f}")

    def test_infinities_are_left_out(self) -> None:
        chart = Chart(Axis("", 0, 3), Axis("", 0, 1), "").line([0, 1, 2], [0.5, math.inf, math.nan], "svd")
        (line,) = ElementTree.fromstring(chart.svg()).iter("polyline")
        assert len(line.attrib["points"].split()) == 1

    def test_lines_and_dots_are_named(self) -> None:
        chart = Chart(Axis("", 1, 100, True), Axis("", 1e-3, 1, True), "")
        chart.level(0.01, "promise", "tol 0.01").upright(20, "limit", "pays").dot(5, 0.1, "tried", "rank 5 & co")
        root = ElementTree.fromstring(chart.svg())
        texts = {text.text for text in root.iter("text")}
        assert {"tol 0.01", "pays"} <= texts
        (dot,) = root.iter("circle")
        assert dot[0].text == "rank 5 & co"
