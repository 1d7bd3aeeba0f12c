"""Heads of different rank on a Hopper GPU: tiers, each launched on its own, against the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT, CAUSAL
from tests.attention.hopper.marks import ON_HOPPER
from tests.attention.machine import tiers_for_every_width
from tests.attention.oracle import Results, assert_close_to_oracle, differentiate
from tests.attention.problem import LEAVES, Case, Problem
from tests.attention.varlen import VarlenCase

import flashbias as fb
from flashbias.attention import packing, registration
from flashbias.attention.checks import checked

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

from flashbias.attention.hopper import tiers

pytestmark = ON_HOPPER

DEVICE = "cuda"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
IRREGULAR = (3, 80, 0, 20, 77, 1)
"""Of six heads: widths of 16, 128, 0, 32, 128 and 16 columns in bfloat16."""

RANKS = (IRREGULAR, (0, 0, 3, 3, 20, 80), (4, 80) * 3, (0, 0, 0, 80, 0, 0), (1, 2, 16, 17, 40, 80), (3,) * 6)
CASE = Case(
    "tiers", heads=6, n=150, m=190, rank=80, ranks=IRREGULAR, same_dtype=True, head_dim=64, phi_q=(1, 6), phi_k=(1, 6)
)
SMALL = replace(CASE, rank=8, ranks=(8, 1, 0, 2, 8, 0))


@pytest.fixture(autouse=True)
def counts(nan_filled_buffers: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every width a tier, the fused kernel wherever it can; how many tiers each pass had. NaN in every buffer."""
    from flashbias.attention.hopper import backward

    counts: list[int] = []
    decide = tiers.tiers_of
    tiers_for_every_width(monkeypatch)
    monkeypatch.setattr(tiers, "tiers_of", lambda given: counts.append(len(found := decide(given))) or found)
    monkeypatch.setattr(backward, "is_slower", lambda *_: False)
    return counts


def check(problem: Problem, **options: Any) -> Results:
    """Compare output, log-sum-exp and all gradients with the oracle."""
    leaves = problem.leaves()
    # Buffers filled with NaN make repeatable gradients the default.
    out, lse = problem.attend("hopper", leaves, return_lse=True, **{"deterministic": False} | options)
    results = differentiate(problem, leaves, out, lse, with_dlse=True)
    assert_close_to_oracle(problem, results, with_dlse=True)
    return results


