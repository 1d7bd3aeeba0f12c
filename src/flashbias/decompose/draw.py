"""Pictures for a page, without a plotting library: matrices as PNG data, curves as SVG that follows the page's style.

Curves take their colours from classes of the page's style sheet, so that they read well on a light and a dark ground.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from torch import Tensor

__all__ = ["BIAS_COLOURS", "ERROR_COLOURS", "Axis", "Chart", "css_gradient", "picture"]

BIAS_COLOURS = ("#0d1b3e", "#1b3f6b", "#1f6f8b", "#3a9d9b", "#86c59c", "#d3e2a8", "#fbf3cf")
"""Of a matrix, from its smallest to its largest entry."""

ERROR_COLOURS = ("#b5502f00", "#d98f4bb0", "#c9622fff", "#8c1d2cff")
"""Of an error, from none (the ground shines through) to the largest."""


# -------------------------------------------------------------------- matrices


def picture(values: Tensor, colours: Sequence[str], low: float, high: float, alt: str) -> str:
    """Draw a matrix as an `img` element with its PNG inside.

    Args:
        values: `[n, m]`; NaN is left transparent.
        colours: `#rrggbb` or `#rrggbbaa`, evenly spaced from `low` to `high`.
        low: value of the first colour; what is below has it too.
        high: value of the last.
        alt: what the picture shows, in words.

    Returns:
        The element.
    """
    array = values.double().numpy()
    share = (np.nan_to_num(array, nan=low) - low) / (high - low if high > low else 1.0)
    index = (1 + np.rint(254 * share.clip(0, 1))).astype(np.uint8)
    index[np.isnan(array)] = 0
    palette = np.vstack([np.zeros((1, 4)), _ramp(colours, 255)]).round().astype(np.uint8)
    data = base64.b64encode(_png(index, palette)).decode()
    height, width = index.shape
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'style="aspect-ratio:{_aspect(width, height)}" alt="{escape(alt)}">'
    )


def css_gradient(colours: Sequence[str]) -> str:
    """The same colours as a CSS background, for a scale beside a picture."""
    return f"linear-gradient(to right,{','.join(colours)})"


def _aspect(width: int, height: int) -> str:
    """Width over height, kept between 1/3 and 3 so that a thin matrix can be seen."""
    return f"{min(3.0, max(1 / 3, width / height)):.3g}"


def _ramp(colours: Sequence[str], count: int) -> np.ndarray:
    """`[count, 4]`: red, green, blue and opacity between the colours."""
    stops = np.array([[int((c + "ff")[i : i + 2], 16) for i in (1, 3, 5, 7)] for c in colours], dtype=float)
    at = np.linspace(0, len(colours) - 1, count)
    return np.stack([np.interp(at, range(len(colours)), stops[:, channel]) for channel in range(4)], axis=1)


def _png(index: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG file of one byte per pixel, which numbers a colour of the palette.

    Reference:
        Portable Network Graphics, https://www.w3.org/TR/png-3/.
    """
    height, width = index.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.pad(index, ((0, 0), (1, 0)))  # each row begins with its filter, none
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", palette[:, :3].tobytes()),
            chunk(b"tRNS", palette[:, 3].tobytes()),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )


# -------------------------------------------------------------------- curves

WIDTH, HEIGHT = 340, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 36
MOST_POINTS = 120
"""Points of a curve; of a longer one some are left out."""


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        title: what is counted.
        low: smallest value shown.
        high: largest value shown, above `low`.
        is_log: whether decades are evenly spaced; then `low` is above 0.
    """

    title: str
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one; outside values lie on the edge."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Three to six round values."""
        if not self.is_log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 5)
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        stride = 1 + len(decades) // 6
        return [10.0**d for d in decades if d % stride == 0]


