"""The fused backward kernels for packed batches, on the host: right gradients in any order, and nothing leaks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from tests.attention.hopper.exact import attended
from tests.attention.hopper.on_host import Device
from tests.attention.hopper.test_backward_on_host import COLUMNS, WIDE, launch, narrow, slab_order

from flashbias.attention.hopper.configs import SLAB, BackwardConfig
from flashbias.attention.hopper.operands import Centring
from flashbias.attention.layout import Sharing

NAMES = ("q", "k", "v", "phi_q", "phi_k")
OF_QUERIES = ("q", "phi_q", "dout")


@dataclass(frozen=True)
class Problem:
    """A packed batch, and the tile shape that does it."""

    name: str
    config: BackwardConfig
    lengths_q: tuple[int, ...] = (130, 0, 64, 1, 300, 200, 63)
    lengths_k: tuple[int, ...] = (97, 40, 64, 260, 0, 128, 1)
    width: int = 16
    width_v: int = 16
    heads: int = 2
    kv_heads: int = 2
    rank: int = 3
    shares: bool = False  # one factor for all heads
    learns: bool = True
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    programs: int = 2

    def __str__(self) -> str:
        return self.name

    @property
    def learns_factors(self) -> bool:
        return self.learns and self.rank > 0

    def parts(self) -> list[tuple[slice, slice]]:
        """Queries and keys of each sequence."""
        ends = [list(itertools.accumulate((0, *lengths))) for lengths in (self.lengths_q, self.lengths_k)]
        return [(slice(*ends[0][s : s + 2]), slice(*ends[1][s : s + 2])) for s in range(len(self.lengths_q))]


EQUAL = {"lengths_q": (70, 129, 64), "lengths_k": (70, 129, 64)}

PROBLEMS = [
    Problem("plain", narrow()),
    Problem("three warpgroups", narrow(3), programs=3),
    Problem("one program", narrow(kv_stages=1, stages=3, holds_phi=False), programs=1),
    Problem("many programs", narrow(stages=1), programs=40),
    Problem("no factors", narrow(), rank=0),
    Problem("causal", narrow(), **EQUAL, right=0),
    Problem("bottom right, three warpgroups", narrow(3), right=0, bottom_right=True, programs=1),
    Problem("window", narrow(), left=40, right=9, heads=4, kv_heads=4, bottom_right=True),
    Problem("grouped heads", narrow(), heads=4, kv_heads=2, right=0),
    Problem("grouped heads, three warpgroups", narrow(3), heads=3, kv_heads=1, left=20, programs=3),
    Problem("shared factors", narrow(3), heads=3, kv_heads=3, shares=True),
    Problem("other width of values", narrow(), width=32),
    Problem("wide", WIDE, width=32, width_v=16),
    Problem("wide, causal, grouped, shared", WIDE, width=32, width_v=32, heads=4, kv_heads=2, right=0, shares=True),
    Problem("wide, frozen, bottom right", WIDE, width=32, learns=False, right=0, bottom_right=True, programs=5),
    Problem("nothing", narrow(), lengths_q=(5, 0), lengths_k=(0, 7)),
]


def tensors_of(problem: Problem) -> dict[str, Tensor]:
    """Queries, keys, values, factors and the output's gradient, in float64."""
    torch.manual_seed(0)
    h, hk, n, m = problem.heads, problem.kv_heads, sum(problem.lengths_q), sum(problem.lengths_k)
    own = (1, 1) if problem.shares else (h, hk)
    sizes = ((h, n, problem.width), (hk, m, problem.width), (hk, m, problem.width_v), (own[0], n, problem.rank),
             (own[1], m, problem.rank), (h, n, problem.width_v))  # fmt: skip
    return {name: torch.randn(size).double() for name, size in zip((*NAMES, "dout"), sizes, strict=True)}


