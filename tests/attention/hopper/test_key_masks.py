"""Gradients beside masks of keys, by the fused kernel on a Hopper GPU: padding, masks of heads, hidden tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT, CAUSAL, TOP_LEFT
from tests.attention.hopper.marks import ON_HOPPER
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import LEAVES, Case, Problem

from flashbias.attention import packing

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

pytestmark = [*ON_HOPPER, pytest.mark.usefixtures("fused_gradients", "nan_filled_buffers")]

DEVICE = "cuda"
BANDS = {"full": {}, "top left": TOP_LEFT, "bottom right": BOTTOM_RIGHT, "window": TOP_LEFT | {"window": (150, None)}}


def shown(kind: str, own: tuple[int, ...], m: int) -> torch.Tensor:
    """A mask `[*own, 1, M]`, each of the leading ones another."""
    count = torch.Size(own).numel()
    place, each = torch.arange(m), torch.arange(count)[:, None]
    length = m - each * m // (count + 1)
    masks = {
        "right": place < length,
        "left": place >= m - length,
        "both": (place >= (m - length) // 2) & (place < m - (m - length) // 3),
        "random": torch.rand(count, m, generator=torch.Generator().manual_seed(m)) < 0.6,
        "one has no key": (place < length) & (each != count // 2),
        "one has one key": (place < length) & ((each != count // 2) | (place == m // 2)),
        "a hidden middle": (place < m // 4) | (place >= m - length // 4),
    }
    return masks[kind].view(*own, 1, m).to(DEVICE)


def check(problem: Problem, wanted: tuple[str, ...] = LEAVES) -> None:
    """Compare everything with the oracle; gradients of keys that are hidden from all are exactly zero."""
    leaves = problem.leaves(wanted)
    out, lse = problem.attend("hopper", leaves, return_lse=True, deterministic=False)
    results = differentiate(problem, leaves, out, lse, with_dlse=True)
    assert_close_to_oracle(problem, results, with_dlse=True)
    assert problem.attn_mask is not None
    hidden = ~problem.attn_mask.expand(*problem.case.batch, problem.case.heads, 1, -1)[..., 0, :]
    hidden = hidden.unflatten(-2, (problem.case.kv_heads or problem.case.heads, -1)).all(-2)
    assert hidden.any()
    for name in ("dkey", "dvalue"):
        assert (results[name][hidden] == 0).all(), name


def build(case: Case, kind: str, own: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Problem:
    return replace(case.build(dtype, DEVICE), attn_mask=shown(kind, own, case.seqlen_k))


KINDS = ["right", "left", "both", "random", "one has no key", "one has one key", "a hidden middle"]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_every_kind(head_dim: int, kind: str, band: str) -> None:
    case = Case("mask", batch=(3,), n=300, m=420, head_dim=head_dim, options=BANDS[band])
    check(build(case, kind, (3, 1)))


@pytest.mark.parametrize("m", [65, 128, 129, 191, 192, 193, 256, 384])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_every_end_of_the_keys(head_dim: int, m: int) -> None:
    for kind in ("right", "left"):
        check(build(Case("end", batch=(2,), n=150, m=m, head_dim=head_dim), kind, (2, 1)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, None), (4, 2), (6, 1)])
@pytest.mark.parametrize("own", [(1, 1), (3, 1), (1, -1), (3, -1)], ids=["one", "batch", "heads", "all"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_masks_that_heads_share_or_not(head_dim: int, own: tuple[int, int], heads: int, kv_heads: int | None) -> None:
    """Heads of one group may have masks of their own."""
    case = Case("heads", batch=(3,), heads=heads, kv_heads=kv_heads, n=200, m=330, head_dim=head_dim, phi_k=(1, 1))
    for kind in ("right", "random"):
        mask = shown(kind, (own[0], heads if own[1] < 0 else 1), case.seqlen_k)
        mask[..., 200:] = False
        check(replace(case.build(torch.bfloat16, DEVICE), attn_mask=mask))


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("codes", [None, "window"])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_tables(head_dim: int, codes: str | None, options: dict[str, Any]) -> None:
    """As text models that look positions up have them, beside padding; with factors and without."""
    for kind, rank in itertools.product(("right", "random", "one has no key"), (0, 3)):
        case = Case("table", batch=(3,), n=324, head_dim=head_dim, rank=rank, table=65, codes=codes, options=options)
        check(build(case, kind, (3, 1)))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_float16(head_dim: int) -> None:
    """Its factors are frozen: their gradients come from elsewhere."""
    for kind, options in itertools.product(("right", "left", "random"), ({}, CAUSAL)):
        case = Case("half", batch=(2,), n=300, head_dim=head_dim, options=options)
        check(build(case, kind, (2, 1), torch.float16), ("query", "key", "value"))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_hidden_keys_may_be_huge(head_dim: int, dtype: torch.dtype) -> None:
    """Their powers are infinite where the log-sum-exp does not count them."""
    problem = build(Case("huge", batch=(2,), n=200, m=300, head_dim=head_dim), "random", (2, 1), dtype)
    assert problem.attn_mask is not None
    key = problem.tensors["key"]
    problem.tensors["key"] = torch.where(problem.attn_mask.mT, key, 200 * key)
    check(problem, ("query", "key", "value"))


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_programs_take_many_tiles(head_dim: int, options: dict[str, Any]) -> None:
    """Tiles that are hidden and others, in one program."""
    case = Case("many", batch=(5,), heads=12, n=700, head_dim=head_dim, phi_q=(12,), phi_k=(1,), options=options)
    check(build(case, "one has no key", (5, 1)))


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("phi_q",), ("phi_k",)], ids="-".join)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_only_one_needs_a_gradient(head_dim: int, wanted: tuple[str, ...]) -> None:
    problem = build(Case("one", n=130, m=250, head_dim=head_dim), "both", (2, 1))
    leaves = problem.leaves(wanted)
    out, lse = problem.attend("hopper", leaves, return_lse=True, deterministic=False)
    assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, with_dlse=True), with_dlse=True)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("options", [{}, TOP_LEFT], ids=["full", "causal"])
def test_beside_centres_by_tile(head_dim: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TILE_CENTRE_FROM", packing.CENTRE_TILE)
    check(build(Case("centres", batch=(2,), n=330, m=450, head_dim=head_dim, options=options), "random", (2, 1)))
