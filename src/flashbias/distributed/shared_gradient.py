"""The gradient of what every rank holds: the sum of what the ranks contribute."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashbias.distributed.exchange import naming
from flashbias.distributed.topology import Topology, finish
from flashbias.distributed.traffic import record

__all__ = ["summed_over_ranks"]


def summed_over_ranks(x: Tensor, topology: Topology, deterministic: bool) -> Tensor:
    """Pass x on; its gradient is summed over all ranks.

    Args:
        x: a tensor that is the same on every rank.
        topology: the ranks.
        deterministic: add in the order of ranks (every rank gathers all parts), rather than as the backend likes.

    Returns:
        x.
    """
    return _Summed.apply(x, topology, deterministic)  # pyright: ignore[reportReturnType]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, topology: Topology, deterministic: bool) -> Tensor:
        ctx.topology, ctx.deterministic = topology, deterministic
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        for circle in (ctx.topology.ulysses, ctx.topology.ring):
            if circle.size == 1:
                continue
            everyone = tuple(peer for peer in range(circle.size) if peer != circle.rank)
            with naming(circle, everyone, "table gradient"):
                if ctx.deterministic:
                    record("table gradient", (circle.size - 1) * total.numel() * total.element_size())
                    total = circle.gather(total).sum(0)
                else:
                    # As a ring would do it: each part is added up on its way round, and goes round once more.
                    record(
                        "table gradient", 2 * (circle.size - 1) * total.numel() * total.element_size() // circle.size
                    )
                    finish(dist.all_reduce(total, group=circle.group, async_op=True))
        return total, None, None
