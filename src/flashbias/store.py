"""`save` and `load`: factored biases in safetensors files, with what was promised of them.

The header of a file holds, as strings, what a reader may want to know without opening a tensor:

| key | value |
|---|---|
| `flashbias.format` | version of this layout, an integer |
| `flashbias.version` | version of the library that wrote it |
| `flashbias.bias` | JSON: the groups of heads, each with its heads, form and ranks |
| `flashbias.tol`, `flashbias.certificate` | the promise that was asked for, and the one that is kept |
| `flashbias.ranks` | rank of each head, `-` where a head is a matrix |
| `flashbias.report` | JSON: the whole report |

Tensors are named as the fields of `FactoredBias`: `phi_q`, `phi_k`, `table`, `code_q`, `code_k`. Those of a `MixedBias`
stand behind the number of their group, `0.phi_q`; a dense part is `1.matrix`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashbias.decompose.cross import CrossReport
from flashbias.decompose.report import Report
from flashbias.factored import FactoredBias
from flashbias.files import open_safetensors, safetensors_torch, whole_file
from flashbias.mixed import MixedBias
from flashbias.version import __version__

__all__ = ["FORMAT", "load", "save"]

FORMAT = 1
"""Version of the layout. It rises when a file can no longer be read by an older library."""

OWN = "flashbias."
FIELDS = ("phi_q", "phi_k", "table", "code_q", "code_k")


def save(bias: FactoredBias | MixedBias, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a bias and its report into a safetensors file.

    The file is written under another name and renamed: it is there as a whole or not at all. Gradients are not
    stored, and tensors come back on the CPU.

    Args:
        bias: what `compress` or a bias family returned, or factors of your own.
        path: of the file; one that is there is replaced.
        metadata: strings of your own for the header, such as the model that the bias is from. `safetensors.safe_open`
            shows them; `load` does not.

    Raises:
        TypeError: `bias` is no bias, its report is of a kind that cannot be stored, or metadata are not strings.
        ValueError: a name in `metadata` begins with `flashbias.`.
        ModuleNotFoundError: safetensors is not installed.

    Examples:
        >>> import tempfile, torch, flashbias as fb
        >>> from flashbias.store import load, save
        >>> bias = fb.Alibi(num_heads=2)(seqlen_q=16, seqlen_k=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(bias, f"{folder}/alibi.safetensors", metadata={"model": "mine"})
        ...     torch.equal(load(f"{folder}/alibi.safetensors").dense(), bias.dense())
        True
    """
    writer = safetensors_torch()
    tensors, header = _tensors(bias), {**_checked(metadata), **_header(bias)}
    with whole_file(Path(path)) as part:
        writer.save_file(tensors, str(part), metadata=header)


def load(path: str | Path) -> FactoredBias | MixedBias:
    """Read a bias that `save`, or `flashbias factor`, wrote.

    Args:
        path: of the file.

    Returns:
        The bias on the CPU, equal to the bit, with its report.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, one cut short, one without a bias of this library, or one written by a
            version whose layout this one does not know.
        ModuleNotFoundError: safetensors is not installed.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        _check_format(header, path)
        # Copied out of the mapping, so that a file that is changed later cannot change the bias.
        names = file.keys()
        tensors = {name: file.get_tensor(name).clone() for name in names}
    try:
        return _restored(header, tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


# -------------------------------------------------------------------- to a file


def _checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(metadata or {})
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {name!r}: {value!r}")
        if name.startswith(OWN):
            raise ValueError(f"metadata must not begin with {OWN!r}, which is the library's own, got {name!r}")
    return found


def _groups(bias: FactoredBias | MixedBias) -> dict[str, tuple[FactoredBias | Tensor, tuple[int, ...] | None]]:
    """Prefix of the names of each group's tensors -> the part and its heads."""
    if isinstance(bias, FactoredBias):
        return {"": (bias, None)}
    if isinstance(bias, MixedBias):
        pairs = zip(bias.parts, bias.heads, strict=True)
        return {f"{number}.": (part, heads) for number, (part, heads) in enumerate(pairs)}
    raise TypeError(f"bias must be a FactoredBias or a MixedBias, got {type(bias)}")


