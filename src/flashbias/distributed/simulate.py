"""What context parallelism would cost on more GPUs than are at hand: an alpha-beta model.

A message of b bytes takes `alpha + b / beta` seconds; links within a node and between nodes have their own alpha, beta.

    ring           P steps of attention; the message of the next step is on its way meanwhile, so a step takes the
                   longer of both. Backward, the gradients' last hop home hides behind nothing.
    ulysses        all-to-all, attention of H / P heads, all-to-all. Nothing overlaps.
    ring+ulysses   all-to-all within a node, a ring across nodes whose steps overlap.

Assumptions, all in one place:

- Work is shared evenly: a causal mask in zigzag order, or none. A contiguous ring under a causal mask waits for its
  busiest rank, which has twice the mean.
- Kernels run as fast on a block as on the whole (`flops` of the machine), plus `block_overhead` seconds for each block.
- A ring within a node uses links within the node; one that spans nodes is as slow as a link between nodes. Every GPU
  has a link between nodes of its own.
- No congestion, no stragglers, nothing else on the links.
- One GPU is taken to hold the whole sequence, which beyond some length it cannot: efficiency compares with that.

Fed with measured numbers (`measure_link`, a timed kernel) it predicts; fed with data sheets it guesses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flashbias.distributed.exchange import Hop
from flashbias.distributed.topology import STRATEGIES, Circle, Topology
from flashbias.distributed.traffic import RingBytes

__all__ = ["Link", "Machine", "Prediction", "Workload", "measure_link", "predict", "simulate", "simulation_table"]

BACKWARD_WORK = 2.5
"""Products of the backward pass for each of the forward pass: five for two."""

ROUNDS = 3
"""How often each size is timed when a link is measured."""

LARGEST_MESSAGE = 1 << 28
"""Bytes up to which a measurement goes in search of the bandwidth."""


@dataclass(frozen=True)
class Link:
    """What a message costs: `alpha + bytes / beta`.

    Args:
        alpha: latency in seconds.
        beta: bandwidth in bytes per second, one way.
    """

    alpha: float
    beta: float

    def seconds(self, nbytes: float) -> float:
        """Time of one message."""
        return self.alpha + nbytes / self.beta


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes.

    Args:
        forward_flops: floating point operations per second that the forward kernel sustains.
        backward_flops: likewise the backward kernels.
        near: a link within a node.
        far: a link between nodes, of each GPU.
        node: GPUs in a node.
        block_overhead: seconds that each block of keys costs beyond its arithmetic.
    """

    forward_flops: float
    backward_flops: float
    near: Link
    far: Link
    node: int = 8
    block_overhead: float = 20e-6


@dataclass(frozen=True)
class Workload:
    """One layer's attention over a whole sequence.

    Args:
        seqlen: N.
        num_heads: H.
        num_kv_heads: H_kv.
        head_dim: width of queries, keys and values.
        rank: R; 0 without a bias.
        factor_heads: heads of phi_k; 1 where all share it.
        batch: sequences.
        is_causal: half of the pairs.
        element: bytes per element of queries, keys and values.
    """

    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rank: int = 0
    factor_heads: int = 1
    batch: int = 1
    is_causal: bool = True
    element: int = 2

    @property
    def forward_work(self) -> float:
        """Floating point operations of the forward pass, the bias included."""
        pairs = self.batch * self.num_heads * self.seqlen**2 * (0.5 if self.is_causal else 1.0)
        return pairs * 2 * (2 * self.head_dim + self.rank)

    def ring_bytes(self, cp_size: int) -> RingBytes:
        """What a ring of so many ranks sends."""
        return RingBytes(
            cp_size=cp_size,
            tokens=math.ceil(self.seqlen / cp_size),
            num_kv_heads=self.batch * self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            element=self.element,
            rank=self.rank,
            factor_heads=self.factor_heads,
        )

    def traded_bytes(self, cp_size: int) -> tuple[float, float]:
        """Bytes of one rank's queries, keys, values and factors, and of its output."""
        ring = self.ring_bytes(cp_size)
        queries = ring.tokens * self.batch * self.num_heads * self.head_dim * self.element
        factors = ring.tokens * (self.num_heads + self.factor_heads) * self.rank * 4
        return queries + ring.keys + factors, queries


@dataclass(frozen=True)
class Prediction:
    """One line of a simulation.

    Args:
        strategy: how ranks share the sequence.
        cp_size: P.
        seconds: forward and backward pass.
        exposed: of these, the seconds in which nothing is computed.
        efficiency: time of one GPU over `P * seconds`.
        sent: bytes that a rank sends.
    """

    strategy: str
    cp_size: int
    seconds: float
    exposed: float
    efficiency: float
    sent: float


