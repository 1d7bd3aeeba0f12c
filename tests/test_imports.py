"""What `import flashbias` loads, seen in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["triton", "matplotlib", "typer", "rich", "transformers", "timm", "safetensors", "scipy"]


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a statement loads beyond those that torch itself loads."""
    code = f"import sys, json, torch; before = set(sys.modules); {statement}; "
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout))


@pytest.mark.parametrize("statement", ["import flashbias", "import flashbias.integrations"])
def test_library_loads_no_extra(statement: str) -> None:
    loaded = loaded_by(statement)
    assert "flashbias" in loaded
    assert not loaded & set(HEAVY)


def test_benchmarks_and_demo_load_no_plot_and_no_command_line() -> None:
    loaded = loaded_by("import flashbias.bench, flashbias.demo")
    assert not loaded & {"matplotlib", "typer", "rich", "transformers", "timm"}


def test_public_names() -> None:
    code = "import flashbias as fb; missing = set(fb.__all__) - set(dir(fb)); assert not missing, missing"
    subprocess.run([sys.executable, "-c", code], check=True)
