"""Which ranks share a sequence, and which of them exchange what.

One group of ranks attends by a ring, or by an all-to-all over heads. On a two-dimensional mesh both are combined: ranks
of a row (the second dimension) exchange heads, ranks of a column circulate keys. Shards are numbered row by row, so the
same rank holds the same tokens whichever way it attends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["STRATEGIES", "Circle", "Topology", "finish"]

STRATEGIES = ("auto", "ring", "ulysses", "ring+ulysses")


@dataclass(frozen=True)
class Circle:
    """A process group and this process's place in it; without a group, one rank by itself."""

    group: dist.ProcessGroup | None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Circle:
        """This process's place in a group."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, x: Tensor) -> Tensor:
        """Stack the tensors of all ranks, `[size, *x.shape]`."""
        if self.group is None or self.size == 1:
            return x[None]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        finish(dist.all_gather(parts, x.contiguous(), group=self.group, async_op=True))
        return torch.stack(parts)


def finish(work: dist.Work | None) -> None:
    """Wait for what was started with `async_op=True`.

    Without it torch leaves the waiting to the backend, and NCCL's returns at once, also where TORCH_NCCL_BLOCKING_WAIT
    asks for an error in time: a missing rank would be noticed by nobody but the watchdog, which ends the process.

    Args:
        work: what a function of `torch.distributed` returned.
    """
    assert work is not None  # only a process outside the group gets none
    work.wait()


ALONE = Circle(None)


@dataclass(frozen=True)
class Topology:
    """The ranks that share a sequence, as a grid of ring by all-to-all."""

    ring: Circle
    ulysses: Circle

    @classmethod
    def of(cls, mesh: DeviceMesh | None = None, group: dist.ProcessGroup | None = None) -> Topology:
        """Read a mesh, a group, or (neither given) the default group.

        Args:
            mesh: one-dimensional, or two-dimensional: (ring, all-to-all).
            group: a process group.

        Returns:
            The grid; one group stands as a ring until a strategy says otherwise.

        Raises:
            ValueError: a mesh and a group, a mesh of more dimensions, no process group at all, or one that this process
                does not belong to.
        """
        if mesh is not None and group is not None:
            raise ValueError("mesh and group were both given; give one of them")
        if mesh is not None:
            if mesh.ndim not in (1, 2):
                raise ValueError(
                    f"mesh must have one dimension, or two (ring, all-to-all), got {mesh.ndim}; select some, as in "
                    "mesh['cp']"
                )
            circles = [Circle.of(mesh.get_group(n)) for n in range(mesh.ndim)]
            return cls(circles[0], circles[1] if len(circles) == 2 else ALONE)
        if not dist.is_initialized():
            raise ValueError(
                "no process group: call torch.distributed.init_process_group first (torchrun starts ranks)"
            )
        circle = Circle.of(dist.group.WORLD if group is None else group)  # pyright: ignore[reportArgumentType]
        if circle.rank < 0:
            raise ValueError(f"this process, rank {dist.get_rank()}, does not belong to the given group")
        return cls(circle, ALONE)

    @property
    def cp_size(self) -> int:
        """Number of ranks that share the sequence, P."""
        return self.ring.size * self.ulysses.size

    @property
    def cp_rank(self) -> int:
        """This process's shard."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    def gather(self, x: Tensor) -> Tensor:
        """Stack the tensors of all ranks, `[cp_size, *x.shape]`, in the order of shards."""
        return self.ring.gather(self.ulysses.gather(x)).flatten(0, 1)

    def arranged(self, strategy: str, num_heads: int, num_kv_heads: int) -> Topology:
        """The grid that a strategy asks for.

        Args:
            strategy: one of `STRATEGIES`.
            num_heads: query heads.
            num_kv_heads: key heads.

        Returns:
            The grid, all-to-all in place of a ring where so.

        Raises:
            ValueError: an unknown strategy, one that does not fit the mesh, or heads that do not divide.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        is_grid = self.ulysses.group is not None
        if strategy == "auto":
            divides = num_heads % self.ring.size == 0 and num_kv_heads % self.ring.size == 0
            strategy = "ring+ulysses" if is_grid else "ulysses" if divides else "ring"
        if is_grid != (strategy == "ring+ulysses"):
            wanted = "a two-dimensional mesh (ring, all-to-all)" if not is_grid else "a one-dimensional mesh or a group"
            raise ValueError(f"strategy {strategy!r} needs {wanted}")
        topology = Topology(ALONE, self.ring) if strategy == "ulysses" else self
        _check_heads(strategy, topology.ulysses.size, num_heads, num_kv_heads)
        return topology


def _check_heads(strategy: str, size: int, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % size:
        raise ValueError(
            f"strategy {strategy!r} shares heads among {size} ranks: the number of query heads must be divisible by "
            f"it, got {num_heads}; strategy='ring' takes any"
        )
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"strategy {strategy!r} shares heads among {size} ranks: the number of key heads must be a multiple or a "
            f"divisor of it (then each is sent to several ranks), got {num_kv_heads}; strategy='ring' takes any"
        )
