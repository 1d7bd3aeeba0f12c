from __future__ import annotations

from pathlib import Path

import pytest

from flashbias.cli import demo as command
from flashbias.cli.app import run


def test_demo_runs_on_the_protein(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--copies", "2", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "| 1,572    | training step | factored |" in text
    assert "At 1,572 residues the factored bias is" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo.csv", "demo.png"]
    assert str(tmp_path / "out" / "demo.png") in text


def test_a_folder_that_cannot_be_is_found_out_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*args: object) -> None:
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr("flashbias.demo.run", measured)
    (tmp_path / "file").touch()
    assert run(["demo", "--copies", "1", "--out", str(tmp_path / "file" / "out")]) == 2
    assert f"cannot be written: {tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_demo_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert run(["demo"]) == 1
    assert capsys.readouterr().err == "flashbias: the plot needs matplotlib: pip install 'flashbias[demo]'\n"