class TestRanksOfHeads:
    """Heads of different rank, every width of packed columns a tier of its own."""

    @pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
    @pytest.mark.parametrize("ranks", RANKS, ids=str)
    def test_ranks(self, ranks: tuple[int, ...], dtype: torch.dtype, counts: list[int]) -> None:
        check(replace(CASE, ranks=ranks).build(dtype, DEVICE))
        assert len(counts) == 2 and len(set(counts)) == 1 and counts[0] >= (1 if len(set(ranks)) == 1 else 2)

    @pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize("same_dtype", [False, True], ids=["float32", "half"])
    def test_every_width(self, same_dtype: bool, head_dim: int) -> None:
        case = replace(SMALL, head_dim=head_dim, same_dtype=same_dtype)
        for options in (BOTTOM_RIGHT, BOTTOM_RIGHT | {"window": (70, 9)}):
            check(replace(case, options=options).build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize(
        "changes",
        [
            {"batch": (), "phi_q": (6,), "phi_k": (6,)},
            {"batch": (2, 3)},
            {"batch": (2, 3), "phi_q": (2, 1, 6), "phi_k": (1, 3, 6)},
            {"batch": (12,)},
            {"phi_q": (2, 6), "phi_k": (6,)},
            {"layout": "transposed"},
            {"layout": "sliced"},
            {"layout": "expanded"},
            {"head_dim_v": 24},
            {"table": 33},
            {"table": 33, "table_heads": 1},
            {"n": 190, "table": "toeplitz", "codes": "window", "mask": "padding"},
            {"mask": "padding"},
            {"mask": "heads"},
            {"kv_heads": 3},
            {"kv_heads": 2, "ranks": (1, 0, 3, 80, 2, 20), "mask": "heads", "table": 33},
            {"heads": 8, "kv_heads": 4, "ranks": (3, 0, 0, 0, 80, 0, 1, 2), "phi_q": (8,), "phi_k": (8,)},
        ],
        ids=str,
    )
    def test_shapes(self, changes: dict[str, Any], counts: list[int]) -> None:
        check(replace(CASE, **changes).build(torch.bfloat16, DEVICE))
        assert counts[0] == counts[1] > 1

    @pytest.mark.parametrize("changes", [{}, {"kv_heads": 3}, {"table": 33}], ids=str)
    def test_packed_batches(self, changes: dict[str, Any], counts: list[int]) -> None:
        for head_dim, options in itertools.product((32, 64), ({}, BOTTOM_RIGHT, {"window": (70, 20)})):
            case = VarlenCase(
                "tiers", (130, 0, 64, 1, 300), (97, 40, 64, 260, 0), heads=6, rank=20, ranks=(2, 20, 0, 7, 20, 1),
                phi_q_heads=6, phi_k_heads=6, head_dim=head_dim, with_lse=True, options=options, **changes,
            )  # fmt: skip
            packed = case.build(torch.bfloat16, DEVICE)
            leaves = packed.leaves()
            out, lse = packed.attend("hopper", leaves, return_lse=True, deterministic=False)
            packed.assert_close_to_oracle(leaves, out, lse)
            assert counts[-1] == counts[-2] > 1

    def test_centres_by_tile(self, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", packing.CENTRE_TILE)
        for ranks, options in itertools.product(((0, 7, 3, 1), (7, 2, 7, 2)), ({}, CAUSAL)):
            case = Case("tiles", n=300, heads=4, batch=(1,), rank=7, ranks=ranks, head_dim=64, options=options)
            check(case.build(torch.bfloat16, DEVICE))
        assert counts[0] == counts[1] == 3 and counts[-1] == 2

    @pytest.mark.parametrize("wanted", [("phi_q", "phi_k"), ("phi_q",), ("table",), ("key",), LEAVES[:3]], ids="-".join)
    def test_only_some_need_a_gradient(self, wanted: tuple[str, ...]) -> None:
        problem = replace(CASE, table=33).build(torch.bfloat16, DEVICE)
        leaves = problem.leaves(wanted)
        results = differentiate(problem, leaves, problem.attend("hopper", leaves, deterministic=False), None, False)
        assert set(results.names()) == {"out"} | {f"d{name}" for name in wanted}
        assert_close_to_oracle(problem, results)

    @pytest.mark.parametrize("ranks", [IRREGULAR, (4, 80) * 3], ids=str)
    def test_repeatable(self, ranks: tuple[int, ...], counts: list[int]) -> None:
        """Bit for bit, and right."""
        problem = replace(CASE, ranks=ranks, table=33).build(torch.bfloat16, DEVICE)

        first, second = (check(problem, deterministic=True) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first.names())
        assert counts[0] == counts[1] > 1

    def test_padding_is_never_read(self) -> None:
        """NaN in columns that a head lacks reaches nothing, and its gradient is zero."""
        problem = CASE.build(torch.bfloat16, DEVICE)
        padding = torch.arange(80, device=DEVICE) >= torch.tensor(IRREGULAR, device=DEVICE)[:, None, None]
        for name in ("phi_q", "phi_k"):
            problem.tensors[name].masked_fill_(padding, torch.nan)
        leaves = problem.leaves()
        out = problem.attend("hopper", leaves)
        wanted = {name: x for name, x in leaves.items() if x.numel()}
        grads = dict(zip(wanted, torch.autograd.grad(out, tuple(wanted.values()), problem.dout), strict=True))
        assert all(x.isfinite().all() for x in (out, *grads.values()))
        assert all((torch.where(padding, grads[name], 0.0) == 0).all() for name in ("phi_q", "phi_k"))

    def test_the_host_never_waits(self) -> None:
        """What was copied to the GPU once is found there: no call waits for it."""
        problem = CASE.build(torch.bfloat16, DEVICE)
        leaves = problem.leaves()

        def step() -> None:
            torch.autograd.grad(problem.attend("hopper", leaves), leaves["query"], problem.dout)

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_is_estimated_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real costs long sequences are taken in tiers, short ones together."""
    monkeypatch.undo()
    for n, count in ((150, 0), (12_000, 2)):
        problem = replace(CASE, batch=(1,), n=n, m=n, ranks=(4, 80) * 3).build(torch.bfloat16, DEVICE)
        query, key, value, bias = *(problem.tensors[name] for name in LEAVES[:3]), problem.bias(problem.tensors)
        call = checked(
            query, key, value, bias, attn_mask=None, is_causal=False, causal_alignment=None, window=None, scale=None,
            enable_gqa=False, dropout_p=0.0, deterministic=None, return_lse=False,
        )  # fmt: skip
        assert len(tiers.tiers_of(registration.operands(call))) == count
        out, other = (fb.attention(query, key, value, bias, impl=impl) for impl in ("hopper", "triton"))
        torch.testing.assert_close(out, other, rtol=2e-2, atol=4e-3)
