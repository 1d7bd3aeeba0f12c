"""Gradients of the fused backward pass that are the same to the bit in every call, on a Hopper GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT, CAUSAL, TOP_LEFT
from tests.attention.hopper.marks import ON_HOPPER
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import LEAVES, Case

import flashbias as fb
from flashbias.attention import packing

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

pytestmark = ON_HOPPER

DEVICE = "cuda"
CALLS = 5

FROZEN = tuple(name for name in LEAVES if not name.startswith("phi"))
"""Leaves where factors are no parameters."""


BANDS = {
    "full": {},
    "causal": TOP_LEFT,
    "bottom-right": BOTTOM_RIGHT,
    "band": TOP_LEFT | {"window": (200, None)},
    "both": {"window": (90, 150), "causal_alignment": "bottom_right"},
    "left": {"window": (130, None), "causal_alignment": "top_left"},
}


@pytest.fixture(autouse=True)
def ordered(monkeypatch: pytest.MonkeyPatch, nan_filled_buffers: None) -> list[bool]:
    """NaN in every buffer; the fused kernel wherever it can do a call. Whether each launch of it had an order."""
    from flashbias.attention.hopper import backward

    found: list[bool] = []
    launch_as = backward.launch_as

    def spy(*arguments: Any) -> None:
        found.append(arguments[8])
        launch_as(*arguments)

    monkeypatch.setattr(backward, "launch_as", spy)
    monkeypatch.setattr(backward, "is_slower", lambda *_: False)
    return found


def check(
    case: Case,
    ordered: list[bool],
    *,
    dtype: torch.dtype = torch.bfloat16,
    wanted: tuple[str, ...] = LEAVES,
    has_order: bool = True,
    beside: Callable[[], Any] = lambda: None,
) -> None:
    """Compare output and gradients with the oracle, and gradients with those of further calls, bit by bit.

    Args:
        case: each (batch, head) pair has factors of its own where the case says nothing of them.
        ordered: what the fixture of this name finds.
        dtype: of queries, keys and values.
        wanted: leaves that get gradients.
        has_order: whether the fused kernel does it.
        beside: what else is launched before each backward pass.
    """
    own = (*case.batch, case.heads)
    problem = replace(case, phi_q=case.phi_q or own, phi_k=case.phi_k or own).build(dtype, DEVICE)
    leaves = problem.leaves(wanted)
    out, lse = problem.attend("hopper", leaves, return_lse=True, deterministic=True)
    results = differentiate(problem, leaves, out, lse, with_dlse=True)
    assert_close_to_oracle(problem, results, with_dlse=True)
    inputs = {name: x for name, x in leaves.items() if x.numel() and x.requires_grad}
    first: list[torch.Tensor] | None = None
    for _ in range(CALLS):
        out = problem.attend("hopper", leaves, deterministic=True)
        beside()
        grads = torch.autograd.grad(out, tuple(inputs.values()), problem.dout)
        first = first or list(grads)
        for name, grad, before in zip(inputs, grads, first, strict=True):
            assert torch.equal(grad, before), name
    assert ordered == [True] * (1 + CALLS if has_order else 0)


@pytest.mark.parametrize("options", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_every_width_and_band(head_dim: int, options: dict[str, Any], ordered: list[bool]) -> None:
    check(Case("widths", n=700, m=900, head_dim=head_dim, options=options), ordered)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(24, 40), (48, 48), (80, 80), (112, 96), (128, 64), (96, 128)])
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
def test_widths_that_differ(head_dim: int, head_dim_v: int, options: dict[str, Any], ordered: list[bool]) -> None:
    check(Case("values", n=700, head_dim=head_dim, head_dim_v=head_dim_v, options=options), ordered)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_without_factors(head_dim: int, ordered: list[bool]) -> None:
    check(Case("plain", n=700, head_dim=head_dim, rank=0), ordered, dtype=torch.float16)


@pytest.mark.parametrize(("n", "m"), [(17, 3000), (3000, 17), (65, 193), (1000, 129), (65, 64), (200, 1500)])
@pytest.mark.parametrize("options", [{}, BOTTOM_RIGHT], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_lengths(head_dim: int, options: dict[str, Any], n: int, m: int, ordered: list[bool]) -> None:
    """Some keys that nobody sees, some queries that see none."""
    check(Case("lengths", n=n, m=m, head_dim=head_dim, options=options), ordered)


@pytest.mark.parametrize("options", [{}, TOP_LEFT], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_masks_of_keys(head_dim: int, options: dict[str, Any], ordered: list[bool]) -> None:
    """The next block waits for one that is hidden altogether, too."""
    check(Case("mask", n=700, m=900, batch=(3,), head_dim=head_dim, mask="padding", options=options), ordered)


@pytest.mark.parametrize("mask", [None, "padding"])
@pytest.mark.parametrize("codes", [None, "window"])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_tables(head_dim: int, codes: str | None, mask: str | None, ordered: list[bool]) -> None:
    """Their own gradients come from a kernel that adds whole numbers."""
    check(Case("table", n=576, head_dim=head_dim, rank=0, table=301, codes=codes, mask=mask), ordered)


@pytest.mark.parametrize("phi", [(1, 1), (3, 1), (1, 4), (3, 4)], ids=str)
@pytest.mark.parametrize("wanted", [LEAVES, FROZEN], ids=["learned", "frozen"])
@pytest.mark.parametrize(("head_dim", "rank"), [(32, 5), (64, 16), (128, 9)])
def test_shared_factors(
    head_dim: int, rank: int, wanted: tuple[str, ...], phi: tuple[int, int], ordered: list[bool]
) -> None:
    """Of all pairs, of a batch or of a head; where they learn, the portable kernels sum their gradients."""
    case = Case("shared", n=400, batch=(3,), heads=4, head_dim=head_dim, rank=rank, phi_q=phi, phi_k=phi)
    check(case, ordered, wanted=wanted, has_order=wanted is FROZEN or phi == (3, 4))


@pytest.mark.parametrize("phi_k", [(2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, BOTTOM_RIGHT], ids=["full", "causal"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_queries(
    head_dim: int, kv_heads: int, options: dict[str, Any], phi_k: tuple[int, int], ordered: list[bool]
) -> None:
    """Heads of a group share keys, and phi_k."""
    wanted = LEAVES if (kv_heads, phi_k) == (1, (2, 1)) else FROZEN
    case = Case("gqa", n=300, m=550, heads=4, kv_heads=kv_heads, head_dim=head_dim, phi_k=phi_k, options=options)
    check(case, ordered, wanted=wanted)


@pytest.mark.parametrize("options", [{}, CAUSAL, CAUSAL | {"window": (200, None)}], ids=["full", "causal", "band"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_more_blocks_than_programs(head_dim: int, options: dict[str, Any], ordered: list[bool]) -> None:
    check(Case("many", n=1000, batch=(3,), heads=24, head_dim=head_dim, options=options), ordered)


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_all_blocks_of_one_head_at_once(head_dim: int, options: dict[str, Any], ordered: list[bool]) -> None:
    check(Case("one", n=6000, batch=(1,), heads=1, head_dim=head_dim, options=options), ordered)


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_centres_by_tile(
    head_dim: int, options: dict[str, Any], ordered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "TILE_CENTRE_FROM", packing.CENTRE_TILE)
    check(Case("centres", n=500, heads=4, head_dim=head_dim, rank=3, options=options), ordered)


def test_more_keys_than_one_centre_serves(ordered: list[bool]) -> None:
    torch.manual_seed(0)
    n = packing.TILE_CENTRE_FROM + 1000
    q, k, v, dout = (torch.randn(1, 2, n, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    phis = [torch.randn(2, n, 3, device=DEVICE) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (q, k, v, *phis)]
    runs = []
    for _ in range(CALLS):
        out = fb.attention(q, k, v, fb.FactoredBias(*phis), is_causal=True, impl="hopper", deterministic=True)
        runs.append(torch.autograd.grad(out, leaves, dout))
    assert ordered == [True] * CALLS
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    out = fb.attention(q, k, v, fb.FactoredBias(*phis), is_causal=True, impl="hopper", deterministic=False)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), runs[0], strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_beside_other_kernels(head_dim: int, options: dict[str, Any], ordered: list[bool]) -> None:
    """Which hold multiprocessors for a while, so that programs start late."""
    other = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device=DEVICE)

    def beside() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(4):
                a @ a

    check(Case("beside", n=1000, heads=12, head_dim=head_dim, options=options), ordered, beside=beside)


def test_a_captured_step_can_be_replayed(ordered: list[bool]) -> None:
    """Tickets begin anew."""
    own = (2, 2)
    problem = Case("graph", n=700, head_dim=64, phi_q=own, phi_k=own, options=CAUSAL).build(torch.bfloat16, DEVICE)
    leaves = problem.leaves()

    def step() -> tuple[torch.Tensor, ...]:
        out = problem.attend("hopper", leaves, deterministic=True)
        return torch.autograd.grad(out, tuple(leaves.values()), problem.dout)

    expected = [grad.clone() for grad in step()]
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        grads = step()
    for _ in range(3):
        for grad in grads:
            grad.zero_()
        graph.replay()
        assert all(torch.equal(grad, before) for grad, before in zip(grads, expected, strict=True))
    assert all(ordered)
