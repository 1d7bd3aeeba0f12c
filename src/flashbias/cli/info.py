"""`flashbias info`: the machine, the versions, and which implementations can run here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

import flashbias

__all__ = ["info"]

PACKAGES = ("torch", "triton", "numpy")


def info() -> None:
    """Say what can run on this machine, and why not what cannot.

    The implementations are listed fastest first: `impl="auto"` takes the first that can run and that
    supports the call. `flashbias.explain(query, key, value, bias)` says the same of one call.

    **Example**

        flashbias info
    """
    console = Console()
    console.print(_machine())
    console.print(_implementations())


def _machine() -> Table:
    table = Table("what", "found", title="This machine", title_justify="left")
    table.add_row("flashbias", flashbias.__version__)
    table.add_row("Python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for device in _gpus():
        table.add_row("GPU", device)
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none that torch can use"]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found.append(f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB")
    return found


def _implementations() -> Table:
    table = Table("impl", "runs here", "why not", title="Implementations, fastest first", title_justify="left")
    for name, reason in flashbias.implementations().items():
        table.add_row(name, "no" if reason else "yes", reason or "")
    return table
