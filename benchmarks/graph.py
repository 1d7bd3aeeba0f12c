"""A step as a CUDA graph, which leaves the host nothing to do but to start it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["captured"]

Result = TypeVar("Result")


def captured(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Capture a step that has run before.

    Args:
        step: works on the same tensors each time, and never waits for the GPU.

    Returns:
        What replays it, and its result, which each replay fills anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result
