"""Train attention on the points of a surface, with factors and with a matrix: the same step, other memory and time.

    python examples/mesh.py [--points 3072]

The surface is a rippled ring, the tokens are features of its points, and each point learns how far it looks. A step is
forward, backward and the gradients of everything, points included. Memory is what torch's tensors hold at the same
time, beyond the model and its inputs; what a kernel uses inside is not seen.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention, softplus
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashbias.nn import SpatialBiasAttention

WIDTH, HEADS = 64, 4


def surface(count: int) -> Tensor:
    """Points of a rippled ring, about one unit large, spread evenly over its two angles."""
    i = torch.arange(count)
    around, across = 2 * math.pi * i / count, 2 * math.pi * i * (math.sqrt(5) - 1) / 2
    radius = 0.3 + 0.05 * torch.cos(5 * around) * torch.sin(3 * across)
    ring = 0.7 + radius * torch.cos(across)
    return torch.stack([ring * torch.cos(around), ring * torch.sin(around), radius * torch.sin(across)], dim=-1)


def with_factors(layer: SpatialBiasAttention, tokens: Tensor, points: Tensor) -> Tensor:
    """The layer as it is."""
    return layer(tokens, points)


def with_matrix(layer: SpatialBiasAttention, tokens: Tensor, points: Tensor) -> Tensor:
    """The same layer, with a bias for every pair of points."""
    q, k, v = layer.qkv(tokens).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
    square = (points[:, None] - points).square().sum(-1)
    bias = -softplus(layer.weight(tokens)).mT[..., None] * square
    out = scaled_dot_product_attention(q[None], k[None], v[None], bias[None])[0]
    return layer.out(out.transpose(-3, -2).flatten(-2))


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that are made inside and alive together, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it has made."""
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for made in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if made.data_ptr() not in known:
                self.alive[made.data_ptr()] = StorageWeakRef(made), made.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@dataclass
class Measured:
    """One training step."""

    gradient: Tensor
    seconds: float
    mebibytes: float


def measure(attend: Callable[[SpatialBiasAttention, Tensor, Tensor], Tensor], count: int) -> Measured:
    """Take the step twice, once for the memory and once for the time."""
    torch.manual_seed(0)
    layer = SpatialBiasAttention(WIDTH, HEADS, dim=3, init_weight=20.0)
    torch.nn.init.normal_(layer.weight.weight, std=0.5)
    tokens, target = torch.randn(2, count, WIDTH)
    leaves = [surface(count).requires_grad_(), *layer.parameters()]

    def step() -> Tensor:
        loss = (attend(layer, tokens, leaves[0]) - target).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    with PeakMemory() as memory:
        step()
    start = time.perf_counter()
    gradient = step()
    return Measured(gradient, time.perf_counter() - start, memory.peak / 2**20)


def main(points: int = 3072) -> str:
    """Compare the two at three sizes and return the conclusion."""
    torch.set_num_threads(1)
    print(f"one training step, {HEADS} heads of {WIDTH // HEADS}, float32, one CPU thread")
    print(f"{'points':>8}{'matrix':>12}{'factors':>12}{'matrix':>14}{'factors':>14}{'gradients':>12}")
    results = {}
    for count in (points // 4, points // 2, points):
        matrix, factors = measure(with_matrix, count), measure(with_factors, count)
        difference = float((factors.gradient - matrix.gradient).norm() / matrix.gradient.norm())
        results[count] = matrix, factors, difference
        print(
            f"{count:>8,}{matrix.seconds:>10.2f} s{factors.seconds:>10.2f} s{matrix.mebibytes:>10,.0f} MiB"
            f"{factors.mebibytes:>10,.1f} MiB{difference:>12.0e}"
        )
    matrix, factors, _ = results[points]
    conclusion = (
        f"At {points:,} points the step with factors has the same gradients (relative difference at most "
        f"{max(difference for *_, difference in results.values()):.0e}), takes {matrix.seconds / factors.seconds:.1f} "
        f"times less time and {matrix.mebibytes / factors.mebibytes:,.0f} times less memory."
    )
    print(f"\n{conclusion}")
    return conclusion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=3072, help="points of the largest surface (default 3072)")
    arguments = parser.parse_args()
    if arguments.points < 64:
        parser.error(f"--points must be at least 64, got {arguments.points}")
    main(arguments.points)
