"""Monthly winds of 11 years, 1982 to 1992, over the whole globe, land and sea: the example data of NOAA's Ferret.

`monthly_navy_winds.cdf` of the Debian package `ferret-datasets`: eastward and northward wind in m/s, monthly means of
analyses of the US Navy (FNOC), on 73 x 144 places 2.5 degrees apart. Packed in hundredths of m/s; the rounding is at
most 0.005 m/s. The file marks missing values by -99.9 and has none; it does not say where sea and land are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from benchmarks.debian import cache_folder, fetched
from benchmarks.record import say
from torch import Tensor

from flashbias.files import whole_file

__all__ = ["Winds", "fetch", "load"]

PACKAGE, NAME = "ferret-datasets", "monthly_navy_winds.cdf"
SHA256 = "225a9e4fed7bb1a7b558afb662abbe2dc5e3d3db4100fa019cb994f10b115faa"
UNIT = 0.01  # m/s
MISSING = -99.9
HELD_OUT, VALIDATION = 24, 12
"""Months at the end: of the test, and before them those that choose the epoch."""


@dataclass(frozen=True)
class Winds:
    """Winds month by month, from a January on.

    Args:
        field: `[months, 2, latitudes, longitudes]` in m/s, eastward and northward, from south to north.
        latitudes: `[latitudes]` in degrees.
    """

    field: Tensor
    latitudes: Tensor

    def __len__(self) -> int:
        """How many months."""
        return len(self.field)

    @property
    def taught(self) -> range:
        """Months that are predicted in training; the first has none before it."""
        return range(1, len(self) - HELD_OUT - VALIDATION)

    @property
    def validation(self) -> range:
        """Months that choose the epoch."""
        return range(self.taught.stop, self.taught.stop + VALIDATION)

    @property
    def held_out(self) -> range:
        """Months of the test."""
        return range(self.validation.stop, len(self))

    @cached_property
    def weights(self) -> Tensor:
        """`[latitudes, 1]`, mean 1: the area of a place, cos(latitude)."""
        weights = self.latitudes.deg2rad().cos().clamp(min=0)
        return (weights / weights.mean())[:, None]

    @cached_property
    def climatology(self) -> Tensor:
        """`[12, 2, latitudes, longitudes]`: the mean of each calendar month over the months before the validation."""
        seen = self.field[: self.taught.stop]
        return torch.stack([seen[month::12].mean(0) for month in range(12)])

    @cached_property
    def spread(self) -> Tensor:
        """Of the anomalies of the months before the validation, in m/s, weighted by area: the unit of the model."""
        anomaly = self.anomaly(torch.arange(self.taught.stop, device=self.field.device))
        return (anomaly.square() * self.weights).mean().sqrt()

    def mean(self, months: Tensor) -> Tensor:
        """The climatology of some months."""
        return self.climatology[months % 12]

    def anomaly(self, months: Tensor) -> Tensor:
        """What some months differ from it by."""
        return self.field[months] - self.mean(months)

    @cached_property
    def damping(self) -> Tensor:
        """`[2, 1, 1]`: how much of an anomaly is left a month later, by least squares over the months of training."""
        months = torch.tensor(self.taught, device=self.field.device)
        before, after = self.anomaly(months - 1), self.anomaly(months)
        product, square = (((x * before) * self.weights).sum((0, 2, 3)) for x in (after, before))
        return (product / square)[:, None, None]

    def guess(self, months: Tensor) -> Tensor:
        """The climatology of some months, and what is left of the anomaly of the month before."""
        return self.mean(months) + self.damping * self.anomaly(months - 1)

    def errors(self, predicted: Tensor, months: Tensor) -> Tensor:
        """`[months, 2]`: root mean square over the globe of each month's error in each component, in m/s."""
        squares = (predicted - self.field[months]).square() * self.weights
        return squares.mean((-2, -1)).sqrt()

    def to(self, device: torch.device) -> Winds:
        """The same on a device."""
        return Winds(self.field.to(device), self.latitudes.to(device))


def fetch() -> Path:
    """The packed file in the cache folder; made there if it is not."""
    path = cache_folder() / "winds.npz"
    if path.exists():
        return path
    source = fetched(PACKAGE, NAME, SHA256)
    say("packing winds")
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **packed(source))  # pyright: ignore[reportArgumentType]
    source.unlink()
    say(f"packed: {path.stat().st_size / 2**20:.1f} MiB")
    return path


def packed(source: Path) -> dict[str, np.ndarray]:
    """What a netCDF file of winds holds, as small integers.

    Raises:
        ValueError: a value is missing.
    """
    from scipy.io import netcdf_file

    with netcdf_file(source, mmap=False) as file:
        wind = np.stack([file.variables[name].data for name in ("UWND", "VWND")], axis=1).astype(np.float64)
        latitudes = file.variables["FNOCY"].data.astype(np.float32)
    missing = int((np.isclose(wind, MISSING) | ~np.isfinite(wind)).sum())
    if missing:
        raise ValueError(f"{source.name} lacks {missing} values, and the model has no way to leave them out")
    # Differences from month to month pack better; they are exact in integers.
    hundredths = np.rint(wind / UNIT).astype(np.int16)
    return {"hundredths": np.diff(hundredths, axis=0, prepend=np.int16(0)), "latitudes": latitudes}


def load() -> Winds:
    """The winds."""
    with np.load(fetch()) as file:
        hundredths = np.cumsum(file["hundredths"], axis=0, dtype=np.int16)
        latitudes = file["latitudes"]
    return Winds(torch.from_numpy(hundredths).float() * UNIT, torch.from_numpy(latitudes))
