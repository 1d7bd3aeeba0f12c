"""A bias from a file: npy, pt or safetensors; a matrix per head, or a relative table; one layer or many.

What is a matrix in the file stays there: tensors are mapped into memory, and a head is read when it is worked on.
Nothing is unpickled but tensors in plain containers.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from flashbias.biases.window import window_codes, window_table
from flashbias.factored import FactoredBias
from flashbias.files import open_safetensors

__all__ = ["Layer", "read_layers"]

SUFFIXES = {".npy": "npy", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors"}
"""Names by which a file says what it holds."""

MOST_KEYS = 12
"""Keys that an error lists."""

HEAD_COPIES = 10
"""Matrices of one head, in float64, that exist at once while it is compressed."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The bias of one layer, as it is stored.

    Args:
        name: what to call it; "" for the only one of a file.
        stored: `[H, N, M]`, or the table `[H, T]`.
        window: sides of the window whose offsets the table tells apart.
        seqlen: N of a table along a line.
        mapped: whether `stored` lies in the file, and in memory only where it was read.
    """

    name: str
    stored: Tensor
    window: tuple[int, ...] = ()
    seqlen: int | None = None
    mapped: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, N and M."""
        if self.stored.dim() == 3:
            heads, seqlen_q, seqlen_k = self.stored.shape
            return heads, seqlen_q, seqlen_k
        tokens = self.seqlen or math.prod(self.window) + self._has_class_token
        return self.stored.shape[0], tokens, tokens

    @property
    def bytes_needed(self) -> int:
        """Memory that it takes to compress the layer: copies of one head, and the matrix where it is not mapped."""
        heads, seqlen_q, seqlen_k = self.shape
        is_in_memory = not (self.mapped and self.stored.dim() == 3)
        return seqlen_q * seqlen_k * (8 * HEAD_COPIES + is_in_memory * heads * self.stored.element_size())

    def dense(self) -> Tensor:
        """`[H, N, M]`: what is stored, or the matrix that its table stands for."""
        if self.stored.dim() == 3:
            return self.stored
        if self.seqlen is not None:
            return FactoredBias.from_table(self.stored, self.seqlen, self.seqlen).dense()
        table = window_table(self.stored.mT, self._has_class_token)
        code_q, code_k = window_codes(self.window, self._has_class_token)
        return FactoredBias.from_table(table, len(code_q), len(code_k), code_q, code_k).dense()

    @property
    def _has_class_token(self) -> bool:
        return bool(self.window) and self.stored.shape[1] > _offsets(self.window)


def read_layers(
    path: str | Path,
    key: str | None = None,
    *,
    window: Sequence[int] | None = None,
    seqlen: int | None = None,
) -> tuple[Layer, ...]:
    """Find the bias in a file.

    | in the file | is read as |
    |---|---|
    | `[N, M]`, `[H, N, M]`, `[L, H, N, M]` | a matrix for each head of each layer |
    | `[T]`, `[T, H]`, `[H, T]` and `window` | Swin's table: entry by query minus key; with three more, BEiT's |
    | `[T]`, `[T, H]`, `[H, T]` and `seqlen` | a table along a line: entry by key minus query, tails constant |

    Args:
        path: a `.npy`, `.pt`, `.pth`, `.bin` or `.safetensors` file.
        key: which tensor: its name; in nested containers the names joined by dots. A pattern with `*` takes all that
            match as layers, in natural order. Default: the only tensor of the file.
        window: sides of the window of a relative table, two or three.
        seqlen: number of queries, and of keys, of a relative table along a line.

    Returns:
        The layers; nothing of a matrix has been read yet.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: safetensors is needed and not installed.
        TypeError: the tensor is not floating point.
        ValueError: the file is not what its name says, is damaged, or holds pickled objects; the key is missing or must
            be given; the shape is not one of those above.

    Examples:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/bias.npy", np.zeros((4, 16, 16), dtype=np.float32))
        ...     (layer,) = read_layers(f"{folder}/bias.npy")
        ...     layer.shape
        (4, 16, 16)
    """
    path = Path(path)
    if window is not None and seqlen is not None:
        raise ValueError(f"window and seqlen exclude each other, got {tuple(window)} and {seqlen}")
    if window is not None and (len(window) not in (2, 3) or min(window) < 1):
        raise ValueError(f"window must be two or three positive sides, got {tuple(window)}")
    if seqlen is not None and seqlen < 1:
        raise ValueError(f"seqlen must be at least 1, got {seqlen}")
    kind = _kind(path)
    found, mapped = {"npy": _read_npy, "torch": _read_torch, "safetensors": _read_safetensors}[kind](path, key)
    layers: list[Layer] = []
    for name, tensor in found.items():
        label = name if len(found) > 1 else ""
        layers += _layers(path, name, label, tensor, tuple(window or ()), seqlen, mapped)
    return tuple(layers)


