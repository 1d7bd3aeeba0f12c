"""Portable kernels in Triton, forward and backward; importing this package does not load Triton."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from flashbias.attention import registration
from flashbias.attention.call import Call

__all__ = ["run", "unavailable", "unsupported"]

MAX_HEAD_DIM = 256


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels through its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    import triton.knobs

    return bool(triton.knobs.runtime.interpret)


def unavailable(device: torch.device | None = None) -> str | None:
    """What keeps the kernels from running on this machine at all, None if nothing.

    Args:
        device: the GPU in question; default, and in place of what is no GPU, the current one.
    """
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (or set TRITON_INTERPRET=1 before the start to run kernels slowly on a CPU)"
    if device is None or device.type != "cuda" or device.index is None:
        return _obstacle(torch.cuda.current_device())
    return _obstacle(device.index)


@functools.cache
def _obstacle(device: int) -> str | None:
    """What keeps them from running on this GPU."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the GPU has compute capability {capability}; kernels need 8.0 or newer"
    from flashbias.attention.triton import assembler

    if assembler.is_faulty() and assembler.replacement() is None:
        return "Triton's ptxas makes faulty code for this GPU; set TRITON_PTXAS_PATH to one of CUDA 12.9 or newer"
    return None


def unsupported(call: Call) -> str | None:
    """Say what of the call these kernels cannot do, None if nothing."""
    if call.query.dtype == torch.float64:
        return "dtype torch.float64; kernels take float16, bfloat16 and float32"
    if not _on_kernel_device(call.query.device.type):
        return f"tensors are on {call.query.device}; kernels need a CUDA device"
    for name, size in (("head_dim", call.query.shape[-1]), ("head_dim_v", call.value.shape[-1])):
        if size > MAX_HEAD_DIM:
            return f"{name} {size} is larger than {MAX_HEAD_DIM}"
    return None


def _on_kernel_device(device_type: str) -> bool:
    return device_type == ("cpu" if interpreted() else "cuda")


# torch.compile takes what these return as constants instead of tracing into them. This is all that
# `torch.compiler.assume_constant_result` does, but calling it would load Triton with this package.
for _function in (unavailable, _on_kernel_device):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the kernels.

    Args:
        call: the checked request.

    Returns:
        Output `[*batch, H, N, head_dim_v]` and, if asked for, the log-sum-exp, float32 `[*batch, H, N]`.
    """
    return registration.run(call, "triton")
