"""Which assembler makes machine code of the kernels.

ptxas 12.8, which Triton 3.6 and 3.7 take for Hopper, has a fault. Where two operands of `wgmma` stand at one address of
shared memory in turn, with rows of different widths, it may compute a descriptor from a register that nothing has
written: results are wrong, or the kernel ends in an illegal memory access (docs/kernels.md tells how it was found).
ptxas 12.9 is free of it, and Triton brings 12.9 or newer along for later GPUs. While our kernels are launched, and
compiled where need be, that one is used for Hopper too; kernels of others are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from triton import knobs

__all__ = ["is_faulty", "replacement", "soundly_assembled"]

SOUND = (12, 9)
"""First release of ptxas without the fault."""


@functools.cache
def is_faulty() -> bool:
    """Whether Triton's choice for this GPU has the fault."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] == 9 and _release(knobs.nvidia.ptxas) < SOUND


@functools.cache
def replacement() -> str | None:
    """Path of a sound assembler among Triton's own whose code the driver loads, None if there is none."""
    tool = getattr(knobs.nvidia, "ptxas_blackwell", None)
    if tool is None or _release(tool) < SOUND:
        return None
    # A driver loads the code of any release of its CUDA's major version; it is as new as PyTorch's CUDA at least.
    return tool.path if _release(tool)[0] <= int(str(torch.version.cuda).split(".")[0]) else None


def soundly_assembled(launch: Callable[..., None]) -> Callable[..., None]:
    """Decorate a function that launches kernels: what it compiles is assembled soundly.

    Args:
        launch: the function.

    Returns:
        A function that does the same.
    """

    @functools.wraps(launch)
    def run(*arguments: Any, **named: Any) -> None:
        if not is_faulty():
            return launch(*arguments, **named)
        # Assigning to the knob would set an environment variable as well, for good and for other processes.
        settings = vars(knobs.nvidia)
        before = settings.copy()
        settings["ptxas"] = replacement()
        try:
            launch(*arguments, **named)
        finally:
            settings.clear()
            settings.update(before)

    return run


def _release(tool: knobs.NvidiaTool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))
