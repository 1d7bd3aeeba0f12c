"""`context_parallel_attention` against one process and the dense matrix, in every way that ranks share a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.distributed.problem import Case, assert_equal, solve
from tests.distributed.ranks import Place, Ranks

import flashbias.distributed as cp
from flashbias.distributed.topology import Circle
from flashbias.distributed.ulysses import HeadExchange

EXACT = 1e-12
PLAIN = Case("plain")
TABLE = Case("table by position", table=(12, 9))
DOCUMENTS = Case("documents", n=41, batch=(), documents=(0, 3, 3, 25, 30, 41), table=(12, 9), with_dlse=True)
CASES = [
    Case("no bias", rank=0),
    Case("own factors", batch=(2,), phi_q=(2, 12), phi_k=(2, 12), with_dlse=True),
    Case("factors for all heads", phi_q=(1,), phi_k=(1,), with_dlse=True),
    Case("batches", batch=(2, 3), n=13, phi_q=(1, 3, 12), phi_k=(2, 1, 1)),
    TABLE,
    Case("table by codes", rank=0, table=(12, 9), codes=True),
    Case("table for all heads", rank=2, table=(1, 5), codes=True, phi_k=(12,), with_dlse=True),
    Case("ranks per head", rank=4, ranks=(4, 3, 2, 1, 0, 4, 4, 4, 1, 1, 2, 2), phi_k=(12,), with_dlse=True),
    Case("grouped", kv_heads=4, head_dim_v=6, table=(12, 5)),
    Case("two key heads", kv_heads=2, phi_k=(12,)),
    Case("one key head", kv_heads=1, phi_k=(12,)),
    DOCUMENTS,
    Case("documents by codes", n=37, batch=(1,), kv_heads=4, documents=(0, 20, 37), table=(1, 9), codes=True),
    Case("queries frozen", frozen=("query", "phi_q")),
    Case("only factors learned", frozen=("query", "key", "value")),
    Case("only the table learned", table=(12, 9), frozen=("query", "key", "value", "phi_q", "phi_k")),
    Case("fewer tokens than ranks", n=3, table=(12, 9)),
    Case("one token", n=1),
    Case("documents of fewer tokens than ranks", n=3, batch=(), documents=(0, 2, 3), table=(12, 9), with_dlse=True),
]
RING = {"strategy": "ring"}
WAYS: list[tuple[str, int, tuple[int, int] | None, dict[str, Any]]] = [
    ("ring of 3, zigzag", 3, None, RING | {"order": "zigzag", "is_causal": True}),
    ("ring of 4", 4, None, RING),
    ("all-to-all of 2, zigzag", 2, None, {"strategy": "ulysses", "order": "zigzag", "is_causal": True}),
    ("all-to-all of 4", 4, None, {"strategy": "ulysses"}),
    ("2 by 2, zigzag", 4, (2, 2), {"order": "zigzag", "is_causal": True}),
]


def check(ranks: Ranks, case: Case, size: int, grid: tuple[int, int] | None = None, tolerance: float = EXACT) -> None:
    answers = ranks.results(solve, case, grid, size=size)
    assert_equal(case, [results for results, _ in answers], tolerance)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_every_strategy(ranks: Ranks, size: int, strategy: str, order: str, is_causal: bool) -> None:
    check(ranks, PLAIN.but(options={"strategy": strategy, "order": order, "is_causal": is_causal}), size)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_both_strategies_at_once(ranks: Ranks, order: str, is_causal: bool) -> None:
    check(ranks, PLAIN.but(options={"order": order, "is_causal": is_causal}), 4, (2, 2))


@pytest.mark.parametrize("way", WAYS, ids=[way[0] for way in WAYS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_bias(ranks: Ranks, case: Case, way: tuple[str, int, Any, dict[str, Any]]) -> None:
    _, size, grid, options = way
    check(ranks, case.but(options=options), size, grid)


@pytest.mark.parametrize("window", [(3, 0), (5, 2), (None, 4), (20, None), (0, 0)], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_windows(ranks: Ranks, window: tuple[int | None, int | None], order: str) -> None:
    options = RING | {"order": order, "window": window}
    check(ranks, PLAIN.but(options=options), 3)
    check(ranks, DOCUMENTS.but(options=options), 3)


@pytest.mark.parametrize("sizes", [(5, 0, 12), (0, 0, 17), (1, 9, 7)], ids=str)
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_shards_of_any_size(ranks: Ranks, sizes: tuple[int, ...], strategy: str) -> None:
    case = Case("uneven", n=17, sizes=sizes, table=(12, 9))
    check(ranks, case.but(options={"strategy": strategy, "is_causal": True}), 3)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_float32(ranks: Ranks, strategy: str) -> None:
    case = Case("float32", n=40, dtype=torch.float32, table=(12, 9), with_dlse=True)
    check(ranks, case.but(options={"strategy": strategy, "is_causal": True}), 3, tolerance=3e-6)


def test_bfloat16_keeps_float32_factors(ranks: Ranks) -> None:
    """Every block is rounded to bfloat16 once (2^-9), the sum once more."""
    case = Case("bfloat16", n=40, dtype=torch.bfloat16, options=RING | {"is_causal": True})
    check(ranks, case, 4, tolerance=2e-2)


def test_auto_takes_an_all_to_all_where_heads_divide(ranks: Ranks) -> None:
    for case, purpose in ((PLAIN, "to heads"), (PLAIN.but(heads=7, kv_heads=7, phi_q=(7,)), "keys")):
        answers = ranks.results(solve, case, size=4)
        assert all(purpose in sent for _, sent in answers)


def test_deterministic_gradients_are_the_same_on_all_ranks_and_runs(ranks: Ranks) -> None:
    case = TABLE.but(dtype=torch.float32, options=RING | {"deterministic": True})
    runs = [ranks.results(solve, case, size=4) for _ in range(2)]
    tables = [results["dtable"] for run in runs for results, _ in run]
    assert all(torch.equal(tables[0], table) for table in tables[1:])
    for (first, _), (second, _) in zip(*runs, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_local_table_gradients_add_up(ranks: Ranks) -> None:
    for strategy in ("ring", "ulysses"):
        case = TABLE.but(options={"strategy": strategy})
        summed = ranks.results(solve, case, size=3)[0][0]["dtable"]
        parts = ranks.results(solve, case.but(options={"strategy": strategy, "table_grad": "local"}), size=3)
        torch.testing.assert_close(sum(results["dtable"] for results, _ in parts), summed, rtol=1e-12, atol=1e-12)


def test_without_the_check(ranks: Ranks) -> None:
    """Nothing is asked: sizes are equal, or follow from the length of the whole."""
    even = Case("even", n=24, options=RING | {"check": False})
    uneven = Case("uneven last", n=26, options=RING | {"check": False, "seqlen": 26, "order": "zigzag"})
    for case in (even, uneven):
        answers = ranks.results(solve, case, size=4)
        assert_equal(case, [results for results, _ in answers], EXACT)
        assert all("agreement" not in sent for _, sent in answers)


# -------------------------------------------------------------------- bytes


def test_bytes_sent_are_those_of_the_theory(ranks: Ranks) -> None:
    case = Case("bytes", n=64, batch=(1,), kv_heads=4, head_dim=8, head_dim_v=8, rank=4, phi_k=(12,), options=RING)
    case = case.but(dtype=torch.float32)
    theory = cp.RingBytes(
        cp_size=4, tokens=16, num_kv_heads=4, head_dim=8, head_dim_v=8, element=4, rank=4, factor_heads=12
    )
    for _, sent in ranks.results(solve, case, size=4):
        assert sent["keys"] == 2 * theory.forward
        assert sent["keys"] + sent["gradients"] == theory.forward + theory.backward
        assert sent["agreement"] < 3 * 1024


def test_factors_add_rank_over_twice_head_dim(ranks: Ranks) -> None:
    case = Case("overhead", n=64, batch=(1,), head_dim=8, head_dim_v=8, rank=4, phi_k=(12,), dtype=torch.float32)
    sent = {rank: ranks.results(solve, case.but(rank=rank, options=RING), size=2)[0][1]["keys"] for rank in (0, 4)}
    assert (sent[4] - sent[0]) / sent[0] == 4 / (2 * 8)


def test_bytes_of_an_all_to_all(ranks: Ranks) -> None:
    """A rank keeps a third of what it holds and sends the rest; forward and backward alike."""
    case = Case("all-to-all", n=48, batch=(1,), phi_k=(12,), rank=4, dtype=torch.float32, with_dlse=True,
                options={"strategy": "ulysses"})  # fmt: skip
    (_, sent), *_ = ranks.results(solve, case, size=3)
    inputs = 12 * 16 * (3 * 4 + 2 * 4) * 4
    outputs = 12 * 16 * (4 + 1) * 4
    assert sent["to heads"] == sent["to tokens"] == (inputs + outputs) * 2 // 3


def asked_for(place: Place) -> list[bool]:
    """Which of a learned query, a frozen factor and whole numbers get a gradient behind the exchange."""
    exchange = HeadExchange(Circle.of(place.group), cp.Layout.of(8, place.size, "contiguous"), 4)
    query, phi = torch.randn(4, 4, 2, requires_grad=True), torch.randn(4, 4, 3)
    return [x.requires_grad for x in exchange.to_heads(query, phi, torch.arange(4)[None, :, None])]


def test_what_is_frozen_stays_so_behind_an_all_to_all(ranks: Ranks) -> None:
    """The local attention would make gradients that nobody wants, and run its forward pass once more for them."""
    assert ranks.results(asked_for, size=2) == [[True, False, False]] * 2
