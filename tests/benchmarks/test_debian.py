"""Files out of Debian packages: the right one, kept, or none."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from benchmarks import debian

CONTENT = b"a mesh"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package that holds the file; the list of what was asked of it."""
    asked: list[str] = []
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(debian, "_out_of", lambda package, name: asked.append(package) or CONTENT)
    return asked


def test_a_file_is_fetched_once(package: list[str]):
    for _ in range(2):
        path = debian.fetched("meshes", "mesh.obj.gz", hashlib.sha256(CONTENT).hexdigest())
        assert path == debian.cache_folder() / "mesh.obj.gz" and path.read_bytes() == CONTENT
    assert package == ["meshes"]


def test_another_file_than_the_pinned_one_is_refused(package: list[str]):
    with pytest.raises(ValueError, match=r"mesh.obj.gz has sha256 \w{64}, expected 0{64}"):
        debian.fetched("meshes", "mesh.obj.gz", "0" * 64)
    assert not list(debian.cache_folder().iterdir())


def test_without_apt_the_error_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"apt-get is not there; put mesh.obj.gz of meshes into"):
        debian.fetched("meshes", "mesh.obj.gz", "0" * 64)
