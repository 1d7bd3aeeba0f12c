"""The example of language models runs, and its conclusion follows from what it measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "language.py"


def test_same_output_in_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    conclusion = runpy.run_path(str(EXAMPLE))["main"](256)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(conclusion)
    assert printed.count("2 attentions replaced, 0 left, 0 unsupported") == 3
    rows = re.findall(r"^(t5|mpnet|bloom) .* (\d+) MiB +(\d+) MiB +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["t5", "mpnet", "bloom"]
    for name, before, after, output, gradients in rows:
        assert int(after) < int(before), name
        assert float(output) < 1e-5
        assert float(gradients) < 1e-4
