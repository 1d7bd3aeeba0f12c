"""Gradients of tables by their own kernel on a Hopper GPU: every width and band, in one part and in many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT, TOP_LEFT
from tests.attention.hopper.marks import ON_HOPPER
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import LEAVES, Case, Problem

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

from flashbias.attention.hopper import table

pytestmark = [*ON_HOPPER, pytest.mark.usefixtures("fused_gradients", "nan_filled_buffers")]

DEVICE = "cuda"
BANDS = {
    "full": {},
    "top left": TOP_LEFT,
    "bottom right": BOTTOM_RIGHT,
    "window": TOP_LEFT | {"window": (150, None)},
    "both sides": {"window": (90, 40), "causal_alignment": "bottom_right"},
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pairs a program took in each launch; that there are none is a failure of the test."""
    seen: list[int] = []
    choose = table.pairs_of_a_walk

    def spy(*arguments: int) -> int:
        seen.append(choose(*arguments))
        return seen[-1]

    monkeypatch.setattr(table, "pairs_of_a_walk", spy)
    monkeypatch.setattr(table, "FEWEST_PAIRS", 1)
    yield seen
    assert seen, "the portable kernel has made the gradient"


def check(problem: Problem, wanted: tuple[str, ...] = LEAVES, *, deterministic: bool = False) -> None:
    """Compare everything with the oracle."""
    leaves = problem.leaves(wanted)
    out, lse = problem.attend("hopper", leaves, return_lse=True, deterministic=deterministic)
    assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, with_dlse=True), with_dlse=True)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_every_width_and_band(head_dim: int, rank: int, band: str, launches: list[int]) -> None:
    """Of positions, in the middle and in tails; and of codes."""
    for entries, codes in ((33, None), ("toeplitz", None), (1089, "window")):
        case = Case("table", batch=(3,), n=324, head_dim=head_dim, rank=rank, table=entries, codes=codes,
                    options=BANDS[band])  # fmt: skip
        check(case.build(torch.bfloat16, DEVICE))
    assert len(launches) == 3


@pytest.mark.parametrize(("n", "m"), [(129, 70), (192, 64), (193, 65), (383, 500), (577, 1)])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_every_end(head_dim: int, n: int, m: int) -> None:
    for options in ({}, BOTTOM_RIGHT):
        check(Case("end", n=n, m=m, head_dim=head_dim, table=99, options=options).build(torch.bfloat16, DEVICE))


@pytest.mark.parametrize("processors", [1, 3, 1000])
@pytest.mark.parametrize("table_heads", [1, None], ids=["one table", "own tables"])
def test_parts(table_heads: int | None, processors: int, monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    """Pairs that no number of parts divides, heads that share their keys."""
    monkeypatch.setattr(table, "multiprocessors", lambda device: processors)
    for batch in (1, 7, 23):
        case = Case(
            "parts", batch=(batch,), heads=4, kv_heads=2, n=200, table=65, table_heads=table_heads, phi_k=(1, 1)
        )
        check(case.build(torch.bfloat16, DEVICE))
    if processors == 1000:
        assert launches[-1] < 23


@pytest.mark.parametrize("widths", [(24, 40), (48, 16), (16, 64)], ids=str)
def test_widths_that_differ(widths: tuple[int, int]) -> None:
    case = Case("widths", n=300, head_dim=widths[0], head_dim_v=widths[1], rank=3, table=99)
    for dtype in (torch.bfloat16, torch.float16):
        check(case.build(dtype, DEVICE), ("query", "key", "value", "table"))


@pytest.mark.parametrize("rank", [17, 40])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_wide_factors(head_dim: int, rank: int) -> None:
    """Fewer pairs are in flight; factors have one row for the whole batch, and their own for each element."""
    for lead in ((1, 2), (3, 2)):
        case = Case("wide", batch=(3,), n=300, head_dim=head_dim, rank=rank, table=99, phi_q=lead, phi_k=lead,
                    same_dtype=True)  # fmt: skip
        check(case.build(torch.bfloat16, DEVICE), ("query", "key", "value", "table"))


@pytest.mark.parametrize("own", [(1, 1), (3, 1), (3, 2)], ids=str)
def test_masks_of_keys(own: tuple[int, int]) -> None:
    for head_dim, options in itertools.product((16, 64), ({}, TOP_LEFT)):
        problem = Case("mask", batch=(3,), n=300, m=420, head_dim=head_dim, table=99, options=options).build(
            torch.bfloat16, DEVICE
        )
        problem.attn_mask = torch.rand(*own, 1, 420, device=DEVICE) < 0.6
        problem.attn_mask[0, 0] = False
        check(problem)


def test_the_same_bits_twice() -> None:
    """With additions of other gradients in one order and without."""
    problem = Case("twice", batch=(40,), n=600, head_dim=32, rank=0, table=2209, codes="window").build(
        torch.bfloat16, DEVICE
    )
    found: list[Any] = []
    for deterministic in (True, False, True):
        leaves = problem.leaves()
        out = problem.attend("hopper", leaves, deterministic=deterministic)
        found.append(torch.autograd.grad(out, leaves["table"], problem.dout)[0])
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "value", "dout"])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    problem = Case("bad", n=200, rank=0, table=65).build(torch.bfloat16, DEVICE)
    spoilt = problem.dout if name == "dout" else problem.tensors[name]
    spoilt.view(-1)[spoilt.numel() // 2] = bad
    leaves = problem.leaves()
    grads = torch.autograd.grad(problem.attend("hopper", leaves), [leaves["query"], leaves["table"]], problem.dout)
    assert grads[1].isnan().all()
