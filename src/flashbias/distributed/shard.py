"""Which rank holds which tokens, and cutting tensors and biases accordingly.

A sequence of N tokens is cut into chunks of `ceil(N / chunks)`, the last ones shorter or empty, as `torch.chunk` and
DTensor cut.

    contiguous   P chunks, rank r holds chunk r
    zigzag       2 P chunks, rank r holds chunks r and 2 P - 1 - r: a causal mask leaves every rank the same work

Every rank holds *runs* of consecutive tokens, in ascending order. Positions are always those in the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashbias.distributed.topology import Topology
from flashbias.factored import FactoredBias

__all__ = ["ORDERS", "Layout", "positions", "shard", "shard_bias", "unshard"]

ORDERS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Layout:
    """The runs of tokens that each rank holds.

    Args:
        runs: for each rank its runs, ascending, none of them empty; together every token once.

    Examples:
        >>> Layout.of(10, 2, "zigzag").runs
        ((range(0, 3), range(9, 10)), (range(3, 9),))
    """

    runs: tuple[tuple[range, ...], ...]

    @classmethod
    def of(cls, seqlen: int, cp_size: int, order: str = "contiguous") -> Layout:
        """Cut a sequence.

        Args:
            seqlen: N.
            cp_size: P.
            order: "contiguous" or "zigzag".

        Returns:
            The layout.

        Raises:
            ValueError: an unknown order, or a negative length.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        if seqlen < 0:
            raise ValueError(f"seqlen must not be negative, got {seqlen}")
        count = cp_size if order == "contiguous" else 2 * cp_size
        length = -(-seqlen // count)
        chunks = [range(min(n * length, seqlen), min((n + 1) * length, seqlen)) for n in range(count)]
        if order == "contiguous":
            return cls(tuple(_joined([chunk]) for chunk in chunks))
        return cls(tuple(_joined([chunks[r], chunks[count - 1 - r]]) for r in range(cp_size)))

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Layout:
        """Contiguous shards of any sizes."""
        bounds = [0, *accumulate(sizes)]
        return cls(tuple(_joined([range(a, b)]) for a, b in pairwise(bounds)))

    @property
    def cp_size(self) -> int:
        """Number of ranks, P."""
        return len(self.runs)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(map(len, runs)) for runs in self.runs]

    @property
    def seqlen(self) -> int:
        """Tokens of all ranks, N."""
        return sum(self.sizes)

    def positions(self, cp_rank: int, device: torch.device | str | None = None) -> Tensor:
        """Where the tokens of a rank stand in the sequence, int64 `[n]`."""
        runs = [torch.arange(run.start, run.stop, device=device) for run in self.runs[cp_rank]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def slices(self, cp_rank: int) -> list[slice]:
        """Where the runs of a rank lie in its own shard."""
        bounds = [0, *accumulate(map(len, self.runs[cp_rank]))]
        return [slice(a, b) for a, b in pairwise(bounds)]

    def together(self, members: int) -> Layout:
        """The layout of groups of consecutive ranks that pool their tokens, in ascending order."""
        groups = [self.runs[first : first + members] for first in range(0, self.cp_size, members)]
        return Layout(tuple(_joined([run for runs in group for run in runs]) for group in groups))

    def within(self, first: int, members: int) -> Layout:
        """Where the tokens of some consecutive ranks lie among those that they pool."""
        owned = sorted(
            ((run, rank) for rank in range(members) for run in self.runs[first + rank]), key=lambda pair: pair[0].start
        )
        bounds = [0, *accumulate(len(run) for run, _ in owned)]
        runs: list[list[range]] = [[] for _ in range(members)]
        for (_, rank), (start, stop) in zip(owned, pairwise(bounds), strict=True):
            runs[rank].append(range(start, stop))
        return Layout(tuple(_joined(r) for r in runs))

    def cut(self, x: Tensor, cp_rank: int, dim: int) -> Tensor:
        """A rank's part of a tensor of the whole sequence; a view where it is one run."""
        parts = [x.narrow(dim, run.start, len(run)) for run in self.runs[cp_rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def lay(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Lay the parts of all ranks together to the whole sequence."""
        pieces = [
            (run.start, part.narrow(dim, where.start, len(run)))
            for rank, part in enumerate(parts)
            for run, where in zip(self.runs[rank], self.slices(rank), strict=True)
        ]
        ordered = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
        return torch.cat(ordered, dim) if ordered else parts[0]


def _joined(runs: Sequence[range]) -> tuple[range, ...]:
    """Runs in ascending order, without empty ones, neighbours joined."""
    joined: list[range] = []
    for run in sorted((r for r in runs if len(r)), key=lambda r: r.start):
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


# -------------------------------------------------------------------- for users


def positions(
    seqlen: int,
    mesh: DeviceMesh | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    order: str = "contiguous",
    device: torch.device | str | None = None,
) -> Tensor:
    """Say where this rank's tokens stand in the whole sequence.

    Use them wherever a model wants positions: position embeddings, rotary embeddings, `Alibi.at`.

    Args:
        seqlen: tokens of the whole sequence, N.
        mesh: one- or two-dimensional mesh of the ranks that share the sequence.
        group: a process group in place of a mesh; default all ranks.
        order: "contiguous" or "zigzag".
        device: where the positions live.

    Returns:
        int64 `[n]`, ascending.

    Raises:
        ValueError: an unknown order, or a mesh that is not one- or two-dimensional.

    Examples:
        >>> import torch, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> cp.positions(4, order="zigzag")
        tensor([0, 1, 2, 3])
        >>> torch.distributed.destroy_process_group()
    """
    topology = Topology.of(mesh, group)
    return Layout.of(seqlen, topology.cp_size, order).positions(topology.cp_rank, device)


def shard(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    dim: int = -2,
    order: str = "contiguous",
) -> Tensor:
    """Take this rank's part of a tensor that every rank holds whole. Nothing is sent.

    Args:
        x: a tensor with the whole sequence in dimension `dim`.
        mesh: as in `positions`.
        group: as in `positions`.
        dim: the dimension of tokens; -2 for queries, keys, values and factors.
        order: as in `positions`.

    Returns:
        The part, differentiable; a view where it is one run of tokens.

    Raises:
        ValueError: as in `positions`.

    Examples:
        >>> import torch, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> cp.shard(torch.zeros(2, 8, 16, 4)).shape  # all 16 tokens: there is one rank
        torch.Size([2, 8, 16, 4])
        >>> torch.distributed.destroy_process_group()
    """
    topology = Topology.of(mesh, group)
    return Layout.of(x.shape[dim], topology.cp_size, order).cut(x, topology.cp_rank, dim)


def unshard(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    dim: int = -2,
    order: str = "contiguous",
) -> Tensor:
    """Gather the parts of all ranks into the whole sequence, on every rank. Not differentiable.

    For looking at results: memory is that of the whole.

    Args:
        x: this rank's part, as `shard` cuts it.
        mesh: as in `positions`.
        group: as in `positions`.
        dim: the dimension of tokens.
        order: as in `positions`.

    Returns:
        The whole tensor, without a gradient.

    Raises:
        ValueError: as in `positions`, or sizes that `shard` would not have cut.

    Examples:
        >>> import torch, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> x = torch.randn(2, 16, 4)
        >>> torch.equal(cp.unshard(cp.shard(x, order="zigzag"), order="zigzag"), x)
        True
        >>> torch.distributed.destroy_process_group()
    """
    topology = Topology.of(mesh, group)
    sizes = [int(n) for n in topology.gather(torch.tensor([x.shape[dim]], device=x.device)).flatten()]
    layout = Layout.of(sum(sizes), topology.cp_size, order)
    if layout.sizes != sizes:
        raise ValueError(f"x has {sizes} tokens on the ranks; order={order!r} cuts {sum(sizes)} into {layout.sizes}")
    rows = x.detach().movedim(dim, 0)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = topology.gather(padded)
    return layout.lay([part[:n] for part, n in zip(parts, sizes, strict=True)], 0).movedim(0, dim)


def shard_bias(
    bias: FactoredBias,
    mesh: DeviceMesh | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    order: str = "contiguous",
) -> FactoredBias:
    """Take this rank's rows of a bias of the whole sequence, its codes included. Nothing is sent.

    Every rank holds the whole first, O(N rank) numbers. A family that can make its own rows from positions
    (`Alibi.at`) needs less.

    Args:
        bias: the bias between all N queries and all N keys.
        mesh: as in `positions`.
        group: as in `positions`.
        order: as in `positions`.

    Returns:
        phi_q of the local queries, phi_k of the local keys, the whole table, codes of the local tokens.

    Raises:
        TypeError: bias is not a FactoredBias.
        ValueError: as in `positions`, or a bias with more or fewer keys than queries.

    Examples:
        >>> import torch, flashbias as fb, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> cp.shard_bias(fb.Alibi(num_heads=4, symmetric=True)(16, 16)).shape
        torch.Size([4, 16, 16])
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(bias, FactoredBias):
        raise TypeError(f"bias must be a FactoredBias, got {type(bias)}")
    if bias.seqlen_q != bias.seqlen_k:
        raise ValueError(f"bias must have as many keys as queries, got {bias.seqlen_k} and {bias.seqlen_q}")
    topology = Topology.of(mesh, group)
    return local_rows(bias, Layout.of(bias.seqlen_q, topology.cp_size, order), topology.cp_rank)


def local_rows(bias: FactoredBias, layout: Layout, cp_rank: int) -> FactoredBias:
    """The rows of a bias of the whole sequence that belong to a rank."""
    codes = [layout.cut(code, cp_rank, 0) for code in bias.codes()] if bias.table is not None else [None, None]
    return replace(
        bias,
        phi_q=layout.cut(bias.phi_q, cp_rank, -2),
        phi_k=layout.cut(bias.phi_k, cp_rank, -2),
        code_q=codes[0],
        code_k=codes[1],
    )
