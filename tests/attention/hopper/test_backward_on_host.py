"""The fused backward kernels on the host: right gradients in any order of the warpgroups, and nobody gets stuck."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from tests.attention.hopper.exact import attended
from tests.attention.hopper.on_host import Box, Device, Launched, PackedBox, on_host

from flashbias.attention import packing
from flashbias.attention.hopper import backward, chunks, fused, order, slabs, tiles, walks, wide
from flashbias.attention.hopper import scores as kernel_scores
from flashbias.attention.hopper.configs import SLAB, BackwardConfig, columns_of
from flashbias.attention.hopper.operands import Centring, HopperOperands
from flashbias.attention.layout import Sharing, cdiv, share

COLUMNS = 16


@dataclass(frozen=True)
class Problem:
    """A call, and the tile shape that does it."""

    name: str
    config: BackwardConfig
    n: int
    m: int
    width: int = 16
    width_v: int = 16
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    rank: int = 3
    shares: bool = False  # one factor for all of the batch
    one_phi_k: bool = False  # for all of batch and heads
    freezes_phi_q: bool = False
    left: int = -1
    right: int = -1
    learns: bool = True
    programs: int = 2
    shift: int = 0
    centred: bool = False  # tile by tile
    half: int = 0  # entries of a table on each side of the middle one
    codes: bool = False  # of the table, not positions
    mask: tuple[int, int] | None = None  # leading sizes of a mask of keys

    def __str__(self) -> str:
        return self.name

    @property
    def needs_phi_q(self) -> bool:
        return self.learns and self.rank > 0 and not self.freezes_phi_q

    @property
    def has_order(self) -> bool:
        """Whether no two (batch, head of keys) pairs add to the gradient of one factor."""
        is_shared = self.shares and self.batch > 1
        return not self.learns or self.rank == 0 or not (is_shared or self.one_phi_k)

    @property
    def sums_columns(self) -> bool:
        return self.centred and self.needs_phi_q


def narrow(consumers: int = 2, stages: int = 2, kv_stages: int = 2, holds_phi: bool = True) -> BackwardConfig:
    return BackwardConfig(consumers, stages, kv_stages, is_wide=False, holds_phi=holds_phi)


WIDE = BackwardConfig(2, 2, 1, is_wide=True)

PROBLEMS = [
    Problem("plain", narrow(), 130, 200),
    Problem("three warpgroups", narrow(3), 70, 300, heads=1, kv_heads=1),
    Problem("one tile of keys at a time", narrow(kv_stages=1, stages=3, holds_phi=False), 200, 260),
    Problem("one stage", narrow(stages=1), 100, 256, learns=False),
    Problem("no factors", narrow(), 129, 128, rank=0),
    Problem("keys that nobody sees", narrow(), 40, 1200, right=0, heads=1, kv_heads=1, programs=1),
    Problem("keys that nobody sees, three warpgroups", narrow(3), 70, 900, right=0, heads=3, kv_heads=3, programs=1),
    Problem("causal", narrow(), 300, 300, right=0, batch=2),
    Problem("window", narrow(), 260, 330, left=40, right=25, heads=1, kv_heads=1),
    Problem("grouped heads", narrow(), 70, 200, heads=4, kv_heads=2),
    Problem("grouped heads, idle warpgroups", narrow(3), 70, 65, heads=4, kv_heads=2, batch=2, programs=3),
    Problem("shared factors", narrow(), 90, 130, batch=3, shares=True),
    Problem("other width of values", narrow(), 70, 130, width=32),
    Problem("wide", WIDE, 130, 200, width=32, width_v=16),
    Problem("wide, causal, grouped", WIDE, 90, 400, width=32, width_v=32, heads=2, kv_heads=1, right=0),
    Problem("wide, frozen", WIDE, 200, 130, width=32, learns=False, rank=0),
    Problem("two chunks", narrow(), 130, 200, width=48, width_v=40),
    Problem("two chunks, narrow values", narrow(holds_phi=False), 70, 200, width=40, width_v=24, right=0),
    Problem("wide, two sums", WIDE, 130, 200, width=80, width_v=96),
    Problem("wide, two sums, causal, grouped", WIDE, 90, 300, width=88, width_v=72, kv_heads=1, right=0, shift=100),
    Problem("wide, two sums of keys", WIDE, 130, 200, width=96, width_v=64, rank=0),
    Problem("wide, two sums of values", WIDE, 130, 200, width=128, width_v=80),
    Problem("wide, three chunks", WIDE, 130, 200, width=112, width_v=104, learns=False),
    Problem("centres, wide, two sums", WIDE, 300, 300, width=80, width_v=80, right=0, centred=True),
    Problem("centres", narrow(), 130, 300, centred=True, shift=170),
    Problem("centres, three warpgroups", narrow(3), 200, 450, rank=7, batch=2, centred=True, shift=250),
    Problem("centres, frozen", narrow(3), 150, 150, rank=8, learns=False, centred=True),
    Problem("centres, causal, shared", narrow(stages=1), 300, 300, right=0, batch=2, shares=True, centred=True),
    Problem("centres, grouped heads", narrow(), 200, 200, heads=4, learns=False, centred=True),
    Problem("centres, wide", WIDE, 330, 330, width=32, width_v=16, right=0, centred=True),
    Problem("centres, grouped heads, one phi_k", narrow(), 200, 330, heads=4, batch=2, one_phi_k=True, centred=True),
    Problem(
        "centres, grouped heads, one phi_k, wide",
        WIDE,
        90,
        200,
        width=32,
        heads=4,
        kv_heads=1,
        batch=2,
        one_phi_k=True,
        shares=True,
        right=0,
        shift=110,
        centred=True,
    ),
    Problem(
        "centres, three warpgroups, window",
        narrow(3),
        300,
        500,
        rank=7,
        batch=2,
        heads=4,
        one_phi_k=True,
        left=150,
        right=20,
        shift=200,
        centred=True,
    ),
    Problem("centres, more queries than keys", narrow(3), 500, 210, rank=5, batch=2, centred=True, programs=3),
    Problem(
        "centres, rank 6, one tile of keys at a time",
        narrow(3, stages=1, kv_stages=1),
        140,
        410,
        rank=6,
        right=0,
        shift=270,
        centred=True,
    ),
    Problem("table of positions", narrow(), 200, 330, rank=0, half=40, batch=2),
    Problem("table of positions, grouped heads, causal", narrow(), 300, 300, heads=4, half=130, right=0),
    Problem("table with codes", narrow(stages=1), 130, 200, rank=0, half=12, codes=True),
    Problem("table with codes, factors", narrow(3), 70, 230, half=7, codes=True, batch=2, shares=True),
    Problem("table with codes, window", narrow(), 150, 170, half=9, codes=True, left=30, right=50, learns=False),
    Problem("table, centres", narrow(), 140, 300, half=50, centred=True, shift=160),
    Problem("centres, frozen phi_q", narrow(), 140, 300, rank=8, heads=4, batch=2, freezes_phi_q=True, centred=True),
    Problem(
        "centres, frozen phi_q, three warpgroups",
        narrow(3),
        140,
        300,
        rank=8,
        freezes_phi_q=True,
        right=0,
        shift=160,
        centred=True,
    ),
    Problem("mask", narrow(), 130, 200, mask=(1, 1)),
    Problem("mask, whole tiles", narrow(stages=1), 70, 512, batch=3, mask=(3, 1), programs=3),
    Problem("mask of each head", narrow(), 70, 500, heads=4, kv_heads=2, batch=2, mask=(2, 4)),
    Problem("mask of each head, idle warpgroups", narrow(3), 70, 465, heads=4, kv_heads=1, mask=(1, 4), programs=1),
    Problem("mask, causal", narrow(3), 300, 300, right=0, batch=2, mask=(2, 1)),
    Problem("mask, window", narrow(), 260, 330, left=40, right=25, mask=(1, 2)),
    Problem("mask, wide", WIDE, 130, 400, width=32, width_v=16, batch=2, mask=(2, 1)),
    Problem("mask of each head, wide, causal", WIDE, 90, 400, width=32, heads=4, kv_heads=2, right=0, mask=(1, 4)),
    Problem("mask of each head, table", narrow(), 130, 400, rank=0, half=40, batch=2, mask=(1, 2)),
    Problem(
        "mask, table with codes, causal, idle warpgroups", narrow(3), 200, 260, half=9, codes=True, right=0, mask=(1, 1)
    ),
    Problem("mask, wide, two sums", WIDE, 130, 400, width=80, width_v=96, batch=2, mask=(2, 1)),
    Problem("mask, centres", narrow(3), 200, 450, rank=7, batch=2, centred=True, shift=250, mask=(2, 1)),
]


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """Queries, keys, values and factors, in float64."""
    torch.manual_seed(0)
    b, h, hk = problem.batch, problem.heads, problem.kv_heads
    own = 1 if problem.shares else b
    return {
        "q": torch.randn(b, h, problem.n, problem.width).double(),
        "k": torch.randn(b, hk, problem.m, problem.width).double(),
        "v": torch.randn(b, hk, problem.m, problem.width_v).double(),
        "phi_q": torch.randn(own, h, problem.n, problem.rank).double(),
        "phi_k": torch.randn(*(1, 1) if problem.one_phi_k else (own, hk), problem.m, problem.rank).double(),
    }


def table_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """A table of each head, `[H, 2 half + 1]`, and codes of queries and keys: positions, or some that lie apart."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(problem.heads, 2 * problem.half + 1, generator=generator, dtype=torch.float64)
    if not problem.codes:
        return table, torch.arange(problem.n), torch.arange(problem.m)
    code_q, code_k = (torch.randint(-20, 20, (n,), generator=generator) for n in (problem.n, problem.m))
    return table, code_q, code_k


