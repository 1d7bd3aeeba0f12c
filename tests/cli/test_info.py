from __future__ import annotations

import pytest
import torch

import flashbias as fb
from flashbias.cli.app import run


def test_info_tells_the_machine_and_every_implementation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for name, reason in fb.implementations().items():
        *_, line = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
        assert (reason or "yes") in line