def expected(
    problem: Problem, x: dict[str, Tensor], scale: float, shift: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Of one sequence: gradients by autograd, log-sum-exp and delta."""
    leaf = {name: x[name].clone().requires_grad_() for name in NAMES}
    group = problem.heads // problem.kv_heads
    k, v = (leaf[name].repeat_interleave(group, 0) for name in ("k", "v"))
    phi_k = leaf["phi_k"] if problem.shares else leaf["phi_k"].repeat_interleave(group, 0)
    scores = scale * leaf["q"] @ k.mT + leaf["phi_q"] @ phi_k.mT
    weights, lse = attended(scores, shift, problem.left, problem.right)
    out = weights @ v
    (out * x["dout"]).sum().backward()
    grads = {name: torch.zeros_like(x[name]) if y.grad is None else y.grad for name, y in leaf.items()}
    return grads, lse.detach(), (out * x["dout"]).sum(-1).detach()


def unfold(sums: Tensor, out: Tensor, factor: float, cu_seqlens: Tensor) -> None:
    """Sequence by sequence, as the docstring of `slabs.py` has it."""
    columns = sums.shape[-1] // SLAB
    rows = sums[..., slab_order(columns)].permute(0, 1, 3, 2, 4).flatten(-2).flatten(1, 2)
    for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        first = (start // SLAB + s) * SLAB
        made = rows[:, first : first + end - start].view(*out.shape[:2], end - start, rows.shape[-1])
        out[:, :, start:end] = factor * made[..., : out.shape[-1]]


def computed(
    problem: Problem, tensors: dict[str, Tensor], scale: float, lse: Tensor, delta: Tensor, seed: int
) -> list[Tensor]:
    """Gradients by `launch_as`, its kernels on the host."""
    x = {name: tensor.float() for name, tensor in tensors.items()}
    h, hk, n, m = problem.heads, problem.kv_heads, sum(problem.lengths_q), sum(problem.lengths_k)
    group = h // hk
    factors = None
    if problem.rank:
        pad = (0, COLUMNS - problem.rank)
        phi_q, phi_k = (torch.nn.functional.pad(phi, pad) for phi in (x["phi_q"] / scale, x["phi_k"]))
        factors = SimpleNamespace(phi_q=phi_q, phi_k=phi_k, raw_k=x["phi_k"])
    sharing_q, sharing_k = Sharing(1, 1, h, 1), Sharing(1, 1, hk, group)
    if problem.shares:
        sharing_q = sharing_k = Sharing(1, h, 1, 1)
    starts = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (problem.lengths_q, problem.lengths_k)
    ]
    ops: Any = SimpleNamespace(
        q=x["q"][None], k=x["k"][None], v=x["v"][None], factors=factors, batch=1, num_heads=h, group=group, seqlen_q=n,
        seqlen_k=m, head_dim=problem.width, head_dim_v=problem.width_v, block_d=problem.width,
        block_dv=problem.width_v, columns=COLUMNS if factors else 0, rank=problem.rank,
        shift=int(problem.bottom_right), window_left=problem.left, window_right=problem.right, scale=scale,
        sharing_q=sharing_q, sharing_k=sharing_k, sharing_mask=Sharing(1, 1, 1, 1), shape=None,
        table=None, code_q=None, code_k=None, table_sizes=(0, 0), table_over_scale=None,
        flat=lambda t: t if t.dim() == 4 else t[None], centring=Centring(None, None), is_tile_centred=False,
        is_varlen=True, sequences=len(problem.lengths_q), cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], mask=None,
        tile_terms=lambda keys: (None, None),
    )  # fmt: skip
    # What lies behind the last token is never read.
    lse2, deltas = (torch.full((h, n + SLAB), math.nan) for _ in range(2))
    lse2[:, :n] = torch.where(lse == -math.inf, math.inf, lse / math.log(2)).float()
    deltas[:, :n] = delta.float()
    grads = [torch.full_like(x[name], math.nan) for name in NAMES]
    needs = (True, True, True, problem.learns_factors, problem.learns_factors, False)

    launch(Device(seed), problem.programs, problem.config, ops, grads, x["dout"], (lse2, deltas), needs, unfold)
    return grads


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradients_in_any_order(problem: Problem, seed: int) -> None:
    """Of every sequence but one, all of which is NaN (with the last seed of none)."""
    scale, tensors, parts = 0.25, tensors_of(problem), problem.parts()
    poisoned = seed * 2 if seed < 3 else -1
    for name, x in tensors.items():
        if 0 <= poisoned < len(parts):
            x[:, parts[poisoned][0 if name in OF_QUERIES else 1]] = math.nan
    exact = {name: torch.full_like(tensors[name], math.nan) for name in NAMES}
    lse, delta = (torch.full(tensors["q"].shape[:2], math.nan).double() for _ in range(2))
    for s, (rows, keys) in enumerate(parts):
        if s == poisoned:
            continue
        own = {name: x[:, rows if name in OF_QUERIES else keys] for name, x in tensors.items()}
        shift = problem.lengths_k[s] - problem.lengths_q[s] if problem.bottom_right else 0
        grads, lse[:, rows], delta[:, rows] = expected(problem, own, scale, shift)
        for name, grad in grads.items():
            exact[name][:, rows if name in OF_QUERIES else keys] = grad
    found = computed(problem, tensors, scale, lse, delta, seed)
    for s, (rows, keys) in enumerate(parts):
        for name, grad in zip(NAMES, found, strict=True):
            if s == poisoned or (name.startswith("phi") and not problem.learns_factors):
                continue
            own = rows if name in OF_QUERIES else keys
            torch.testing.assert_close(
                grad[:, own].double(), exact[name][:, own], rtol=1e-4, atol=1e-4,
                msg=lambda m, name=name, s=s: f"{name} of sequence {s}: {m}",
            )  # fmt: skip
