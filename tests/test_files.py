from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashbias import files
from flashbias.files import check_target, open_safetensors, whole_file


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    with whole_file(path) as part:
        part.write_text("whole")
        assert not path.exists()
        assert part.parent == path.parent
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")

    def write_half() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    def write_privately(part: Path) -> None:
        part.unlink()
        os.close(os.open(part, os.O_CREAT, 0o600))

    (tmp_path / "usual").touch()
    with whole_file(tmp_path / "x") as part:
        write_privately(part)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_target_that_cannot_be_written_is_found_out_before(tmp_path: Path) -> None:
    check_target(tmp_path / "not" / "there" / "yet.html")
    with pytest.raises(ValueError, match="is a folder"):
        check_target(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        check_target(tmp_path / "file" / "x.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no permission to write"):
        check_target(tmp_path / "x.html")


class TestSafetensors:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.arange(100.0)}, path)
        return path

    def test_tensors_are_mapped(self, path: Path) -> None:
        with open_safetensors(path) as file:
            assert torch.equal(file.get_tensor("a"), torch.arange(100.0))

    def test_a_missing_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is not there"), open_safetensors(tmp_path / "nope"):
            pass
        with pytest.raises(FileNotFoundError, match="is a folder"), open_safetensors(tmp_path):
            pass

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "is empty"),
            (b"hello world, how are you", "is no safetensors file"),
            ((10**6).to_bytes(8, "little") + b'{"a":', "header alone should have 1000000"),
            ((5).to_bytes(8, "little") + b'{"a":', "its header cannot be read"),
            ((12).to_bytes(8, "little") + b'{"a":[1, 2]}', "its header cannot be read"),
        ],
        ids=["empty", "text", "header-cut", "no-json", "foreign-json"],
    )
    def test_what_is_no_safetensors_file(self, tmp_path: Path, content: bytes, said: str) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said), open_safetensors(path):
            pass

    def test_a_file_cut_short(self, path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        said = f"cut short: {len(whole) - 8} bytes of {len(whole)}"
        with pytest.raises(ValueError, match=said), open_safetensors(path):
            pass

    def test_a_file_with_more_than_its_tensors(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(ValueError, match="is damaged"), open_safetensors(path):
            pass

    def test_without_the_package_one_line_says_what_to_install(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(name: str) -> object:
            raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

        monkeypatch.setattr(files.importlib, "import_module", missing)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'flashbias\[cli\]'"), open_safetensors(path):
            pass

    def test_another_missing_module_is_not_taken_for_it(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> object:
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

        monkeypatch.setattr(files.importlib, "import_module", missing)
        with pytest.raises(ModuleNotFoundError, match="numpy"):
            files.safetensors_torch()


def test_a_safetensors_file_is_known_by_its_start(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((2).to_bytes(8, "little") + json.dumps({}).encode())
    assert files.is_safetensors(path)
    path.write_bytes(b"{}")
    assert not files.is_safetensors(path)
