"""What attention costs on a device: a linear model for each provider, and the files that hold its coefficients.

The model is linear, with coefficients that are not negative:

    t = c_launch + sum over heads, features:  c_feature * x_feature(workload, rank and table of the head)

| feature | what is counted for one head, over the whole batch |
|---|---|
| `launch` | one for each call, whatever the number of heads |
| `programs` | blocks of `PROGRAM_ROWS` queries: each starts, and ends with a division and a store |
| `matrix` | score pairs × (head_dim + head_dim_v): the matrix unit |
| `pairs` | score pairs: exponentials and instructions |
| `columns` | score pairs × columns that the factors add to the operands |
| `table` | score pairs of a head with a relative table: what its loop does in every tile |
| `table_over_32`, `table_over_64` | the same in kernels for heads wider than that: their tiles leave fewer registers |
| `lookups` | score pairs that read an entry: those of tiles near the diagonal where the table is `local`, else all |
| `bytes` | bytes of query, key, value, output and packed factors |
| `dense_bytes` | bytes of the dense bias: once for each of the biases that the batch has |

Each provider (this library's implementations, the peers that read a dense matrix, those without a bias) has its own
coefficients, for a forward pass and for forward and backward, in `coefficients/DEVICE.json` together with the
measurements behind them. `flashbias bench --calibrate` makes such a file.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from flashbias.attention import packing
from flashbias.attention.call import HALF
from flashbias.attention.layout import next_power_of_2
from flashbias.attention.workload import TableSize, Training, Workload, round_up

__all__ = ["FEATURES", "FORMS", "Coefficients", "Device", "Model", "NoCoefficientsError", "smallest"]

FEATURES = (
    "launch", "programs", "matrix", "pairs", "columns", "table", "table_over_32", "table_over_64", "lookups", "bytes",
    "dense_bytes",
)  # fmt: skip
PROGRAM_ROWS = 128

FORMS = ("factored", "table", "table+factored", "dense", "bias-free")
_FAMILIES: dict[str, str] = dict(zip(FORMS, ("ours", "ours", "ours", "dense", "bias-free"), strict=True))

Operands = Literal["packed", "ready", "concatenated", "none"]
Device = str | Path | torch.device | None

HOW_TO_MEASURE = "`flashbias bench --calibrate --out coefficients.json` makes a file to pass as `device`"


class NoCoefficientsError(ValueError):
    """Nothing was measured from which this prediction could be made."""


# -------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Model:
    """Coefficients of one provider, for one kind of training.

    Args:
        family: "ours", "dense" or "bias-free".
        provider: as in the benchmarks, such as `dense/flex`.
        training: see `Workload`.
        dtypes: names of the queries' dtypes for which it holds.
        coefficients: milliseconds per unit of each feature that was measured; none is negative.
        operands: how factors come to the products: "packed" columns of their own, "ready" ones with the scale in them
            (as many for every head as for that of the largest rank), "concatenated" to queries and keys (values are
            padded to the same width), or "none".
        tile: side of the tiles in which scores are worked through; lengths are padded to a multiple.
        causal_step: keys that are skipped together under a causal mask; default `tile`.
        causal: what becomes of tiles that a causal mask hides: they are "skipped", or "computed" and masked, or the
            mask is "unsupported".
        max_elements: entries that a dense bias may have, None for any number.
        max_columns: columns that factors may have, None for any number.
    """

    family: str
    provider: str
    training: Training
    dtypes: tuple[str, ...]
    coefficients: Mapping[str, float]
    operands: Operands = "none"
    tile: int = 64
    causal_step: int | None = None
    causal: Literal["skipped", "computed", "unsupported"] = "skipped"
    max_elements: int | None = None
    max_columns: int | None = None

    def __post_init__(self) -> None:
        """Check the coefficients, which come from a file."""
        for name, value in self.coefficients.items():
            if name not in FEATURES:
                raise ValueError(f"unknown feature {name!r} of {self.provider}; features are {', '.join(FEATURES)}")
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"coefficient {name} of {self.provider} must be finite and >= 0, got {value!r}")

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Model:
        """Read one entry of a file; what it says of the fit's errors is left out."""
        known: dict[str, Any] = {name: value for name, value in entry.items() if name in cls.__dataclass_fields__}
        known["dtypes"] = tuple(known["dtypes"])
        return cls(**known)

    @property
    def launch_ms(self) -> float:
        """What a call costs before any head."""
        return self.coefficients.get("launch", 0.0)

    def features(self, workload: Workload, rank: int = 0, table: TableSize | None = None) -> dict[str, float]:
        """What one head amounts to (`launch` apart); what does not occur is left out."""
        w, batch = workload, workload.batch
        pairs = w.pairs(self.tile, causal=w.is_causal and self._skips_hidden(table), step=self.causal_step)
        columns, row_bytes, factor_bytes = self._operand_widths(w, rank)
        values = {
            "programs": batch * math.ceil(w.seqlen_q / PROGRAM_ROWS),
            "matrix": batch * pairs * (w.head_dim + w.value_dim),
            "pairs": batch * pairs,
            "columns": batch * pairs * columns,
            "bytes": (batch * row_bytes + w.biases * factor_bytes) * (w.seqlen_q + w.seqlen_k),
        }
        if self.family == "dense":
            values["dense_bytes"] = w.biases * pairs * w.dtype.itemsize
        if table is not None:
            values["table"] = batch * pairs
            if self.operands == "packed":
                width = max(w.head_dim, w.value_dim)
                values |= {f"table_over_{limit}": batch * pairs * (width > limit) for limit in (32, 64)}
            values["lookups"] = self._lookups(w, table)
        return {name: float(value) for name, value in values.items() if value}

    def head_ms(self, workload: Workload, rank: int = 0, table: TableSize | None = None) -> float:
        """What one head adds to the time of a call.

        Raises:
            NoCoefficientsError: a feature of the head was never measured.
        """
        features = self.features(workload, rank, table)
        if missing := features.keys() - self.coefficients.keys():
            raise NoCoefficientsError(
                f"{self.provider} was not measured with {', '.join(sorted(missing))} "
                f"(training={self.training!r}, {'/'.join(self.dtypes)}); {HOW_TO_MEASURE}"
            )
        return sum(self.coefficients[name] * value for name, value in features.items())

    def ms(self, workload: Workload, ranks: Iterable[int], table: TableSize | None = None) -> float:
        """Time of a call whose heads have these ranks, and all of them the table."""
        ranks = list(ranks)
        heads = Counter([max(ranks)] * len(ranks) if self.operands == "ready" and ranks else ranks).items()
        return self.launch_ms + sum(count * self.head_ms(workload, rank, table) for rank, count in heads)

    def _operand_widths(self, w: Workload, rank: int) -> tuple[int, int, int]:
        """Columns that factors add to a pair's products; bytes of a token's operands, and of its packed factors."""
        size, own = w.dtype.itemsize, w.head_dim + w.value_dim
        if self.operands == "concatenated":
            dtype = torch.float32 if w.dtype == torch.float16 else w.dtype
            terms = len(packing.products(rank, dtype)) if rank else 0
            # Operands that are not split begin with a column of constants (see `sdpa`).
            columns = rank * terms + (rank > 0 and dtype != torch.bfloat16)
            width = round_up(max(w.head_dim + columns, w.value_dim), 8)
            return 2 * width - own, 2 * width * dtype.itemsize, columns * dtype.itemsize
        columns = {"packed": _packed_columns, "ready": _ready_columns}.get(self.operands, _no_columns)(w, rank)
        return columns, own * size, columns * size

    def can_take(self, w: Workload, ranks: Iterable[int], table: TableSize | None) -> bool:
        """Whether the provider does a bias of this form at all."""
        columns = self._operand_widths(w, max(ranks, default=0))[0]
        return self.max_columns is None or columns <= self.max_columns

    def _skips_hidden(self, table: TableSize | None) -> bool:
        return self.causal == "skipped" and not (self.operands == "concatenated" and table is not None)

    def _lookups(self, w: Workload, table: TableSize) -> int:
        if self.operands == "concatenated":
            # A mask that the whole batch shares is written down, once more where pairs are hidden.
            return w.seqlen_q * w.seqlen_k * (2 if w.is_causal else 1)
        return w.batch * w.pairs(self.tile, half_width=table.near)


