"""The example of meshes runs, and its conclusion follows from what it measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mesh.py"


def test_same_gradients_in_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    conclusion = runpy.run_path(str(EXAMPLE))["main"](800)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(conclusion)
    rows = re.findall(r"^ +(\d+) .* ([\d,]+) MiB +([\d.,]+) MiB +(\S+)$", printed, re.MULTILINE)
    assert [int(points) for points, *_ in rows] == [200, 400, 800]
    matrix, factors = ([float(row[column].replace(",", "")) for row in rows] for column in (1, 2))
    assert matrix[2] > 10 * factors[2]
    assert matrix[2] > 3.5 * matrix[1], "memory of a matrix is quadratic"
    assert factors[2] < 2.2 * factors[1], "memory of factors is linear"
    assert all(float(gradients) < 1e-4 for *_, gradients in rows)