def predict(workload: Workload, machine: Machine, cp_size: int, strategy: str) -> Prediction:
    """Predict the forward and backward pass of one layer.

    Args:
        workload: what is computed.
        machine: on what.
        cp_size: P.
        strategy: "ring", "ulysses" or "ring+ulysses" (all-to-all within a node).

    Returns:
        The prediction.

    Raises:
        ValueError: an unknown strategy, or one that the heads or the size do not allow.

    Examples:
        >>> fast, slow = Link(1e-6, 4e11), Link(1e-5, 4e10)
        >>> machine = Machine(4e14, 2.5e14, near=fast, far=slow)
        >>> alibi = Workload(seqlen=2**20, num_heads=32, num_kv_heads=32, head_dim=128, rank=2)
        >>> predict(alibi, machine, 8, "ring").efficiency > 0.99
        True
    """
    grid = _grid(workload, machine, cp_size, strategy)
    if grid is None:
        raise ValueError(
            f"strategy {strategy!r} cannot share {workload.num_heads} heads ({workload.num_kv_heads} of keys) among "
            f"{cp_size} ranks"
        )
    inner, outer = grid
    link = machine.near if cp_size <= machine.node else machine.far
    ring = workload.ring_bytes(cp_size)
    passes = (
        (workload.forward_work / machine.forward_flops, ring.keys + ring.factors, 0.0),
        (BACKWARD_WORK * workload.forward_work / machine.backward_flops, ring.keys + ring.factors, ring.gradients),
    )
    alone = sum(seconds for seconds, _, _ in passes)
    # An all-to-all leaves 1 / inner of the heads of `inner` times the tokens: messages of the ring keep their size.
    busy, total, sent = alone / cp_size, 0.0, 0.0
    for seconds, keys, gradients in passes:
        block = seconds / cp_size / outer + machine.block_overhead
        step = max(block, link.seconds(keys + gradients)) if outer > 1 else 0.0
        total += (outer - 1) * step + block
        sent += (outer - 1) * (keys + gradients)
        if gradients and outer > 1:
            total += link.seconds(gradients)
            sent += gradients
    if inner > 1:
        bringing, taking = workload.traded_bytes(cp_size)
        for nbytes in (bringing, taking, bringing, taking):
            total += _all_to_all(nbytes, inner, machine)
            sent += nbytes * (inner - 1) / inner
    return Prediction(strategy, cp_size, total, total - busy, alone / (cp_size * total), sent)


def _grid(workload: Workload, machine: Machine, cp_size: int, strategy: str) -> tuple[int, int] | None:
    """Ranks of an all-to-all by ranks of a ring; None where heads or the size do not allow it."""
    if strategy not in STRATEGIES[1:]:
        raise ValueError(f"strategy must be one of {STRATEGIES[1:]}, got {strategy!r}")
    if strategy == "ring":
        return 1, cp_size
    inner = cp_size if strategy == "ulysses" else math.gcd(machine.node, cp_size, workload.num_kv_heads)
    fits = workload.num_heads % inner == 0 and workload.num_kv_heads % inner == 0
    return (inner, cp_size // inner) if fits else None


def _all_to_all(nbytes: float, size: int, machine: Machine) -> float:
    """Every rank sends `nbytes / size` to each other, first to those in its node and then to the rest."""
    inside = min(size, machine.node)
    seconds = (inside - 1) * machine.near.alpha + nbytes * (inside - 1) / size / machine.near.beta
    if size > inside:
        seconds += (size - inside) * machine.far.alpha + nbytes * (size - inside) / size / machine.far.beta
    return seconds


def simulate(
    workload: Workload,
    machine: Machine,
    sizes: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024),
    strategies: Sequence[str] = ("ring", "ulysses", "ring+ulysses"),
) -> list[Prediction]:
    """Predict every strategy at every size that it allows.

    Args:
        workload: what is computed.
        machine: on what.
        sizes: numbers of GPUs.
        strategies: which to predict.

    Returns:
        Predictions, by size; those that heads do not allow are left out.

    Examples:
        >>> machine = Machine(4e14, 2.5e14, near=Link(1e-6, 4e11), far=Link(1e-5, 4e10))
        >>> eight_heads = Workload(seqlen=2**20, num_heads=8, num_kv_heads=8, head_dim=128, rank=2)
        >>> [(p.cp_size, p.strategy) for p in simulate(eight_heads, machine, sizes=(8, 16))]
        [(8, 'ring'), (8, 'ulysses'), (8, 'ring+ulysses'), (16, 'ring'), (16, 'ring+ulysses')]
    """
    return [
        predict(workload, machine, size, strategy)
        for size in sizes
        for strategy in strategies
        if _grid(workload, machine, size, strategy) is not None
    ]


