"""What heads of different rank cost: in tiers, in one launch for all, and by the portable kernels.

    python3 benchmarks/ranks.py [case ...]

Milliseconds, for each case: the forward pass, then forward and backward with frozen factors, then with factors that
learn. Every width of packed columns is a tier here, whatever it costs; beside it stands how many tiers a call would
have, by the estimate (0: it is launched as it is). Factors are bfloat16 and the scale is a power of two, so that the
packed columns are as many as the rank. First every case runs once for each contestant, all in processes of their own,
since most of the time goes to compiling.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch

import flashbias as fb
from flashbias.attention.hopper import tiers
from flashbias.bench.measure import measure


@dataclass(frozen=True)
class Case:
    """Heads of different rank, `len(ranks)` of them."""

    batch: int
    tokens: int
    head_dim: int
    ranks: tuple[int, ...]


CASES = {
    "alternating": Case(4, 4096, 64, (4, 100) * 8),
    "spread": Case(4, 4096, 64, tuple(1 + 63 * head // 15 for head in range(16))),
    "shuffled": Case(4, 4096, 64, tuple(1 + 63 * (7 * head % 16) // 15 for head in range(16))),
    "windows": Case(1024, 576, 32, (4, 56, 12, 30, 8, 48, 4, 20, 56, 4, 16, 33, 6, 40, 10, 24)),
    "blocks": Case(1, 8192, 128, (8,) * 4 + (120,) * 4),
}
"""Factors of each are shared over the batch."""

SCALE = 0.125
CONTESTANTS = ("tiers", "together", "portable")
TRAINING = ("forward", "frozen", "learned")
COSTS = {"tiers": (0.0, float("inf")), "together": (1e9, 1.0)}
"""Milliseconds of a launch and bytes copied in one, for which each width is launched apart, or none is."""


def main() -> None:
    """Time the cases that are named, all of them if none is."""
    names = sys.argv[1:] or list(CASES)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, *zip(*product(names, CONTESTANTS), strict=True)))
    for name in names:
        times = {}
        for contestant, training in product(CONTESTANTS, TRAINING):
            with chosen(contestant) as impl:
                times[contestant, training] = milliseconds(step(CASES[name], training, impl))
        groups = [f"{training} " + " ".join(f"{times[c, training]:.3f}" for c in CONTESTANTS) for training in TRAINING]
        print(f"{name}, estimate {estimated(CASES[name])} ({', '.join(CONTESTANTS)}):", "; ".join(groups), flush=True)


def compiled(name: str, contestant: str) -> None:
    """Run a case once, so that its kernels are found on the disk afterwards."""
    with chosen(contestant) as impl:
        for training in TRAINING:
            step(CASES[name], training, impl)()
    torch.cuda.synchronize()


@contextmanager
def chosen(contestant: str) -> Iterator[str]:
    """The implementation that stands for a contestant, told what taking heads apart costs."""
    costs = tiers.LAUNCH_MS, tiers.COPIED_PER_MS
    tiers.LAUNCH_MS, tiers.COPIED_PER_MS = COSTS.get(contestant, costs)
    tiers.decided.cache_clear()
    yield "triton" if contestant == "portable" else "hopper"
    tiers.LAUNCH_MS, tiers.COPIED_PER_MS = costs
    tiers.decided.cache_clear()


def step(case: Case, training: str, impl: str) -> Callable[[], object]:
    """A forward pass, or one with the backward pass behind it."""
    shape = (case.batch, len(case.ranks), case.tokens, case.head_dim)
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    width = max(case.ranks)
    phi_q, phi_k = (torch.randn(1, *shape[1:3], width, device="cuda").div(width**0.5).bfloat16() for _ in range(2))
    leaves = {"forward": [], "frozen": [q, k, v], "learned": [q, k, v, phi_q, phi_k]}[training]
    for x in leaves:
        x.requires_grad_()
    bias = fb.FactoredBias(phi_q, phi_k, ranks=case.ranks)

    def run() -> object:
        out = fb.attention(q, k, v, bias, scale=SCALE, impl=impl)
        return torch.autograd.grad(out, leaves, dout) if leaves else out

    return run


def estimated(case: Case) -> int:
    """How many tiers a call has by the estimate, 0 where it is launched as it is."""
    rows, width = case.batch * case.tokens, case.head_dim
    form = tiers.Form(torch.bfloat16, torch.bfloat16, SCALE, torch.bfloat16)
    size = tiers.Size(rows * case.tokens, rows, rows, width, width, itemsize=2)
    return len(tiers.decided(case.ranks, 1, max(case.ranks), form, size))


def milliseconds(run: Callable[[], object]) -> float:
    """Median, after a first call."""
    run()
    return measure(run, torch.device("cuda"), budget_s=0.1, min_repetitions=5).median_ms


if __name__ == "__main__":
    main()