@dataclass
class Chart:
    """Curves over two axes.

    Args:
        x: the horizontal axis.
        y: the vertical one.
        alt: what the chart shows, in words.
        size: width and height, in units of which a letter has about ten.
    """

    x: Axis
    y: Axis
    alt: str
    size: tuple[int, int] = (WIDTH, HEIGHT)
    marks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self, xs: Iterable[float], ys: Iterable[float], kind: str, name: str = "") -> Chart:
        """Add a curve of a class of the style sheet; the name is shown where the pointer rests."""
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        points = [points[i] for i in _thinned(len(points), self.x.is_log)]
        path = " ".join(f"{self._across(x):.1f},{self._up(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline class="{kind}" points="{path}">{_title(name)}</polyline>')
        return self

    def dot(self, x: float, y: float, kind: str, name: str = "") -> Chart:
        """Add one point."""
        at = f'cx="{self._across(x):.1f}" cy="{self._up(y):.1f}"'
        self.marks.append(f'<circle class="{kind}" {at} r="4">{_title(name)}</circle>')
        return self

    def level(self, y: float, kind: str, name: str) -> Chart:
        """Add a horizontal line, named at its left end."""
        height = self._up(y)
        self.marks.append(f'<path class="{kind}" d="M{LEFT} {height:.1f}H{self.size[0] - RIGHT}"/>')
        below = height + 12 if height < TOP + 14 else height - 5
        self.notes.append(f'<text class="{kind}" x="{LEFT + 5}" y="{below:.1f}">{escape(name)}</text>')
        return self

    def upright(self, x: float, kind: str, name: str, row: int = 0) -> Chart:
        """Add a vertical line, named in a row of text counted from its foot."""
        across = self._across(x)
        self.marks.append(f'<path class="{kind}" d="M{across:.1f} {TOP}V{self.size[1] - BOTTOM}"/>')
        is_right = across > (LEFT + self.size[0]) / 2
        anchor = f'x="{across + (-4 if is_right else 4):.1f}"' + (' text-anchor="end"' if is_right else "")
        height = self.size[1] - BOTTOM - 6 - 13 * row
        self.notes.append(f'<text class="{kind}" {anchor} y="{height}">{escape(name)}</text>')
        return self

    def svg(self) -> str:
        """The chart as an element."""
        width, height = self.size
        return "".join(
            [
                f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self.alt)}">',
                *self._grid(),
                *self.marks,
                *self.notes,
                "</svg>",
            ]
        )

    def _across(self, x: float) -> float:
        return LEFT + self.x.share(x) * (self.size[0] - LEFT - RIGHT)

    def _up(self, y: float) -> float:
        return self.size[1] - BOTTOM - self.y.share(y) * (self.size[1] - TOP - BOTTOM)

    def _grid(self) -> list[str]:
        bottom, right = self.size[1] - BOTTOM, self.size[0] - RIGHT
        parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
        for value in self.y.ticks():
            height = self._up(value)
            parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right}"/>')
            label = f'<text x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{_number(value)}</text>'
            parts.append(label)
        for value in self.x.ticks():
            across = self._across(value)
            parts.append(f'<path class="grid" d="M{across:.1f} {TOP}V{bottom}"/>')
            parts.append(f'<text x="{across:.1f}" y="{bottom + 14}" text-anchor="middle">{_number(value)}</text>')
        middle = (LEFT + right) / 2
        parts.append(
            f'<text class="name" x="{middle}" y="{self.size[1] - 5}" text-anchor="middle">{escape(self.x.title)}</text>'
        )
        return parts


def _thinned(count: int, is_log: bool) -> list[int]:
    """Positions of the points that are kept: evenly spaced as the axis is."""
    if count <= MOST_POINTS:
        return list(range(count))
    spaced = np.geomspace(1, count, MOST_POINTS) - 1 if is_log else np.linspace(0, count - 1, MOST_POINTS)
    return sorted({round(float(i)) for i in spaced})


def _title(name: str) -> str:
    return f"<title>{escape(name)}</title>" if name else ""


def _number(value: float) -> str:
    """As short as it can be said."""
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")