def _tensors(bias: FactoredBias | MixedBias) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for prefix, (part, _) in _groups(bias).items():
        if isinstance(part, Tensor):
            named[f"{prefix}matrix"] = part
        else:
            named |= {prefix + name: getattr(part, name) for name in FIELDS if getattr(part, name) is not None}
    # Cloned, because the format allows no two tensors that share memory, and none that is not contiguous.
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in named.items()}


def _header(bias: FactoredBias | MixedBias) -> dict[str, str]:
    groups = [
        {"form": "dense", "heads": heads}
        if isinstance(part, Tensor)
        else {"form": "factored", "heads": heads, "ranks": part.ranks}
        for part, heads in _groups(bias).values()
    ]
    header = {
        "format": str(FORMAT),
        "version": __version__,
        "bias": json.dumps({"kind": type(bias).__name__, "groups": groups}),
        "ranks": _ranks(bias),
    }
    report = bias.report
    if report is not None:
        if type(report) not in _READERS:
            known = ", ".join(kind.__name__ for kind in _READERS)
            raise TypeError(
                f"the report of the bias must be one of {known} to be stored, got {type(report).__name__}: "
                "leave it out with dataclasses.replace(bias, report=None)"
            )
        plain = report.to_dict() if isinstance(report, Report) else asdict(report)
        header["report"] = json.dumps({"kind": type(report).__name__, **plain})
        header["tol"] = repr(report.tol)
    if isinstance(report, Report):
        header["certificate"] = repr(report.certificate)
    return {OWN + name: value for name, value in header.items()}


def _ranks(bias: FactoredBias | MixedBias) -> str:
    """Rank of each head, in the order of heads."""
    ranks: dict[int, str] = {}
    for part, heads in _groups(bias).values():
        count = part.shape[-3] if heads is None else len(heads)
        own = ["-"] if isinstance(part, Tensor) else [str(rank) for rank in part.ranks or [part.rank]]
        own *= count // len(own)  # one rank may stand for a group that shares its part
        ranks |= dict(zip(range(count) if heads is None else heads, own, strict=True))
    return " ".join(ranks[head] for head in sorted(ranks))


# -------------------------------------------------------------------- from a file


def _check_format(header: Mapping[str, str], path: Path) -> None:
    found = header.get(f"{OWN}format")
    if found is None:
        raise ValueError(
            f"{path} holds no bias of this library: its header has no {OWN}format. "
            "`flashbias factor` makes one from a tensor"
        )
    if not found.isdecimal() or int(found) < 1:
        raise ValueError(f"{path} is damaged: {OWN}format is {found!r}")
    if int(found) > FORMAT:
        raise ValueError(
            f"{path} has format {found}, written by flashbias {header.get(f'{OWN}version', '(unknown)')}; "
            f"flashbias {__version__} reads formats up to {FORMAT}: install a newer version"
        )


def _restored(header: Mapping[str, str], tensors: dict[str, Tensor]) -> FactoredBias | MixedBias:
    layout = json.loads(header[f"{OWN}bias"])
    groups = layout["groups"]
    report = _report(header.get(f"{OWN}report"))
    if layout["kind"] == FactoredBias.__name__:
        return replace(_factored("", groups[0], tensors), report=report)
    if layout["kind"] != MixedBias.__name__:
        raise ValueError(f"unknown kind of bias {layout['kind']!r}")
    parts = tuple(
        tensors[f"{n}.matrix"] if group["form"] == "dense" else _factored(f"{n}.", group, tensors)
        for n, group in enumerate(groups)
    )
    return MixedBias(parts, tuple(tuple(group["heads"]) for group in groups), report)


def _factored(prefix: str, group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FactoredBias:
    optional = {name: tensors.get(prefix + name) for name in FIELDS[2:]}
    return FactoredBias(tensors[f"{prefix}phi_q"], tensors[f"{prefix}phi_k"], **optional, ranks=group["ranks"])


def _report(text: str | None) -> Report | CrossReport | None:
    if text is None:
        return None
    plain = json.loads(text)
    kind = plain.pop("kind")
    readers = {known.__name__: read for known, read in _READERS.items()}
    return readers[kind](plain)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _cross_report(plain: Mapping[str, Any]) -> CrossReport:
    return CrossReport(**{name: _tuples(value) for name, value in plain.items()})


_READERS: dict[type, Callable[[dict[str, Any]], Report | CrossReport]] = {
    Report: Report.from_dict,
    CrossReport: _cross_report,
}
"""Kinds of reports, and how each is read back."""
