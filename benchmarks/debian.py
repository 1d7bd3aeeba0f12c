"""Files out of Debian packages, fetched once into a cache folder and not installed.

The folder is `$FLASHBIAS_CACHE`, by default `~/.cache/flashbias`. What is in it is complete: everything is made under
another name, checked, and renamed. A machine without apt takes a copy of the folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.record import say

from flashbias.files import whole_file

__all__ = ["cache_folder", "fetched"]


def cache_folder() -> Path:
    """Where fetched files are kept."""
    return Path(os.environ.get("FLASHBIAS_CACHE") or Path.home() / ".cache" / "flashbias")


def fetched(package: str, name: str, sha256: str) -> Path:
    """The file in the cache folder; fetched and checked if it is not there.

    Args:
        package: of Debian.
        name: of the file, which one folder of the package holds.
        sha256: of its content.

    Raises:
        RuntimeError: apt cannot get the package.
        ValueError: the file in it is another one.
    """
    path = cache_folder() / name
    if not path.exists():
        say(f"fetching {name} of the Debian package {package}")
        with whole_file(path) as part:
            part.write_bytes(_checked(_out_of(package, name), name, sha256))
    return path


def _out_of(package: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"apt-get is not there; put {name} of {package} into {cache_folder()}") from None
        except subprocess.CalledProcessError as failed:
            raise RuntimeError(f"apt cannot get {package}: {failed.stderr.strip()[-300:]}") from None
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(archive), folder], check=True)
        (path,) = Path(folder).rglob(name)
        return path.read_bytes()


def _checked(content: bytes, name: str, sha256: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, expected {sha256}")
    return content
