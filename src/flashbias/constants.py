"""Whole numbers that the host knows as tensors on a device, copied there once.

A copy in each call would wait for everything that the GPU has been given to do, and could not be part of a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["on_device"]


def on_device(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return the numbers as a vector; the same tensor each time, which nobody may change.

    Args:
        values: the numbers.
        device: where.
        dtype: int64 or int32.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        # What is made for a graph, or by a mode such as that of fake tensors, is not for others.
        return torch.tensor(values, dtype=dtype, device=device)
    return _on_device(values, device, dtype)


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(mode=False)
def _on_device(values: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
