"""All-to-all over heads: from a part of the tokens with all heads to all tokens with a part of the heads, and back.

What a rank sends to another is a product of two choices: which heads the other needs of a tensor, and which tokens this
rank holds. A tensor that several ranks need in the same heads (grouped keys, factors that heads share) is sent to each
of them, and gets the sum of their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashbias.distributed.exchange import naming
from flashbias.distributed.parcel import Parcel
from flashbias.distributed.shard import Layout
from flashbias.distributed.topology import Circle, finish
from flashbias.distributed.traffic import record

__all__ = ["HeadExchange"]


@dataclass(frozen=True)
class HeadExchange:
    """An all-to-all among the ranks of a circle.

    Args:
        circle: who takes part.
        layout: which tokens each of them holds.
        num_heads: query heads of the whole.
    """

    circle: Circle
    layout: Layout
    num_heads: int

    def heads(self, count: int, rank: int) -> slice:
        """Which of a tensor's `count` heads a rank needs for its query heads."""
        if count == 1:
            return slice(0, 1)
        first, last = (n * self.num_heads // self.circle.size for n in (rank, rank + 1))
        group = self.num_heads // count
        return slice(first // group, (last - 1) // group + 1)

    def own_heads(self, count: int) -> slice:
        """Which of a tensor's `count` heads this rank needs."""
        return self.heads(count, self.circle.rank)

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Trade tokens for heads: `[*batch, h, n, width]` to `[*batch, h of this rank, N, width]`, tokens ascending.

        Differentiable. Tensors of integers pass without a gradient.
        """
        return _ToHeads.apply(self, *tensors)  # pyright: ignore[reportReturnType]

    def to_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The way back: `[*batch, H / size, N, width]` to `[*batch, H, n, width]`. Differentiable."""
        return _ToTokens.apply(self, *tensors)  # pyright: ignore[reportReturnType]

    # ---------------------------------------------------------------- both ways, without autograd

    def send_tokens(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """To every rank its heads of the tokens here; lay what comes together in ascending order."""
        sizes = self.layout.sizes
        outgoing = [[x[..., self.heads(x.shape[-3], rank), :, :] for x in tensors] for rank in range(self.circle.size)]
        incoming = [
            Parcel(tuple((*x.shape[:-2], n, x.shape[-1]) for x in outgoing[self.circle.rank]), _dtypes(tensors))
            for n in sizes
        ]
        parts = self._exchange(outgoing, incoming, "to heads")
        return tuple(self.layout.lay([part[n] for part in parts], -2) for n in range(len(tensors)))

    def send_heads(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        """To every rank its tokens of the heads here; add what comes to a tensor of `counts` heads."""
        length = self.layout.sizes[self.circle.rank]
        outgoing = [[self.layout.cut(x, rank, -2) for x in tensors] for rank in range(self.circle.size)]
        incoming = []
        for rank in range(self.circle.size):
            lead = [(*x.shape[:-3], _length(self.heads(count, rank))) for x, count in zip(tensors, counts, strict=True)]
            shapes = tuple((*first, length, x.shape[-1]) for first, x in zip(lead, tensors, strict=True))
            incoming.append(Parcel(shapes, _dtypes(tensors)))
        parts = self._exchange(outgoing, incoming, "to tokens")
        results = []
        for n, (x, count) in enumerate(zip(tensors, counts, strict=True)):
            # Where several ranks add to one head, the sum is taken in float32 at least.
            dtype = torch.promote_types(x.dtype, torch.float32) if count < self.circle.size else x.dtype
            total = x.new_zeros(*x.shape[:-3], count, length, x.shape[-1], dtype=dtype)
            for rank, part in enumerate(parts):
                total[..., self.heads(count, rank), :, :] += part[n]
            results.append(total.to(x.dtype))
        return tuple(results)

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Parcel], purpose: str
    ) -> list[list[Tensor]]:
        """One message to every rank and one from each."""
        messages = [Parcel.like(tensors).pack(tensors) for tensors in outgoing]
        sent = [message.numel() for message in messages]
        received = [parcel.empty(messages[0].device).numel() for parcel in incoming]
        buffer = messages[0].new_empty(sum(received))
        record(purpose, sum(sent) - sent[self.circle.rank])
        everyone = tuple(peer for peer in range(self.circle.size) if peer != self.circle.rank)
        with naming(self.circle, everyone, f"all-to-all {purpose}"):
            message, group = torch.cat(messages), self.circle.group
            finish(dist.all_to_all_single(buffer, message, received, sent, group=group, async_op=True))
        return [parcel.unpack(part) for parcel, part in zip(incoming, buffer.split(received), strict=True)]


def _dtypes(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    return tuple(x.dtype for x in tensors)


def _length(where: slice) -> int:
    return where.stop - where.start


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.counts = exchange, [x.shape[-3] for x in tensors]
        results = exchange.send_tokens(tensors)
        # Else what is frozen would get a gradient in the local attention, because something beside it gets one.
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(x for x, need in zip(results, needed, strict=True) if not need))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [n for n, need in enumerate(ctx.needs_input_grad[1:]) if need]
        found = ctx.exchange.send_heads([grads[n] for n in wanted], [ctx.counts[n] for n in wanted])
        by_input = dict(zip(wanted, found, strict=True))
        return None, *(by_input.get(n) for n in range(len(grads)))


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.send_heads(tensors, [exchange.num_heads] * len(tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.send_tokens(grads)
