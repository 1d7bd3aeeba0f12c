"""What the tests of several subcommands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.decompose.made_up_device import write_coefficients


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def device(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--device", write_coefficients(tmp_path_factory.mktemp("device"))]
