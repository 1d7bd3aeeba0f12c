from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flashbias
from flashbias.cli import app as application
from flashbias.cli.app import run


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"flashbias {flashbias.__version__}"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_subcommands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("info", "demo", "bench"))


@pytest.mark.parametrize("subcommand", ["info", "demo", "bench"])
def test_help_teaches_by_example(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([subcommand, "--help"]) == 0
    assert f"flashbias {subcommand}" in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "nope"),
        (["--nope"], "--nope"),
        (["info", "surplus"], "surplus"),
        (["demo", "--copies", "many"], "--copies"),
        (["demo", "--copies", "0"], "copies must lie in 1 … 512, got 0"),
        (["demo", "--heads", "0"], "num_heads must lie in"),
        (["demo", "--dtype", "int8"], "dtype must be"),
        (["demo", "--device", "tpu"], "device must be"),
        (["demo", "--out", __file__], "--out"),
        (["demo", "--seconds"], "--seconds"),
        (["bench", "--case", "nope", "--small"], "unknown case 'nope'"),
        (["bench", "--pass", "nope", "--small"], "unknown pass 'nope'"),
        (["bench", "--dtype", "int8", "--small"], "unknown dtype 'int8'"),
        (["bench", "--device", "tpu"], "device must be"),
        (["bench", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["bench", "--table", "/nowhere.csv"], "/nowhere.csv"),
        (["bench", "--table", __file__], "must have the columns"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value[:3]).rpartition("/")[2],
)
def test_a_bad_argument_gets_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert len(lines(captured.err)) == 1, captured.err
    assert captured.err.startswith("flashbias: ")
    assert said in captured.err
    assert captured.out == ""


def test_a_failure_of_another_kind_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device\nat all")

    monkeypatch.setattr(application, "app", fail)
    assert run(["info"]) == 1
    assert capsys.readouterr().err == "flashbias: no space left on device at all\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="copies"):
        run(["--debug", "demo", "--copies", "0"])


def test_without_its_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a); "
        "from flashbias.cli import main; main()"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 1
    assert lines(answer.stderr) == ["flashbias: the command line needs typer: pip install 'flashbias[cli]'"]


def has_grandchildren(process: int) -> bool:
    """Whether a process has children that have children: here a fork server whose child measures."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    return any(parents.get(parent) == process for parent in parents.values())


def test_an_interruption_ends_cleanly(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group of processes, children that measure included."""
    command = [sys.executable, "-m", "flashbias.cli", "demo", "--copies", "8", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not has_grandchildren(process.pid):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1)  # it works, and leaves signals to its parent
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert out == ""
