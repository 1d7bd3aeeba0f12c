"""English text that Debian ships: the documentation of Perl, Git, Vim, SQLite and Debian, and the Jargon File.

About 30 MB of prose, as bytes. A document that is shorter than the longest context would not test it, so only
documents of 4,096 bytes and more are taken. Tags of HTML are taken out. One document in twenty is held out.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import lzma
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.debian import cache_folder
from benchmarks.record import say
from torch import Tensor

from flashbias.files import whole_file

__all__ = ["Text", "fetch", "load", "pack"]

PACKAGES = {
    "perl-doc": "*.pod",
    "git-doc": "*.txt",
    "vim-doc": "*.html",
    "sqlite3-doc": "*.html",
    "debian-reference-en": "*.html",
    "developers-reference": "*.txt",
    "jargon-text": "jargon.txt.gz",
}
"""Which files of each Debian package are documents."""

SHORTEST = 4096
HELD_OUT_ONE_IN = 20
END_OF_DOCUMENT, END_OF_PART = b"\0", b"\0\0"


@dataclass(frozen=True)
class Text:
    """Bytes of documents that follow one another, each closed by a zero.

    Args:
        train: `[bytes]` uint8.
        held_out: of other documents.
    """

    train: Tensor
    held_out: Tensor


def load() -> Text:
    """The text, fetched if it is not in the cache folder."""
    content = lzma.decompress(fetch().read_bytes())
    parts = content.split(END_OF_PART)
    if len(parts) != 2:
        raise ValueError(f"language.xz holds {len(parts)} parts, expected 2; remove it from {cache_folder()}")
    return Text(*(torch.from_numpy(np.frombuffer(part + END_OF_DOCUMENT, np.uint8).copy()) for part in parts))


def fetch() -> Path:
    """The packed text in the cache folder; made there if it is not."""
    path = cache_folder() / "language.xz"
    if not path.exists():
        documents = [document for package in PACKAGES for document in documents_of(package)]
        say(f"packing {len(documents)} documents")
        with whole_file(path) as part:
            part.write_bytes(pack(documents))
        say(f"packed: {path.stat().st_size / 2**20:.1f} MiB")
    return path


def pack(documents: list[tuple[str, bytes]]) -> bytes:
    """Names and contents, divided and shuffled by a hash of the name: what to learn from, then what is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for digest, content in sorted((hashlib.sha256(name.encode()).digest(), content) for name, content in documents):
        parts[digest[-1] % HELD_OUT_ONE_IN == 0].append(content)
    return lzma.compress(END_OF_PART.join(END_OF_DOCUMENT.join(part) for part in parts))


def documents_of(package: str) -> Iterator[tuple[str, bytes]]:
    """Name and text of each document of a Debian package, which is downloaded and not installed.

    Raises:
        RuntimeError: apt cannot get the package.
    """
    say(f"fetching the Debian package {package}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"apt-get is not there; put language.xz into {cache_folder()}") from None
        except subprocess.CalledProcessError as failed:
            raise RuntimeError(f"apt cannot get {package}: {failed.stderr.strip()[-300:]}") from None
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(archive), folder], check=True)
        for path in sorted(Path(folder).rglob(PACKAGES[package])):
            if path.is_file() and not path.is_symlink():
                content = plain(path)
                if len(content) >= SHORTEST:
                    yield f"{package}/{path.name}", content


def plain(path: Path) -> bytes:
    """The text of a file: unpacked, without tags, at most one empty line at a time, no zeros."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = content.decode("utf-8", "replace").replace("\0", "")
    if path.suffix == ".html":
        text = re.sub(r"<(script|style|head|svg)\b.*?</\1>", "", text, flags=re.DOTALL | re.IGNORECASE)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n\s*\n", "\n\n", text).strip().encode()