# -------------------------------------------------------------------- kinds of files


def _kind(path: Path) -> str:
    """What a file is by its name, if its first bytes agree."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not there'}")
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty")
    found = _by_content(start, kind)
    if found != kind and (found is not None or kind != "safetensors"):
        raise ValueError(f"{path} is not what its name says: it looks like {_CONTENT[found]}")
    return kind


_CONTENT = {
    "npy": "a numpy file (.npy)",
    "torch": "what torch.save (.pt) or numpy.savez write",
    "safetensors": "a safetensors file",
    "pickle": "a pickle, which is refused",
    "hdf5": "an HDF5 file",
    None: "nothing that is known",
}


def _by_content(start: bytes, kind: str) -> str | None:
    """What the first nine bytes of a file say."""
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PK"):
        return "torch"
    if start.startswith(b"\x89HDF"):
        return "hdf5"
    if start[8:] == b"{":
        return "safetensors"
    if start.startswith(b"\x80"):  # torch's older format is a pickle as well
        return "torch" if kind == "torch" else "pickle"
    return None


Found = tuple[dict[str, Tensor], bool]
"""Tensors by name, and whether they are mapped."""


def _read_npy(path: Path, key: str | None) -> Found:
    if key is not None:
        raise ValueError(f"{path} holds one array without a name, so there is no key {key!r}")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        if "Python objects" in str(error):
            raise ValueError(
                f"{path} holds pickled Python objects, which are refused: save an array of numbers"
            ) from None
        raise ValueError(f"{path} is damaged, cut short, or no numpy file: {error}") from None
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{path} must hold float16, float32 or float64, got {array.dtype}")
    mapped = array.dtype.isnative
    return {"": torch.from_numpy(array if mapped else array.astype(array.dtype.newbyteorder("=")))}, mapped


def _read_safetensors(path: Path, key: str | None) -> Found:
    with open_safetensors(path) as file:
        header = {name: file.get_slice(name) for name in _names_of(file)}
        shapes = {name: tuple(entry.get_shape()) for name, entry in header.items()}
        return {name: file.get_tensor(name) for name in _choose(path, key, shapes)}, True


def _names_of(file: Any) -> list[str]:
    return list(file.keys())


def _read_torch(path: Path, key: str | None) -> Found:
    content, mapped = _load_torch(path)
    tensors = _flatten(path, content)
    if not tensors:
        raise ValueError(f"{path} holds no tensor, but {type(content).__name__}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {name: tensors[name].detach() for name in _choose(path, key, shapes)}, mapped


def _load_torch(path: Path) -> tuple[Any, bool]:
    """What torch reads without running code, and whether it is mapped: torch's older format cannot be."""
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), mapped
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds {_what_is_pickled(path, mapped)}, which is refused because unpickling can run code: "
            "save the tensors alone, with torch.save(tensor, path) or in a safetensors file"
        ) from None
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file can make an unpickler stumble over anything
        if "allocate memory" in str(error):
            raise
        reason = re.split(r"\. |\n", str(error))[0]
        raise ValueError(f"{path} is damaged, cut short, or was not written by torch.save: {reason}") from None


def _what_is_pickled(path: Path, mapped: bool) -> str:
    """What a pickle wants to make, as far as that can be said without making it."""
    if not mapped:
        return "a pickle with more than tensors, or a damaged one"
    names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    return f"pickled Python objects beside tensors ({names or 'unknown ones'})"