def _no_columns(w: Workload, rank: int) -> int:
    return 0


def _ready_columns(w: Workload, rank: int) -> int:
    """Columns of factors that have the default scale in them: a power of two that the matrix unit takes."""
    if rank == 0:
        return 0
    terms = packing.ready_products(rank, w.factor_dtype, w.factor_dtype, w.head_dim**-0.5, w.dtype)
    return max(16, next_power_of_2(rank * len(terms)))


def _packed_columns(w: Workload, rank: int) -> int:
    """Columns that kernels multiply for a factor: widths are powers of two, wide factors go chunk by chunk."""
    if rank == 0:
        return 0
    factor = torch.empty(0, dtype=w.factor_dtype)
    columns = rank * len(packing.products(rank, w.dtype)) if packing.is_packed(factor, factor, w.dtype) else rank
    widest = 128 if w.dtype in HALF else 64
    return round_up(columns, min(widest, max(16, 1 << (columns - 1).bit_length())))


def smallest(models: Iterable[Model], ms: Callable[[Model], float]) -> tuple[Model | None, float]:
    """The model with the smallest time, and that time; (None, inf) without any.

    What was never measured with some feature has no time, and is left out while another has one.

    Raises:
        NoCoefficientsError: none has a time.
    """
    timed: list[tuple[Model, float]] = []
    unknown: NoCoefficientsError | None = None
    for model in models:
        try:
            timed.append((model, ms(model)))
        except NoCoefficientsError as error:
            unknown = error
    if not timed and unknown is not None:
        raise unknown
    return min(timed, key=lambda pair: pair[1], default=(None, math.inf))


