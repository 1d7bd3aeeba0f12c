"""The example of vision models runs, and its conclusion follows from what it measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision.py"


def test_same_output_in_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    conclusion = runpy.run_path(str(EXAMPLE))["main"](96)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(conclusion)
    assert "4 attentions replaced, 0 left, 0 unsupported" in printed
    before = re.search(r"^as it was .* (\S+) MiB$", printed, re.MULTILINE)
    after = re.search(r"^patched .* (\S+) MiB +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert before is not None and after is not None
    assert float(after[1]) < float(before[1])
    assert float(after[2]) < 1e-5
    assert float(after[3]) < 1e-4
