"""Tensors that only depend on what the host knows, made once.

Making them in each call would take the host longer than some kernels run; a copy would even wait for everything that
the GPU has been given to do, and could not be part of a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

__all__ = ["made_once", "may_be_kept", "on_device"]

P = ParamSpec("P")
Made = TypeVar("Made")


def made_once(maxsize: int) -> Callable[[Callable[P, Made]], Callable[P, Made]]:
    """Decorate a function of what can be hashed, which makes tensors: the same each time, which nobody may change.

    What is made for a graph (of torch.compile, torch.jit or CUDA), by a mode such as that of fake tensors, or in a
    transform of `torch.func` is not kept; a CUDA graph and a transform find what has been made before.

    Args:
        maxsize: for how many arguments they are kept.

    Returns:
        The decorator.
    """

    def decorate(make: Callable[P, Made]) -> Callable[P, Made]:
        kept: dict[Hashable, Made] = {}

        @functools.wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> Made:
            if _is_traced():
                return make(*args, **kwargs)
            key = (args, *kwargs.items())
            found = kept.get(key)
            if found is None:
                with torch.inference_mode(mode=False):
                    found = make(*args, **kwargs)
                if may_be_kept():
                    # Another thread may be here too, and change what an iterator goes over.
                    for oldest in list(kept)[: max(0, len(kept) - maxsize + 1)]:
                        kept.pop(oldest, None)
                    found = kept.setdefault(key, found)
            return found

        return made

    return decorate


def may_be_kept() -> bool:
    """Whether a tensor that is made now is an ordinary one: not part of a graph, nor of a mode's or transform's making.

    One of inference mode is none either; who makes something to keep leaves that mode.
    """
    if _is_traced() or torch._C._is_tracing() or peek_interpreter_stack() is not None:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _is_traced() -> bool:
    """Whether what is made belongs to torch.compile's graph or to a mode, for which nothing made before will do."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@made_once(maxsize=1024)
def on_device(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return the numbers as a vector.

    Args:
        values: the numbers.
        device: where.
        dtype: int64 or int32.
    """
    return torch.tensor(values, dtype=dtype, device=device)
