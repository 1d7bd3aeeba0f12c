"""The kernel for a table's gradient on the host: right sums in any order of the warpgroups, each pair once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import INTERPRETED
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from tests.attention.hopper.on_host import Box, Device, Launched, on_host

from flashbias.attention.hopper import scores, table, tiles
from flashbias.attention.hopper.configs import SLAB, TABLE_KEYS, TableConfig, columns_of
from flashbias.attention.layout import Sharing, cdiv
from flashbias.factored import relative_lookup

POWER = 2.0**40


@dataclass(frozen=True)
class Problem:
    """A call; one table for each head, or one for all."""

    name: str
    n: int = 200
    m: int = 150
    batch: int = 3
    heads: int = 2
    kv_heads: int = 2
    width: int = 16
    width_v: int = 16
    rank: int = 3
    entries: int = 99
    is_shared: bool = False
    codes: bool = False
    mask: tuple[int, int] = (0, 0)  # of how many batch elements and heads
    left: int = -1
    right: int = -1
    shift: int = 0
    stages: int = 2
    processors: int = 5

    def __str__(self) -> str:
        return self.name


PROBLEMS = [
    Problem("plain"),
    Problem("no factors, one table for all", rank=0, is_shared=True),
    Problem("codes", codes=True, n=400, m=70, stages=3),
    Problem("codes, one table for all, grouped heads", codes=True, is_shared=True, heads=4, kv_heads=2),
    Problem("tails on both sides", entries=5, n=300, m=300),
    Problem("causal, keys at the end", right=0, shift=64, n=300, m=364, batch=2),
    Problem("window beside codes", left=50, right=20, codes=True, n=250, m=260),
    Problem("mask of each head", mask=(3, 2)),
    Problem("mask of the batch, widths that differ", mask=(3, 1), width=24, width_v=40),
    Problem("more pairs in flight than there are", batch=1, heads=1, kv_heads=1, stages=4, processors=1),
]


def draw(problem: Problem) -> dict[str, Tensor]:
    """What a call gets."""
    b, h, hk, n, m = problem.batch, problem.heads, problem.kv_heads, problem.n, problem.m
    torch.manual_seed(0)
    sizes = {
        "q": (b, h, n, problem.width), "k": (b, hk, m, problem.width), "v": (b, hk, m, problem.width_v),
        "dout": (b, h, n, problem.width_v), "phi_q": (h, n, problem.rank), "phi_k": (h, m, problem.rank),
        "table": (1 if problem.is_shared else h, problem.entries), "dlse": (b, h, n),
    }  # fmt: skip
    x = {name: torch.randn(size) for name, size in sizes.items()}
    most = problem.entries // 2 + 20
    x |= {name: torch.randint(0, most, (size,)) for name, size in (("code_q", n), ("code_k", m))}
    if not problem.codes:
        x |= {"code_q": torch.arange(n), "code_k": torch.arange(m)}
    x["mask"] = torch.rand(*problem.mask, 1, m) < 0.6
    return x


def exact(problem: Problem, x: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the table; log-sum-exp and delta, `[B, H, N]`; all in float64."""
    own = {name: t.double() for name, t in x.items() if t.is_floating_point()}
    group = problem.heads // problem.kv_heads
    k, v = (own[name].repeat_interleave(group, 1) for name in ("k", "v"))
    entries = own["table"].requires_grad_()
    s = scale * own["q"] @ k.mT + own["phi_q"] @ own["phi_k"].mT + relative_lookup(entries, x["code_q"], x["code_k"])
    step = torch.arange(problem.m) - torch.arange(problem.n)[:, None] - problem.shift
    seen = (problem.left < 0) | (step >= -problem.left)
    seen = seen & ((problem.right < 0) | (step <= problem.right))
    if problem.mask[0]:
        seen = seen & x["mask"]
    s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    weights = (s - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    out = weights @ v
    loss = (out * own["dout"]).sum() + (torch.where(lse.isfinite(), lse, 0.0) * own["dlse"]).sum()
    (grad,) = torch.autograd.grad(loss, entries)
    return grad, lse.detach(), ((out * own["dout"]).sum(-1) - own["dlse"]).detach()


def rows(x: Tensor, past_the_end: float) -> Tensor:
    """As the backward pass has them: rows up to a whole number of slabs."""
    found = torch.full((*x.shape[:-1], cdiv(x.shape[-1], SLAB) * SLAB), past_the_end)
    found[..., : x.shape[-1]] = x
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_sums_in_any_order(problem: Problem, seed: int) -> None:
    x, scale, columns = draw(problem), 0.25, columns_of(max(problem.rank, 1))
    expected, lse, delta = exact(problem, x, scale)
    lse2 = rows(torch.where(lse.isinf(), math.inf, lse / math.log(2)).float(), math.inf)
    h, hk, b = problem.heads, problem.kv_heads, problem.batch
    pad = (0, columns - problem.rank)
    phi_q, phi_k = (torch.nn.functional.pad(phi, pad) for phi in (x["phi_q"] / scale, x["phi_k"]))
    terms = None
    if problem.mask[0]:
        wide = torch.zeros(math.prod(problem.mask), cdiv(problem.m, TABLE_KEYS) * TABLE_KEYS, dtype=torch.bool)
        wide[:, : problem.m] = x["mask"].flatten(0, 2)
        terms = torch.zeros(wide.shape).masked_fill(~wide, -math.inf)
    sharing_mask = Sharing(b, h // problem.mask[1], problem.mask[1], 1) if terms is not None else Sharing(1, 1, 1, 1)
    ops: Any = SimpleNamespace(
        q=x["q"], k=x["k"], v=x["v"], block_d=columns_of(problem.width), block_dv=columns_of(problem.width_v),
        columns=columns, factors=SimpleNamespace(phi_q=phi_q, phi_k=phi_k) if problem.rank else None, scale=scale,
        num_programs=b * h, num_heads=h, group=h // hk, seqlen_q=problem.n, seqlen_k=problem.m, shift=problem.shift,
        window_left=problem.left, window_right=problem.right, shape=None, key_terms=lambda keys: terms,
        table=x["table"], code_q=x["code_q"] if problem.codes else None, code_k=x["code_k"],
        table_sizes=(0 if problem.is_shared else problem.entries, problem.entries // 2), sharing_mask=sharing_mask,
        sharing_q=Sharing(1, b, h, 1), sharing_k=Sharing(1, b, h, 1),
    )  # fmt: skip
    sums, failed = torch.zeros(expected.numel(), dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    device, grad = Device(seed), torch.empty(expected.shape)

    class Sums(tuple[Tensor, ...]):
        def write(self, grad: Tensor) -> None:
            grad.copy_((self[0] / POWER).view(grad.shape))

    made = SimpleNamespace(of=lambda *_: Sums((sums, torch.tensor([POWER]), failed)))
    with on_host(device, (table, tiles, scores)) as patch:
        patch.setattr(table, "FixedPoint", made)
        patch.setattr(table, "multiprocessors", lambda _: problem.processors)
        patch.setattr(table, "descriptor", lambda t, r, c: Box(t, r, c, multiplied=columns_of))
        patch.setattr(table, "matrix", lambda _: None)
        patch.setattr(table, "_dtable_kernel", Launched(table._dtable_kernel, device))
        config = TableConfig(problem.stages)
        table.launch(config, ops, grad, x["dout"], None, lse2, rows(delta.float(), 0.0))
    assert failed[0] == 0
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@given(tiles=st.integers(1, 3000), pairs=st.integers(1, 5000), processors=st.sampled_from([1, 78, 132]))
def test_parts_hold_all_pairs_and_are_few(tiles: int, pairs: int, processors: int) -> None:
    each = table.pairs_of_a_walk(tiles, pairs, processors)
    assert 1 <= each <= pairs
    # No more programs than are needed to keep all multiprocessors at work, but for the last round of them.
    assert (cdiv(pairs, each) - 1) * tiles <= processors * (table.ADDING + pairs)


def test_pairs_are_cut_where_that_ends_sooner() -> None:
    assert table.pairs_of_a_walk(tiles=132, pairs=64, processors=132) == 64
    assert table.pairs_of_a_walk(tiles=27, pairs=1024, processors=132) < 300
    assert table.pairs_of_a_walk(tiles=1000, pairs=2, processors=132) == 2
