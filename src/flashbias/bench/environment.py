"""Where a run was measured: device, driver, versions, commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flashbias as fb

__all__ = ["describe_environment"]

PACKAGES = (
    "flashbias",
    "torch",
    "triton",
    "numpy",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "cuequivariance-torch",
    "cuequivariance-ops-torch-cu13",
    "trifast",
)


def describe_environment(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """Describe the machine and the software, for the JSON beside a CSV.

    Args:
        device: where the run measures.
        commit: of the source; default: asked of git, None where there is no repository.
    """
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "device_memory_mib": torch.cuda.get_device_properties(device).total_memory // 2**20 if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit or _commit(),
    }


def _version(package: str) -> str | None:
    """Version of an installed package; torch names its CUDA build itself, flashbias may run from source."""
    if package in ("torch", "flashbias"):
        return (torch if package == "torch" else fb).__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(command) or "").split("\n")[0] or None


def _commit() -> str | None:
    """Commit of the repository that tracks this file, `-dirty` if there are changes; None if none does."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    if _output([*git, "ls-files", "--error-unmatch", here.name]) is None:
        return None  # installed somewhere below a repository that is not this library's
    return _output([*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"])


def _output(command: list[str]) -> str | None:
    """What a command prints, None if it fails: git outside a repository, a driver that does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