# -------------------------------------------------------------------- coefficients of a device


@dataclass(frozen=True)
class Coefficients:
    """Everything that was measured on one device.

    Args:
        device: its name.
        models: one for each provider, training and dtype.
        provenance: device, versions, source of the measurements, date, errors of the fit.
        memory_bytes: memory of the device, None where it is not known; a dense bias beyond it is out of reach.
    """

    device: str
    models: tuple[Model, ...]
    provenance: Mapping[str, Any]
    memory_bytes: int | None = None

    @property
    def is_provisional(self) -> bool:
        """Whether a part rests on something else than the benchmarks."""
        return bool(self.provenance.get("provisional"))

    def candidates(self, form: str, workload: Workload) -> list[Model]:
        """Models of the form's providers that were measured with this training and dtype and can do the workload.

        Raises:
            NoCoefficientsError: no provider of the form was measured with this training and dtype.
        """
        family, dtype = _FAMILIES[form], str(workload.dtype).removeprefix("torch.")
        found = [
            model
            for model in self.models
            if (model.family, model.training) == (family, workload.training) and dtype in model.dtypes
        ]
        if not found:
            known = sorted({f"{m.training}/{d}" for m in self.models if m.family == family for d in m.dtypes})
            raise NoCoefficientsError(
                f"no coefficients for form {form!r}, training={workload.training!r} and {dtype} on {self.device}; "
                f"there are {', '.join(known) or 'none of this form'}; {HOW_TO_MEASURE}"
            )
        return [model for model in found if self._can(model, workload)]

    def _can(self, model: Model, w: Workload) -> bool:
        if w.is_causal and model.causal == "unsupported":
            return False
        if model.family != "dense":
            return True
        elements = w.matrix_bytes // w.dtype.itemsize
        copies = 2 if w.training == "bias" else 1  # the gradient is as large
        fits_memory = self.memory_bytes is None or copies * w.matrix_bytes < self.memory_bytes
        return fits_memory and (model.max_elements is None or elements < model.max_elements)

    def fastest(
        self, form: str, workload: Workload, ranks: Sequence[int], table: TableSize | None
    ) -> tuple[Model | None, float]:
        """The provider of a form with the smallest predicted time, and that time; (None, inf) if out of reach."""
        able = [model for model in self.candidates(form, workload) if model.can_take(workload, ranks, table)]
        return smallest(able, lambda model: model.ms(workload, ranks, table))

    @classmethod
    def load(cls, path: Path | str) -> Coefficients:
        """Read a file that `flashbias bench --calibrate` wrote.

        Raises:
            ValueError: the file holds no coefficients; the message says what is wrong.
        """
        return cls._parse(Path(path).read_text(), str(path))

    @classmethod
    def _parse(cls, text: str, path: str) -> Coefficients:
        try:
            content = json.loads(text)
            models = tuple(Model.from_dict(entry) for entry in content["models"])
            return cls(content["device"], models, content["provenance"], content["memory_bytes"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no coefficients: {type(error).__name__}: {error}") from None

    @classmethod
    def of(cls, device: Device = None) -> Coefficients:
        """Find the coefficients of a device.

        Args:
            device: a path to a file, a `torch.device` or its name ("cpu", "cuda:0"), or the name of a device
                whose coefficients come with the package ("h200"). Default: the current GPU, else the CPU.

        Raises:
            NoCoefficientsError: none come with the package for this device.
        """
        if isinstance(device, Path) or (isinstance(device, str) and device.endswith(".json")):
            return cls.load(device)
        name = _device_name(device)
        words = re.split(r"[^a-z0-9]+", name.lower())
        known = _shipped()
        for key in known:
            if key in words:
                return _load_shipped(key)
        raise NoCoefficientsError(
            f"no coefficients for device {name!r}; there are {', '.join(known)}; {HOW_TO_MEASURE}"
        )


def _device_name(device: Device) -> str:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, str) and re.fullmatch(r"(cpu|cuda)(:\d+)?", device):
        device = torch.device(device)
    if not isinstance(device, torch.device):
        return str(device)
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else str(device)


@functools.cache
def _shipped() -> tuple[str, ...]:
    files = (file.name for file in resources.files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


@functools.cache
def _load_shipped(key: str) -> Coefficients:
    file = resources.files(__name__) / f"{key}.json"
    return Coefficients._parse(file.read_text(), file.name)