def mask_of(problem: Problem) -> Tensor | None:
    """`[*own, 1, M]`: short rows, the last one without a key; here and there a hidden key, and a whole hidden tile."""
    if problem.mask is None:
        return None
    count = problem.mask[0] * problem.mask[1]
    lengths = torch.linspace(problem.m, 0 if count > 1 else problem.m * 2 // 3, count).long()
    shown = (torch.arange(problem.m) < lengths[:, None]) & (torch.rand(count, problem.m) < 0.8)
    shown[0, 192 : 192 * 2] = False
    return shown.view(*problem.mask, 1, problem.m)


def expected(
    problem: Problem, leaves: dict[str, Tensor], scale: float, dout: Tensor, mask: Tensor | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients by autograd; log-sum-exp and delta."""
    x = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    repeated = {
        name: x[name] if x[name].shape[1] == 1 else x[name].repeat_interleave(problem.heads // problem.kv_heads, 1)
        for name in ("k", "v", "phi_k")
    }
    scores = scale * x["q"] @ repeated["k"].mT + x["phi_q"] @ repeated["phi_k"].mT
    table, code_q, code_k = table_of(problem)
    if problem.half:
        entry = (code_k - code_q[:, None]).clamp(-problem.half, problem.half) + problem.half
        scores = scores + table[:, entry]
    weights, lse = attended(scores, problem.shift, problem.left, problem.right, mask)
    out = weights @ repeated["v"]
    (out * dout).sum().backward()
    return (
        {name: leaf.grad for name, leaf in x.items() if leaf.grad is not None},
        lse.detach(),
        (out * dout).sum(-1).detach(),
    )


def centred(problem: Problem, phi_q: Tensor, phi_k: Tensor, lse: Tensor) -> tuple[Centring, Tensor]:
    """Centres by tile, and the log-sum-exp of scores measured from those opposite to the queries."""
    tiles, opposite = (torch.arange(0, n, packing.CENTRE_TILE) for n in (problem.m, problem.n))
    starts = torch.cat([tiles, opposite + problem.m - problem.n])
    centring = Centring(phi_q, packing.centre_of(phi_k, starts, packing.CENTRE_TILE), len(tiles))
    group, members = problem.heads // problem.kv_heads, problem.batch if problem.shares else 1
    references = centring.references(problem.n)
    if not problem.one_phi_k:
        references = references.repeat_interleave(group, 0).repeat(members, 1, 1)
    constant = (phi_q.repeat(members, 1, 1) * references).sum(-1)
    return centring, lse - constant.view(lse.shape)


def slab_order(columns: int) -> Tensor:
    """Place in a slab of each (row, column)."""
    i, j = torch.arange(SLAB)[:, None], torch.arange(columns)
    return (j & 1) + 2 * (i >> 3 & 1) + 4 * (j >> 1 & 3) + 16 * (i & 7) + 128 * (i >> 4) + 512 * (j >> 3)


def to_slab(x: Tensor) -> Tensor:
    flat = torch.empty(x.numel())
    flat[slab_order(x.shape[1])] = x
    return flat


def unfold(sums: Tensor, out: Tensor, factor: float, cu_seqlens: None = None) -> None:
    groups, rows, across, size = sums.shape
    columns = size // SLAB
    made = sums[..., slab_order(columns)].permute(0, 1, 3, 2, 4).reshape(groups, rows * SLAB, across * columns)
    made = made.view(*out.shape[:2], *made.shape[1:])
    out.copy_(factor * made[:, :, : out.shape[2], : out.shape[3]])


def launch(
    device: Device,
    programs: int,
    config: BackwardConfig,
    ops: Any,
    grads: list[Tensor],
    dout: Tensor,
    rows: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
    unfold: Callable[..., None],
    repeatable: bool = False,
) -> None:
    """`launch_as`, its kernels on the host, with log-sum-exp and delta as given."""
    tickets = itertools.count()
    with on_host(device, (fused, wide, chunks, walks, order, tiles, kernel_scores)) as patch:
        patch.setattr(tiles, "ticket", lambda _: next(tickets))
        patch.setattr(backward, "multiprocessors", lambda _: programs)
        patch.setattr(backward.portable, "rows_of", lambda *_: rows)
        for name, kind in (("descriptor", Box), ("packed", PackedBox)):
            boxes = functools.partial(kind, multiplied=backward.multiplied)
            patch.setattr(backward, name, boxes)
        patch.setattr(backward, "matrix", lambda _: None)
        patch.setattr(backward, "layout_of", lambda *_: None)
        patch.setattr(
            slabs, "box_of", lambda t, c: Box(t.view(-1, slabs.LINE), SLAB * c // slabs.LINE, slabs.LINE, to_slab)
        )
        patch.setattr(slabs, "unfold", unfold)
        patch.setattr(backward, "_bwd_kernel", Launched(fused._bwd_kernel, device))
        patch.setattr(backward, "_bwd_wide_kernel", Launched(wide._bwd_wide_kernel, device))
        dummy = torch.empty(0)
        backward.launch_as(config, ops, grads, dout, None, dummy, dummy, needs, repeatable)


def computed(problem: Problem, leaves: dict[str, Tensor], scale: float, dout: Tensor, lse: Tensor, delta: Tensor,
             mask: Tensor | None, seed: int, repeatable: bool = False) -> list[Tensor]:  # fmt: skip
    """Gradients by `launch_as`, its kernels on the host."""
    x = {name: leaf.float() for name, leaf in leaves.items()}
    b, h, hk = problem.batch, problem.heads, problem.kv_heads
    group = h // hk
    factors, centring = None, Centring(None, None)
    if problem.rank:
        pad = (0, COLUMNS - problem.rank)
        raw_q, raw_k = x["phi_q"].flatten(0, 1), x["phi_k"].flatten(0, 1)
        packed_q, packed_k = raw_q / scale, raw_k
        if problem.centred:
            centring, lse = centred(problem, raw_q, raw_k, lse)
            assert centring.centres is not None
            own = centring.centres[:, : centring.tiles].repeat_interleave(packing.CENTRE_TILE, 1)
            packed_k = raw_k - own[:, : problem.m]
        factors = SimpleNamespace(
            phi_q=torch.nn.functional.pad(packed_q, pad), phi_k=torch.nn.functional.pad(packed_k, pad), raw_k=raw_k
        )
    # A factor for each head, of each batch element or of all; that of keys for each head of keys.
    own, members = (1, b) if problem.shares else (b, 1)
    sharing_q, sharing_k = Sharing(1, members, own * h, 1), Sharing(1, members, own * hk, group)
    if problem.one_phi_k:
        sharing_k = Sharing(1, b * h, 1, 1)
    table, code_q, code_k = table_of(problem)
    has_codes = problem.half > 0 and problem.codes
    ops: Any = SimpleNamespace(
        q=x["q"], k=x["k"], v=x["v"], factors=factors, batch=b, num_heads=h, group=group, seqlen_q=problem.n,
        seqlen_k=problem.m, head_dim=problem.width, head_dim_v=problem.width_v, block_d=columns_of(problem.width),
        block_dv=columns_of(problem.width_v), columns=COLUMNS if factors else 0, rank=problem.rank, shift=problem.shift,
        window_left=problem.left, window_right=problem.right, scale=scale, sharing_q=sharing_q, sharing_k=sharing_k,
        shape=None, flat=lambda t: t, centring=centring, is_tile_centred=problem.centred, is_varlen=False,
        cu_seqlens_q=None, cu_seqlens_k=None, mask=None if mask is None else mask.flatten(0, 1).view(torch.uint8),
        sharing_mask=share((b, h), problem.mask or ()),
        table=table.float() if problem.half else None, code_q=code_q.int() if has_codes else None,
        code_k=code_k.int() if has_codes else None, table_sizes=(table.stride(0), problem.half),
        table_over_scale=(table / scale).float() if problem.half else None,
    )  # fmt: skip
    for method in (HopperOperands.key_terms, HopperOperands.tile_terms):
        setattr(ops, method.__name__, MethodType(method, ops))
    rows = cdiv(problem.n, SLAB) * SLAB
    lse2 = torch.full((b * h, rows), math.inf)
    lse2[:, : problem.n] = torch.where(lse == -math.inf, math.inf, lse / math.log(2)).float().flatten(0, 1)
    deltas = torch.zeros(b * h, rows)
    deltas[:, : problem.n] = delta.float().flatten(0, 1)
    grads = [torch.full_like(t, math.nan) for t in x.values()]
    needs = (True, True, True, problem.needs_phi_q, problem.learns and problem.rank > 0, False)

    device = Device(seed)
    config = replace(problem.config, is_centred=problem.centred)
    rows_of = lse2, deltas
    launch(device, problem.programs, config, ops, grads, dout.float(), rows_of, needs, unfold, repeatable)
    return grads


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradients_in_any_order(problem: Problem, seed: int) -> None:
    scale = 0.25
    leaves = leaves_of(problem)
    dout = torch.randn(problem.batch, problem.heads, problem.n, problem.width_v).double()
    mask = mask_of(problem)
    exact, lse, delta = expected(problem, leaves, scale, dout, mask)
    check(problem, computed(problem, leaves, scale, dout, lse, delta, mask, seed), exact)


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem.has_order], ids=str)
def test_the_same_bits_in_any_order(problem: Problem) -> None:
    """All programs at the same time, in orders that differ: every sum is made in one."""
    scale = 0.25
    leaves = leaves_of(problem)
    dout = torch.randn(problem.batch, problem.heads, problem.n, problem.width_v).double()
    mask = mask_of(problem)
    exact, lse, delta = expected(problem, leaves, scale, dout, mask)
    runs = []
    for seed, programs in enumerate((1, 2, 5)):
        own = replace(problem, programs=programs)
        runs.append(computed(own, leaves, scale, dout, lse, delta, mask, seed, repeatable=True))
        check(problem, runs[-1], exact)
    for run in runs[1:]:
        for name, grad, first in zip(leaves, run, runs[0], strict=True):
            assert torch.equal(grad.nan_to_num(7.0), first.nan_to_num(7.0)), name


def check(problem: Problem, found: list[Tensor], exact: dict[str, Tensor]) -> None:
    """Compare gradients with those of autograd."""
    for name, grad in zip(exact, found, strict=True):
        if name.startswith("phi") and not (problem.learns and problem.rank):
            continue
        if name == "phi_q" and problem.freezes_phi_q:
            continue
        torch.testing.assert_close(
            grad.double(), exact[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
