"""The motorbike: 132,871 vertices out of a Debian package, fetched once."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from benchmarks.decomposition.results import say
from torch import Tensor

from flashbias.files import whole_file

__all__ = ["box_diagonal", "motorbike", "vertices"]

PACKAGE = "openfoam-examples"
MOTORBIKE = "motorBike.obj.gz"
MOTORBIKE_SHA256 = "d06307675434ac6f1aecd458ae08efeeaae908516dce1d6b4a74db679cebc0a7"


def vertices(obj: Path) -> Tensor:
    """`[N, 3]`, float32: the lines `v x y z` of a gzipped Wavefront file."""
    with gzip.open(obj, "rt") as lines:
        places = [[float(number) for number in line.split()[1:4]] for line in lines if line.startswith("v ")]
    return torch.tensor(places)


def box_diagonal(x: Tensor) -> float:
    """Diagonal of the smallest box with all vertices."""
    return float((x.amax(0) - x.amin(0)).norm())


def motorbike() -> Path:
    """The mesh in the cache folder; fetched and checked if it is not there."""
    path = Path(os.environ.get("FLASHBIAS_CACHE") or Path.home() / ".cache" / "flashbias") / MOTORBIKE
    if not path.exists():
        say(f"fetching the Debian package {PACKAGE}, 36 MB")
        with whole_file(path) as part:
            part.write_bytes(packed_motorbike())
    return path


def packed_motorbike() -> bytes:
    """The mesh out of the Debian package.

    Raises:
        RuntimeError: apt cannot get the package.
        ValueError: the file in it is another one.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"apt-get is not there; get {MOTORBIKE} of {PACKAGE} and name it with --obj") from None
        except subprocess.CalledProcessError as failed:
            raise RuntimeError(f"apt cannot get {PACKAGE}: {failed.stderr.strip()[-300:]}") from None
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", str(package), folder], check=True)
        (path,) = Path(folder).rglob(MOTORBIKE)
        content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != MOTORBIKE_SHA256:
        raise ValueError(f"{MOTORBIKE} has sha256 {found}, expected {MOTORBIKE_SHA256}")
    return content