def simulation_table(predictions: Sequence[Prediction]) -> str:
    """Write predictions down as a table in Markdown, one line for each size and the strategies side by side.

    Args:
        predictions: as `simulate` gives them.

    Returns:
        The table.

    Examples:
        >>> print(simulation_table([Prediction("ring", 8, seconds=2.0, exposed=0.1, efficiency=0.95, sent=3e9)]))
        | GPUs | ring: time | efficiency | sent per GPU |
        |---:|---:|---:|---:|
        | 8 | 2.00 s | 0.95 | 3.00 GB |
    """
    strategies = list(dict.fromkeys(p.strategy for p in predictions))
    by_place = {(p.cp_size, p.strategy): p for p in predictions}
    lines = [
        "| GPUs | " + " | ".join(f"{s}: time | efficiency | sent per GPU" for s in strategies) + " |",
        "|---:|" + "---:|---:|---:|" * len(strategies),
    ]
    for size in dict.fromkeys(p.cp_size for p in predictions):
        cells = []
        for strategy in strategies:
            p = by_place.get((size, strategy))
            cells += ["n/a"] * 3 if p is None else [_time(p.seconds), f"{p.efficiency:.2f}", f"{p.sent / 1e9:.2f} GB"]
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def measure_link(
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] = (1 << 16, 1 << 20, 1 << 24, 1 << 26),
    repeats: int = 10,
    device: torch.device | str = "cpu",
) -> Link:
    """Measure what a hop of the ring costs: every rank sends to the next and receives from the one before, at once.

    Fits `alpha + bytes / beta` by least squares, relative errors counting alike. Every rank of the group calls it. Of
    each size the fastest of `ROUNDS` rounds counts, so that what else runs on the machine does not. Where latency hides
    the bandwidth still, as on processors that other work shares, messages four times as large follow, until one takes
    twice the time of the smallest or is of `LARGEST_MESSAGE` bytes.

    Args:
        group: the ranks; default all.
        sizes: bytes of the messages, at least two different ones.
        repeats: hops that are timed together.
        device: where messages live.

    Returns:
        The link, the same on all ranks: the slowest rank counts.

    Raises:
        ValueError: a group of one rank, or fewer than two sizes.
        RankError: a rank did not answer.
        RuntimeError: the largest messages took no longer than small ones, so there is no bandwidth to be seen.
    """
    circle: Circle = Topology.of(None, group).ring
    if circle.size < 2 or len(set(sizes)) < 2:
        raise ValueError(f"needs two ranks and two sizes at least, got {circle.size} ranks and sizes {tuple(sizes)}")
    timed = sorted(set(sizes))
    seconds = [_slowest_hop(circle, size, repeats, device) for size in timed]
    while seconds[-1] < 2 * seconds[0] and 4 * timed[-1] <= LARGEST_MESSAGE:
        timed.append(4 * timed[-1])
        seconds.append(_slowest_hop(circle, timed[-1], repeats, device))
    return fitted_link(timed, seconds)


def _slowest_hop(circle: Circle, size: int, repeats: int, device: torch.device | str) -> float:
    """What a hop takes the slowest rank, each in its fastest round; all ranks get the same number."""
    fastest = min(_hop_seconds(circle, size, repeats, device) for _ in range(ROUNDS))
    return circle.gather(torch.tensor([fastest], dtype=torch.float64, device=device)).max().item()


def _hop_seconds(circle: Circle, size: int, repeats: int, device: torch.device | str) -> float:
    """Mean time of some hops, after one that is not timed."""
    message, buffer = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    Hop(circle, message, buffer, "measurement", "a measurement").wait()
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        Hop(circle, message, buffer, "measurement", "a measurement").wait()
    _finish(device)
    return (time.perf_counter() - start) / repeats


def fitted_link(sizes: Sequence[int], seconds: Sequence[float]) -> Link:
    """Fit a link to timed messages: least squares of `(alpha + bytes / beta) / seconds - 1`, alpha not negative.

    In plain floats, so that ranks with the same numbers get the same link.

    Args:
        sizes: bytes.
        seconds: time of each.

    Returns:
        The link.

    Raises:
        RuntimeError: times do not grow with sizes.

    Examples:
        >>> link = fitted_link([1000, 2000, 4000], [3.0, 4.0, 6.0])
        >>> round(link.alpha, 6), round(link.beta, 3)
        (2.0, 1000.0)
    """
    rows = [(1.0 / t, b / t) for b, t in zip(sizes, seconds, strict=True)]
    ones, mixed, squares = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    right = [sum(row[i] for row in rows) for i in (0, 1)]
    inverse = (ones * right[1] - mixed * right[0]) / (ones * squares - mixed**2)
    alpha = (right[0] - inverse * mixed) / ones
    if inverse <= 0.0:
        timed = ", ".join(f"{b:,} bytes {t:.3g} s" for b, t in zip(sizes, seconds, strict=True))
        raise RuntimeError(f"times do not grow with sizes ({timed}); take larger sizes or more repeats")
    return Link(alpha, 1.0 / inverse) if alpha >= 0.0 else Link(0.0, squares / right[1])


def _finish(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
