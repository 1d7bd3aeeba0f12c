"""Files: written whole or not at all, and safetensors opened with errors that say what is wrong."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["check_target", "is_safetensors", "open_safetensors", "safetensors_torch", "whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it becomes `path` if the block ends well, and is removed if not.

    Args:
        path: of the file to make or to replace; its folder is made if it is not there.

    Yields:
        The path of an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # what the user's umask gives; some writers make a private file instead
        yield part
        part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Find out before the work is done whether its result could be written.

    Args:
        path: of the file to make or to replace.

    Raises:
        ValueError: it is a folder, or in a place where no file can be made.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a file is to be written")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission to write in {folder}")


# -------------------------------------------------------------------- safetensors


def safetensors_torch() -> Any:
    """The module `safetensors.torch`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    return _module("safetensors.torch")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; tensors are mapped into memory, and read when their values are.

    Args:
        path: of the file.

    Yields:
        What `safetensors.safe_open` gives.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: it is no safetensors file, or a part of one.
    """
    module = _module("safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not there'}")
    try:
        opened = module.safe_open(str(path), framework="pt")
    except module.SafetensorError as error:
        raise ValueError(f"{path} {_what_is_wrong(path)} ({error})") from None
    with opened as file:
        yield file


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does: with the length of its header, and the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("safetensors"):
            raise
        raise ModuleNotFoundError("safetensors files need safetensors: pip install 'flashbias[cli]'") from None


def _what_is_wrong(path: Path) -> str:
    """Why safetensors cannot open a file: it is something else, or cut short."""
    size = path.stat().st_size
    if size == 0:
        return "is empty"
    if not is_safetensors(path):
        return "is no safetensors file"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return f"is cut short or no safetensors file: {size} bytes, of which the header alone should have {length}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is damaged, or no safetensors file: its header cannot be read"
    if expected > size:
        return f"is cut short: {size} bytes of {expected}"
    return "is damaged"