def _flatten(path: Path, content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested containers, by the names that lead to them, joined by dots."""
    if isinstance(content, Tensor):
        return {prefix: content}
    if isinstance(content, Mapping):
        inner = list(content.items())
    elif isinstance(content, list | tuple):
        inner = list(enumerate(content))
    else:
        return {}
    tensors: dict[str, Tensor] = {}
    for name, value in inner:
        below = _flatten(path, value, f"{prefix}.{name}" if prefix else str(name))
        if twice := below.keys() & tensors.keys():
            raise ValueError(f"{path} holds two tensors that would both be called {min(twice)!r}")
        tensors |= below
    return tensors


# -------------------------------------------------------------------- keys


def _choose(path: Path, key: str | None, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names that the key means."""
    if key is None:
        if len(shapes) == 1:
            return list(shapes)
        if not shapes:
            raise ValueError(f"{path} holds no tensor")
        raise ValueError(f"{path} holds {len(shapes)} tensors; key must name one: {_listed(shapes, '')}")
    if key in shapes:
        return [key]
    if any(mark in key for mark in "*?["):
        if matches := fnmatch.filter(shapes, key):
            return sorted(matches, key=_natural)
        raise ValueError(f"{path} has no tensor that matches key {key!r}; there are {_listed(shapes, key)}")
    raise ValueError(f"{path} has no tensor {key!r}; there are {_listed(shapes, key)}")


def _listed(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    """The names that come closest, or that sound like a bias, with their shapes."""
    close = difflib.get_close_matches(key, shapes, MOST_KEYS, 0.5) if key else []
    named = [name for name in shapes if re.search(r"relative|bias_table|attn_bias|rel_pos|alibi", name)]
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    names = list(dict.fromkeys([*close, *named, *matrices, *shapes]))
    shown = [f"{name or '(no name)'} [{', '.join(map(str, shapes[name]))}]" for name in names[:MOST_KEYS]]
    more = f", and {len(names) - MOST_KEYS} more" if len(names) > MOST_KEYS else ""
    return ", ".join(shown) + more


def _natural(name: str) -> list[tuple[int, str]]:
    """Order in which 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# -------------------------------------------------------------------- shapes


def _layers(
    path: Path, name: str, label: str, tensor: Tensor, window: tuple[int, ...], seqlen: int | None, mapped: bool
) -> list[Layer]:
    """One tensor as the layers it holds."""
    called = f"{path}: {name}" if name else str(path)
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise TypeError(f"{called} must be a dense tensor of floating point, got {tensor.layout} {tensor.dtype}")
    shape = tuple(tensor.shape)
    if 0 in shape:
        raise ValueError(f"{called} is empty: shape {shape}")
    if window or seqlen is not None:
        return [Layer(label, _table(called, tensor, window, seqlen), window, seqlen)]
    if len(shape) == 2:
        _check_is_matrix(called, name, shape)
        return [Layer(label, tensor[None], mapped=mapped)]
    if len(shape) == 3:
        return [Layer(label, tensor, mapped=mapped)]
    if len(shape) == 4:
        before = f"{label} " if label else ""
        names = [f"{before}layer {n}" for n in range(len(tensor))] if len(tensor) > 1 else [label]
        return [Layer(n, matrix, mapped=mapped) for n, matrix in zip(names, tensor, strict=True)]
    raise ValueError(
        f"{called} has shape {shape}; it must be [N, M], [H, N, M] or [L, H, N, M], "
        "or a relative table [T], [T, H] or [H, T] together with its window or seqlen"
    )


def _check_is_matrix(called: str, name: str, shape: tuple[int, ...]) -> None:
    """Keep a table that is called one from being taken for a matrix."""
    if shape[0] != shape[1] and re.search(r"bias_table|relative_attention_bias|rel_pos", name):
        raise ValueError(f"{called} looks like a relative table, shape {shape}: its window or seqlen must be given")


def _table(called: str, tensor: Tensor, window: tuple[int, ...], seqlen: int | None) -> Tensor:
    """`[H, T]`."""
    if tensor.dim() not in (1, 2):
        raise ValueError(
            f"{called} has shape {tuple(tensor.shape)}, which is no table [T], [T, H] or [H, T]: "
            "window and seqlen are for tables alone"
        )
    pair = tensor[None] if tensor.dim() == 1 else tensor
    if window:
        entries = _offsets(window)
        fits = [axis for axis in (0, 1) if pair.shape[axis] in (entries, entries + 3)]
        wanted = f"{entries} entries (or {entries + 3} with a class token) of the window {'x'.join(map(str, window))}"
    else:
        assert seqlen is not None
        full = 2 * seqlen - 1
        fits = [axis for axis in (0, 1) if pair.shape[axis] == full]
        if not fits:
            longer = int(pair.shape[1] >= pair.shape[0])
            fits = [longer] if pair.shape[longer] % 2 and 1 < pair.shape[longer] < full else []
        wanted = f"{full} entries of {seqlen} positions, or an odd number below that"
    if not fits:
        hint = "" if window else "; buckets of distances, as T5 has them, are expanded by flashbias.RelativeBuckets"
        raise ValueError(f"{called} has shape {tuple(tensor.shape)}; a side must have the {wanted}{hint}")
    if len(fits) == 2 and tensor.dim() == 2:
        raise ValueError(f"{called} has shape {tuple(tensor.shape)}; either side could be the {wanted}")
    return pair if fits[-1] == 1 else pair.mT


def _offsets(window: Sequence[int]) -> int:
    """Entries of a window's table."""
    return math.prod(2 * side - 1 for side in window)
