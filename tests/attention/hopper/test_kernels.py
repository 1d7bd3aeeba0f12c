"""The Hopper kernels on a Hopper GPU: the common suite, what they alone do, and ten thousand small random problems."""

from __future__ import annotations

import itertools
import random
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT, CASES, CAUSAL, LSE
from tests.attention.hopper.marks import ON_HOPPER
from tests.attention.oracle import (
    UNIT_ROUNDOFF,
    Results,
    assert_close_to_oracle,
    differentiate,
    eager,
    explicit,
    visible_pairs,
)
from tests.attention.problem import LEAVES, Case, Problem
from tests.attention.suite import AttentionSuite
from tests.attention.triton import test_long as far
from tests.attention.varlen import VARLEN, VarlenCase

import flashbias as fb
from flashbias.attention import packing

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

from flashbias.attention.hopper.configs import NARROWEST, columns_of, width_of
from flashbias.attention.hopper.operands import is_addressable

pytestmark = ON_HOPPER

DEVICE = "cuda"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come from the fused kernel wherever it can make them, also where others are faster.

    It is not repeatable, while buffers filled with NaN make repeatable gradients the default.
    """
    from flashbias.attention.hopper import backward

    attend = Problem.attend

    def unordered(self: Problem, impl: str, leaves: dict[str, torch.Tensor], **options: Any) -> Any:
        return attend(self, impl, leaves, **{"deterministic": False} | options)

    monkeypatch.setattr(backward, "is_slower", lambda *_: False)
    monkeypatch.setattr(Problem, "attend", unordered)


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot do a problem, None if they can."""
    t = problem.tensors
    explanation = fb.explain(t["query"], t["key"], t["value"], problem.bias(t), **problem.options)
    return explanation.reasons["hopper"]


def check(problem: Problem) -> None:
    """Compare output, log-sum-exp and all gradients with the oracle."""
    leaves = problem.leaves()
    out, lse = problem.attend("hopper", leaves, return_lse=True)
    assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, with_dlse=True), with_dlse=True)


class TestSharedWideFactors:
    """Factors of many columns that a batch shares get their gradients from a kernel of their own."""

    @pytest.mark.parametrize("is_causal", [False, True], ids=["open", "causal"])
    @pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize(("rank", "head_dim"), [(36, 32), (60, 32), (40, 64), (33, 128)])
    def test_gradients(
        self, rank: int, head_dim: int, factor_dtype: torch.dtype, is_causal: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flashbias.attention.triton import shared

        calls = []
        launch = shared.launch
        monkeypatch.setattr(shared, "launch", lambda *arguments: (calls.append(1), launch(*arguments)))
        torch.manual_seed(rank)
        sizes = [(12, 2, 300, head_dim)] * 4
        q, k, v, dout = (torch.randn(size, device=DEVICE).bfloat16() for size in sizes)
        phis = [(torch.randn(1, 2, 300, rank, device=DEVICE) / 3).to(factor_dtype) for _ in range(2)]
        leaves = [x.requires_grad_() for x in (q, k, v, *phis)]
        out = fb.attention(q, k, v, fb.FactoredBias(*phis), is_causal=is_causal, impl="hopper", deterministic=False)
        made = torch.autograd.grad(out, leaves, dout)
        assert calls
        exact = [x.detach().double().requires_grad_() for x in leaves]
        scores = exact[0] @ exact[1].mT * head_dim**-0.5 + exact[3] @ exact[4].mT
        if is_causal:
            scores = scores.masked_fill(torch.ones(300, 300, device=DEVICE).triu(1).bool(), -torch.inf)
        wanted = torch.autograd.grad(scores.softmax(-1) @ exact[2], exact, dout.double())
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(made, wanted, strict=True)]
        assert max(errors) < 1e-2, errors


# -------------------------------------------------------------------- the common suite

PLAIN = Case("plain", n=40, m=70, heads=2)


class TestHopper(AttentionSuite):
    """The kernels take half precision alone, without dropout and masks of pairs.

    What the suite asks for in float32 is asked for in bfloat16 here.
    """

    impl = "hopper"
    device = DEVICE
    stretch = 5
    dtypes = ("bfloat16", "float16")

    @classmethod
    def grid(cls) -> list[tuple[Case, str]]:
        return list(itertools.product(CASES, HALVES))

    def test_output_and_gradients(self, case: Case, dtype: torch.dtype) -> None:
        """Or the reason why not."""
        problem = case.stretched(self.stretch).build(dtype, self.device)
        reason = refusal(problem)
        if reason is None:
            super().test_output_and_gradients(case, dtype)
            return
        with pytest.raises(NotImplementedError, match=re.escape(reason)):
            problem.attend(self.impl, problem.leaves())

    @pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 60), (torch.float16, 58)], ids=str)
    def test_most_cases_are_computed(self, dtype: torch.dtype, least: int) -> None:
        problems = (case.stretched(self.stretch).build(dtype, self.device) for case in CASES)
        assert sum(refusal(problem) is None for problem in problems) >= least

    @pytest.mark.parametrize("options", [BOTTOM_RIGHT, BOTTOM_RIGHT | {"window": (9, 2)}], ids=["causal", "window"])
    def test_rows_without_a_key_are_zero(self, options: dict[str, Any]) -> None:
        problem = Case("dead", n=170, m=90, options=options).build(torch.bfloat16, self.device)
        leaves = problem.leaves()
        keep = visible_pairs(problem)
        assert keep is not None
        dead = ~keep.any(-1).expand(2, 2, 170)
        assert dead.any()
        assert not dead.all()
        out, lse = problem.attend(self.impl, leaves, return_lse=True)
        assert (out[dead] == 0).all()
        assert torch.equal(lse == -torch.inf, dead)
        grads = torch.autograd.grad(out, tuple(leaves.values()), problem.dout * dead[..., None])
        assert all((grad == 0).all() for grad in grads)

    @pytest.mark.parametrize("sizes", [{"batch": (0,)}, {"m": 0}, {"batch": (2, 0)}], ids=["batch", "keys", "windows"])
    def test_zero_length(self, sizes: dict[str, Any]) -> None:
        lead = (1,) * len(sizes.get("batch", (2,))) + (2,)
        problem = replace(Case("empty", n=40, m=70, phi_q=lead[1:], phi_k=lead), **sizes).build(
            torch.bfloat16, self.device
        )
        leaves = problem.leaves()
        out = problem.attend(self.impl, leaves)
        assert (out == 0).all()
        for name, grad in zip(leaves, torch.autograd.grad(out.sum(), tuple(leaves.values())), strict=True):
            assert grad.shape == leaves[name].shape
            assert (grad == 0).all(), name

    @pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
    def test_positions_far_from_the_origin(self, dtype: torch.dtype) -> None:
        super().test_positions_far_from_the_origin(dtype)

    def test_huge_biases_leave_one_key(self) -> None:
        n = 24
        query, key, value = (torch.randn(1, 1, n, 16, device=self.device).bfloat16() for _ in range(3))
        position = torch.arange(float(n), device=self.device)[None, :, None]
        phi = 100.0 * position
        favoured = fb.FactoredBias(
            torch.cat([phi, torch.full_like(phi, -5000.0)], -1), torch.cat([phi, position**2], -1)
        )
        out = fb.attention(query, key, value, favoured, impl=self.impl)
        # The largest score, 7.6e6 in units of log 2, is rounded to 0.5 before it is subtracted, in one multiply-add. So
        # the one weight is no exact 1, and in bfloat16 no longer what the sum of weights has in float32.
        torch.testing.assert_close(out, value, rtol=2**-7, atol=0.0)

    @pytest.mark.parametrize(
        "wanted",
        [("phi_q", "phi_k"), ("phi_q",), ("phi_k",), ("query",), ("key",), ("value",), ("query", "phi_k")],
        ids="-".join,
    )
    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_only_some_need_a_gradient(self, head_dim: int, wanted: tuple[str, ...]) -> None:
        case = Case("some", n=130, m=150, head_dim=head_dim, phi_q=(2, 1), phi_k=(1, 2))
        problem = case.build(torch.bfloat16, self.device)
        leaves = problem.leaves(wanted)
        results = differentiate(problem, leaves, problem.attend(self.impl, leaves), None, False)
        assert set(results.names()) == {"out"} | {f"d{name}" for name in wanted}
        assert_close_to_oracle(problem, results)

    def test_arguments_are_left_alone(self) -> None:
        problem = replace(PLAIN, n=130).build(torch.bfloat16, self.device)
        before = {name: x.clone() for name, x in problem.tensors.items()}
        problem.attend(self.impl, problem.leaves()).sum().backward()
        assert all(torch.equal(before[name], x) for name, x in problem.tensors.items())

    def test_lse_alone_is_differentiable(self) -> None:
        problem = replace(PLAIN, n=130).build(torch.bfloat16, self.device)
        problem.dout.zero_()
        check(problem)

    @pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
    def test_deterministic_twice(self, dtype: torch.dtype) -> None:  # type: ignore[override]
        """Bit for bit, for factors shared by a batch and grouped queries, and for a key range that is cut."""
        for case in (
            Case("twice", n=190, m=230, heads=2, kv_heads=1, head_dim=24, phi_q=(2, 1), phi_k=(1, 2), rank=7),
            Case("cut", n=200, m=3000, batch=(1,), heads=1, head_dim=16),
        ):
            problem = case.build(dtype, self.device)

            def once(problem: Problem = problem) -> list[torch.Tensor]:
                leaves = problem.leaves()
                out = problem.attend(self.impl, leaves, deterministic=True)
                return [out, *torch.autograd.grad(out, tuple(leaves.values()), problem.dout)]

            assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True)), str(case)

    def test_what_is_unsupported_raises(self) -> None:
        for changes, dtype, message in (
            ({}, torch.float32, "float32"),
            ({}, torch.float64, "float64"),
            ({"head_dim": 264}, torch.bfloat16, "head_dim 264"),
            ({"head_dim_v": 12}, torch.bfloat16, "head_dim_v 12"),
            ({"mask": "matrix"}, torch.bfloat16, "attn_mask that differs"),
        ):
            problem = replace(PLAIN, **changes).build(dtype, self.device)
            with pytest.raises(NotImplementedError, match=rf"impl='hopper'.*{message}.*would take"):
                problem.attend(self.impl, problem.leaves())

    def test_no_second_derivative(self) -> None:
        problem = PLAIN.build(torch.bfloat16, self.device)
        leaves = problem.leaves()
        loss = problem.attend(self.impl, leaves).float().pow(2).sum()
        (grad,) = torch.autograd.grad(loss, leaves["query"], create_graph=True)
        with pytest.raises(NotImplementedError, match="impl='reference'"):
            torch.autograd.grad(grad.sum(), leaves["query"])

    def test_no_dropout_is_no_dropout(self) -> None:
        problem = PLAIN.build(torch.bfloat16, self.device)
        leaves = problem.leaves()
        assert torch.equal(problem.attend(self.impl, leaves, dropout_p=0.0), problem.attend(self.impl, leaves))
        with pytest.raises(NotImplementedError, match=r"impl='hopper'.*dropout_p 0.5"):
            problem.attend(self.impl, leaves, dropout_p=0.5)

    @pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
    @pytest.mark.parametrize("varlen", VARLEN, ids=lambda case: case.name)
    def test_varlen_is_attention_of_each_sequence(self, varlen: VarlenCase, dtype: torch.dtype) -> None:  # type: ignore[override]
        super().test_varlen_is_attention_of_each_sequence(varlen, dtype)

    # What the suite asks for beyond that, in float32, needs dropout.
    test_what_is_supported_works = None  # type: ignore[assignment]
    test_dropout_keeps_its_share = None  # type: ignore[assignment]
    test_dropout_gradients_know_what_was_dropped = None  # type: ignore[assignment]
    test_varlen_does_not_leak = None  # type: ignore[assignment]


# -------------------------------------------------------------------- what these kernels alone do


class TestTiles:
    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer, that of partial results included."""

    @pytest.mark.parametrize("m", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 320, 384])
    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_every_end_of_the_keys(self, head_dim: int, m: int) -> None:
        check(Case("end", n=100, m=m, head_dim=head_dim, batch=(1,)).build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("n", [17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 385])
    def test_every_end_of_the_queries(self, n: int) -> None:
        check(Case("end", n=n, m=130, head_dim=64, batch=(1,)).build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_cut_key_ranges_are_joined(self, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from flashbias.attention.hopper import forward

        cuts: list[int] = []
        original = forward.join

        def spy(schedule: Any, *rest: Any) -> None:
            cuts.append(schedule.parts)
            original(schedule, *rest)

        monkeypatch.setattr(forward, "join", spy)
        check(Case("cut", n=200, m=3000, batch=(1,), heads=1, head_dim=head_dim).build(torch.bfloat16, DEVICE))
        assert len(cuts) == 1
        assert cuts[0] > 1

    @pytest.mark.parametrize("options", [{}, CAUSAL, CAUSAL | {"window": (200, None)}], ids=["full", "causal", "band"])
    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_programs_take_many_tiles(self, head_dim: int, options: dict[str, Any]) -> None:
        """More tiles than a GPU has multiprocessors, some programs with one more than others."""
        case = Case("many", n=700, batch=(3,), heads=24, head_dim=head_dim, phi_q=(24,), phi_k=(1,), options=options)
        check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "columns", "expanded"])
    @pytest.mark.parametrize("head_dim", [8, 24, 64])
    def test_strides(self, head_dim: int, layout: str) -> None:
        check(Case("strides", n=100, m=130, head_dim=head_dim, layout=layout).build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("phi_k", [(2, 1), (1, 1), (1, 4), (2, 4)], ids=str)
    def test_grouped_queries(self, phi_k: tuple[int, int]) -> None:
        """With factors that a group shares or not."""
        case = Case("gqa", n=130, m=150, heads=4, kv_heads=2, phi_q=(2, 4), phi_k=phi_k, options=BOTTOM_RIGHT | LSE)
        check(case.build(torch.bfloat16, DEVICE))


class TestTablesAndMasks:
    """In tiles whole and cut, beside factors and a band, in every layout of the program."""

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer."""

    @pytest.mark.parametrize("options", [{}, CAUSAL, CAUSAL | {"window": (150, None)}], ids=["full", "causal", "band"])
    @pytest.mark.parametrize("table", [1, 33, 301, "toeplitz"])
    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_positions_as_codes(self, head_dim: int, table: int | str, options: dict[str, Any]) -> None:
        """Tiles in the middle, across its ends and in both tails."""
        check(
            Case("table", n=420, head_dim=head_dim, rank=0, table=table, options=options).build(torch.bfloat16, DEVICE)
        )

    @pytest.mark.parametrize("batch", [1, 5, 23])
    @pytest.mark.parametrize("head_dim", [48, 80])
    def test_one_table_of_all_heads(self, head_dim: int, batch: int) -> None:
        """More queries than keys and fewer, ends aligned; members that no number of parts divides."""
        for n, m in ((200, 330), (330, 200)):
            case = Case("one", batch=(batch,), heads=4, kv_heads=2, n=n, m=m, head_dim=head_dim, rank=3, table=65,
                        table_heads=1, options=BOTTOM_RIGHT)  # fmt: skip
            check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("n", [144, 576, 625])
    @pytest.mark.parametrize("head_dim", [16, 32, 128])
    @pytest.mark.parametrize("rank", [0, 4])
    def test_codes_of_windows(self, rank: int, head_dim: int, n: int) -> None:
        """With a table of every distance, and one that ends before."""
        side = round(n**0.5)
        for table in ((2 * side - 1) ** 2, 2 * side + 1):
            case = Case("windows", batch=(5,), n=n, head_dim=head_dim, rank=rank, table=table, codes="window")
            check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize(("n", "m"), [(128, 256), (300, 420), (193, 1500)])
    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_hidden_keys(self, head_dim: int, n: int, m: int, options: dict[str, Any]) -> None:
        options = options and options | {"causal_alignment": "bottom_right"}
        case = Case("mask", batch=(3,), n=n, m=m, head_dim=head_dim, rank=3, mask="padding", options=options)
        check(case.build(torch.bfloat16, DEVICE))

    def test_no_key_is_left(self) -> None:
        problem = Case("hidden", batch=(3,), n=140, m=290, mask="padding").build(torch.bfloat16, DEVICE)
        assert problem.attn_mask is not None
        problem.attn_mask[1] = False
        check(problem)
        out, lse = problem.attend("hopper", problem.leaves(), return_lse=True)
        assert (out[1] == 0).all()
        assert (lse[1] == -torch.inf).all()

    @pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
    def test_all_at_once(self, options: dict[str, Any]) -> None:
        case = Case("all", batch=(3,), heads=4, kv_heads=2, n=330, head_dim=64, head_dim_v=32, rank=5, table=65,
                    mask="padding", options=options)  # fmt: skip
        for dtype in HALVES.values():
            check(case.build(dtype, DEVICE))

    def test_cut_key_ranges(self) -> None:
        """Some parts see no key."""
        case = Case("cut", n=200, m=3000, batch=(1,), heads=1, rank=0, table=33, mask="padding")
        check(case.build(torch.bfloat16, DEVICE))


class TestPackedBatches:
    """Sequences of different lengths, one after the other."""

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer."""

    LENGTHS = ((130, 0, 64, 1, 300, 200, 129, 63), (97, 40, 64, 260, 0, 200, 128, 1))
    BANDS = (
        {},
        CAUSAL,
        BOTTOM_RIGHT,
        {"window": (70, 20)},
        {"window": (40, None), "causal_alignment": "bottom_right"},
    )

    @staticmethod
    def check(case: VarlenCase, dtype: torch.dtype = torch.bfloat16) -> None:
        """Output, log-sum-exp and all gradients."""
        packed = case.build(dtype, DEVICE)
        leaves = packed.leaves()
        packed.assert_close_to_oracle(leaves, *packed.attend("hopper", leaves, return_lse=True))

    @pytest.mark.parametrize("options", BANDS, ids=str)
    @pytest.mark.parametrize("rank", [0, 5, 20])
    @pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
    def test_every_width(self, head_dim: int, rank: int, options: dict[str, Any]) -> None:
        self.check(VarlenCase("widths", *self.LENGTHS, head_dim=head_dim, rank=rank, with_lse=True, options=options))

    @pytest.mark.parametrize("options", BANDS, ids=str)
    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (1, None), (3, None)])
    def test_heads(self, heads: int, kv_heads: int | None, options: dict[str, Any]) -> None:
        for phi_k_heads in {1, heads}:
            self.check(
                VarlenCase("heads", *self.LENGTHS, heads, kv_heads, 3, phi_k_heads, options=options), torch.float16
            )

    @pytest.mark.parametrize("options", BANDS, ids=str)
    @pytest.mark.parametrize("head_dim", [32, 128])
    def test_tables(self, head_dim: int, options: dict[str, Any]) -> None:
        """By positions within each sequence."""
        self.check(VarlenCase("table", *self.LENGTHS, rank=3, table=65, head_dim=head_dim, options=options))

    def test_codes(self) -> None:
        """Of packed tokens."""
        case = VarlenCase("codes", (70, 190), (130, 150), rank=0, table=41, head_dim=64)
        packed = case.build(torch.bfloat16, DEVICE)
        t = packed.tensors
        codes = [
            torch.randint(0, 30, (sum(lengths),), device=DEVICE) for lengths in (packed.lengths_q, packed.lengths_k)
        ]
        bias = fb.FactoredBias(t["phi_q"], t["phi_k"], t["table"], *codes)
        cu = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE) for lengths in
              (packed.lengths_q, packed.lengths_k)]  # fmt: skip
        found, right = (
            fb.varlen_attention(*(t[name].to(dtype) for name in ("query", "key", "value")), *cu, bias, impl=impl)
            for impl, dtype in (("hopper", torch.bfloat16), ("reference", torch.float64))
        )
        assert (found - right).norm() <= 4 * UNIT_ROUNDOFF[torch.bfloat16] * right.norm()

    @pytest.mark.parametrize("poison", [1e4, torch.nan, torch.inf], ids=str)
    @pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
    @pytest.mark.parametrize("options", BANDS, ids=str)
    def test_nothing_leaks(self, options: dict[str, Any], head_dim: int, poison: float) -> None:
        """What stands in the other sequences changes no bit of a sequence's output and log-sum-exp."""
        packed = VarlenCase("leak", (17, 150, 40), (19, 100, 7), rank=5, head_dim=head_dim, options=options).build(
            torch.bfloat16, DEVICE
        )
        clean = packed.attend("hopper", packed.tensors, return_lse=True)
        ends_q, ends_k = (list(itertools.accumulate((0, *x))) for x in (packed.lengths_q, packed.lengths_k))
        for s in range(3):
            own_q, own_k = slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
            tensors = {}
            for name, x in packed.tensors.items():
                own, axis = (own_q if name in ("query", "phi_q") else own_k), int(name.startswith("phi"))
                tensors[name] = torch.full_like(x, poison)
                tensors[name].transpose(0, axis)[own] = x.transpose(0, axis)[own]
            for found, right in zip(packed.attend("hopper", tensors, return_lse=True), clean, strict=True):
                assert torch.equal(found[own_q], right[own_q])

    def test_more_blocks_than_programs(self) -> None:
        """Every program takes several, the last turn is not full; lengths in any order."""
        lengths = tuple(random.Random(1).choices(range(1, 500), k=60))
        for options in self.BANDS:
            case = VarlenCase("many", lengths, lengths[::-1], 3, rank=2, phi_k_heads=1, head_dim=64, options=options)
            packed = case.build(torch.bfloat16, DEVICE)
            leaves = {name: x.detach() for name, x in packed.tensors.items()}
            found, lse = packed.attend("hopper", leaves, return_lse=True)
            right, right_lse = packed.attend("triton", leaves, return_lse=True)
            assert (found.float() - right.float()).norm() <= 2 * UNIT_ROUNDOFF[torch.bfloat16] * right.float().norm()
            torch.testing.assert_close(lse, right_lse, atol=1e-4, rtol=1e-5)

    def test_the_host_never_waits(self) -> None:
        packed = VarlenCase("sync", (200, 300), (300, 200), head_dim=64).build(torch.bfloat16, DEVICE)
        cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=DEVICE) for x in
                      (packed.lengths_q, packed.lengths_k))  # fmt: skip
        bias = fb.FactoredBias(packed.tensors["phi_q"], packed.tensors["phi_k"])
        tensors = [packed.tensors[name] for name in ("query", "key", "value")]

        def once() -> Any:
            return fb.varlen_attention(*tensors, cu_q, cu_k, bias, max_seqlen_q=300, max_seqlen_k=300, impl="hopper")

        once()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            once()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestWideHeads:
    """More than 128 columns of queries, of values or of both; the output leaves through the buffer of its queries."""

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer."""

    @pytest.mark.parametrize("options", [{}, CAUSAL, CAUSAL | {"window": (90, None)}], ids=["full", "causal", "band"])
    @pytest.mark.parametrize("rank", [0, 4, 40])
    @pytest.mark.parametrize(
        ("head_dim", "head_dim_v"),
        [(256, 256), (136, 136), (192, 128), (200, 16), (64, 256), (128, 192), (16, 160), (256, 64)],
    )
    def test_every_width(self, head_dim: int, head_dim_v: int, rank: int, options: dict[str, Any]) -> None:
        case = Case("wide", n=330, batch=(1,), head_dim=head_dim, head_dim_v=head_dim_v, rank=rank, options=options)
        for dtype in HALVES.values():
            check(case.build(dtype, DEVICE))

    @pytest.mark.parametrize("m", [1, 31, 32, 33, 63, 64, 65, 97, 128, 161, 300])
    @pytest.mark.parametrize("rank", [3, 100])
    def test_every_end_of_the_keys(self, rank: int, m: int) -> None:
        """In tiles of 64 and of 32 keys."""
        case = Case("end", n=130, m=m, head_dim=256, rank=rank, same_dtype=True, batch=(1,), options={"scale": 0.1})
        check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
    def test_programs_take_many_tiles(self, options: dict[str, Any]) -> None:
        """Each waits until its output has left before the next queries come."""
        case = Case("many", n=900, batch=(2,), heads=24, head_dim=256, phi_q=(24,), phi_k=(1,), options=options)
        check(case.build(torch.bfloat16, DEVICE))

    def test_cut_key_ranges(self) -> None:
        check(Case("cut", n=200, m=2000, batch=(1,), heads=1, head_dim=256).build(torch.bfloat16, DEVICE))

    def test_all_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", packing.CENTRE_TILE)
        case = Case("all", batch=(3,), heads=4, kv_heads=2, n=330, head_dim=160, head_dim_v=256, rank=5, table=65,
                    mask="padding", options=CAUSAL)  # fmt: skip
        check(case.build(torch.bfloat16, DEVICE))


class TestColumns:
    """Heads that are no power of two: products of chunks, sums of two tensors; see `hopper/chunks.py`."""

    WIDTHS = (24, 40, 48, 72, 80, 96, 104, 112, 136, 160, 192, 224)
    PAIRS = ((80, 64), (64, 80), (96, 128), (128, 96), (112, 80), (48, 80), (192, 96), (40, 24), (80, 160))

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer, that of partial results included."""

    @pytest.mark.parametrize(
        ("rank", "options"),
        [(0, {}), (5, {}), (16, CAUSAL), (3, {"window": (90, 20)})],
        ids=["no bias", "full", "causal", "band"],
    )
    @pytest.mark.parametrize(("head_dim", "head_dim_v"), [*((d, d) for d in WIDTHS), *PAIRS])
    def test_every_width(self, head_dim: int, head_dim_v: int, rank: int, options: dict[str, Any]) -> None:
        """With NaN in memory right before and behind each row: what is no column of the head is not seen."""
        case = Case("width", n=330, batch=(1,), head_dim=head_dim, head_dim_v=head_dim_v, rank=rank, layout="framed",
                    options=options)  # fmt: skip
        for dtype in HALVES.values():
            problem = case.build(dtype, DEVICE)
            assert is_addressable(problem.tensors["query"])  # else the kernels read a copy
            check(problem)

    @pytest.mark.parametrize("head_dim", WIDTHS)
    def test_alibi(self, head_dim: int) -> None:
        """Frozen factors in float32, and grouped queries."""
        n = 450
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, h, n, head_dim, device=DEVICE).bfloat16().requires_grad_() for h in (4, 2, 2))
        dout = torch.randn(2, 4, n, head_dim, device=DEVICE).bfloat16()
        bias = fb.Alibi(num_heads=4).to(DEVICE)(seqlen_q=n, seqlen_k=n)
        results = {}
        for impl, dtype in (("hopper", torch.bfloat16), ("reference", torch.float64)):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
            out = fb.attention(*leaves, bias, is_causal=True, enable_gqa=True, impl=impl, deterministic=False)
            results[impl] = [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]
        for found, right in zip(results["hopper"], results["reference"], strict=True):
            assert (found.double() - right).norm() <= 4 * UNIT_ROUNDOFF[torch.bfloat16] * right.norm()

    @pytest.mark.parametrize("m", [64, 65, 128, 191, 192, 193, 320])
    @pytest.mark.parametrize(("head_dim", "head_dim_v"), [(48, 48), (80, 80), (96, 72), (160, 192)])
    def test_every_end_of_the_keys(self, head_dim: int, head_dim_v: int, m: int) -> None:
        case = Case("end", n=100, m=m, head_dim=head_dim, head_dim_v=head_dim_v, batch=(1,), layout="framed")
        check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize(("head_dim", "head_dim_v"), [(48, 40), (80, 80), (96, 112), (64, 72), (160, 192)])
    def test_cut_key_ranges_are_joined(self, head_dim: int, head_dim_v: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Partial results have columns that nobody writes and nobody reads."""
        from flashbias.attention.hopper import forward

        cuts: list[int] = []
        original = forward.join

        def spy(schedule: Any, *rest: Any) -> None:
            cuts.append(schedule.parts)
            original(schedule, *rest)

        monkeypatch.setattr(forward, "join", spy)
        case = Case("cut", n=200, m=3000, batch=(1,), heads=1, head_dim=head_dim, head_dim_v=head_dim_v)
        check(case.build(torch.bfloat16, DEVICE))
        assert len(cuts) == 1
        assert cuts[0] > 1

    @pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize("head_dim", [40, 80, 96, 192])
    def test_programs_take_many_tiles(self, head_dim: int, options: dict[str, Any]) -> None:
        case = Case("many", n=700, batch=(3,), heads=24, head_dim=head_dim, phi_q=(24,), phi_k=(1,), options=options)
        check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("head_dim", [48, 80, 112, 160])
    def test_tables_and_hidden_keys(self, head_dim: int) -> None:
        case = Case("all", batch=(3,), heads=4, kv_heads=2, n=330, head_dim=head_dim, rank=5, table=65, mask="padding",
                    options=CAUSAL)  # fmt: skip
        check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize("rank", [0, 5])
    @pytest.mark.parametrize("head_dim", WIDTHS)
    def test_packed_batches(self, head_dim: int, rank: int, options: dict[str, Any]) -> None:
        TestPackedBatches.check(
            VarlenCase("widths", *TestPackedBatches.LENGTHS, head_dim=head_dim, rank=rank, with_lse=True,
                       options=options)
        )  # fmt: skip

    @pytest.mark.parametrize("head_dim", [48, 80, 96, 112])
    def test_centres_by_tile(self, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", packing.CENTRE_TILE)
        case = Case("alibi", n=450, head_dim=head_dim, rank=2, batch=(1,), options=CAUSAL)
        check(TestCentresByTile.alibi(case))


class TestCentresByTile:
    """What more than 32,768 keys beside float32 factors do: on fewer keys with the oracle, on many for some rows."""

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer."""

    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Centres go by tile from 129 keys on."""
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", packing.CENTRE_TILE)

    @staticmethod
    def alibi(case: Case, dtype: torch.dtype = torch.bfloat16) -> Problem:
        """Positions as factors, so that scores lie far apart from tile to tile; more columns are random."""
        problem = case.build(dtype, DEVICE)
        for name, length, slope in (("phi_q", case.n, -0.3), ("phi_k", case.seqlen_k, 1.0)):
            phi = problem.tensors[name]
            position = torch.arange(float(length), device=DEVICE)
            phi[..., 0] = slope if name == "phi_q" else -position
            if case.rank > 1:
                phi[..., 1] = slope * position if name == "phi_q" else 1.0
        return problem

    @pytest.mark.parametrize("options", [{}, CAUSAL, CAUSAL | {"window": (200, None)}], ids=["full", "causal", "band"])
    @pytest.mark.parametrize("rank", [1, 2, 5, 8])
    @pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
    def test_every_width(self, head_dim: int, rank: int, options: dict[str, Any], few: None) -> None:
        check(self.alibi(Case("alibi", n=450, head_dim=head_dim, rank=rank, batch=(1,), options=options)))

    @pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
    @pytest.mark.parametrize(("n", "m"), [(100, 129), (193, 700), (700, 193), (129, 1027)])
    @pytest.mark.parametrize("options", [{}, BOTTOM_RIGHT], ids=["full", "causal"])
    def test_lengths_that_differ(self, n: int, m: int, options: dict[str, Any], dtype: torch.dtype, few: None) -> None:
        """The tile opposite to a query may lie outside the keys."""
        check(self.alibi(Case("lengths", n=n, m=m, head_dim=64, rank=3, options=options), dtype))

    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_cut_key_ranges(self, head_dim: int, few: None) -> None:
        check(self.alibi(Case("cut", n=200, m=3000, batch=(1,), heads=1, head_dim=head_dim, rank=2)))

    @pytest.mark.parametrize("phi_k", [(2, 1), (1, 1), (1, 4), (2, 4)], ids=str)
    def test_shared_factors_and_grouped_queries(self, phi_k: tuple[int, int], few: None) -> None:
        case = Case("gqa", n=260, m=300, heads=4, kv_heads=2, phi_q=(2, 4), phi_k=phi_k, options=BOTTOM_RIGHT)
        check(case.build(torch.bfloat16, DEVICE))

    @pytest.mark.parametrize("options", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize("mask", [None, "padding"])
    def test_beside_a_table_and_a_mask(self, mask: str | None, options: dict[str, Any], few: None) -> None:
        """Without a mask the fused kernel makes all gradients but the table's."""
        case = Case("all", batch=(3,), n=330, head_dim=64, rank=5, table=65, mask=mask, options=options)
        check(case.build(torch.bfloat16, DEVICE))

    def test_ranks_of_heads(self, few: None) -> None:
        case = Case("ranks", n=300, heads=3, batch=(1,), rank=7, ranks=(0, 7, 3), head_dim=64)
        check(case.build(torch.bfloat16, DEVICE))

    def test_one_row_for_all_queries_and_rows_of_columns(self, few: None) -> None:
        problem = Case("strides", n=300, heads=2, rank=3, head_dim=64).build(torch.bfloat16, DEVICE)
        phi_q, phi_k = problem.tensors["phi_q"], problem.tensors["phi_k"]
        problem.tensors["phi_q"] = phi_q[:, :, :1].expand_as(phi_q)
        problem.tensors["phi_k"] = phi_k.mT.contiguous().mT
        leaves = problem.leaves(("query", "key", "value", "phi_k"))
        out, lse = problem.attend("hopper", leaves, return_lse=True)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, with_dlse=True), with_dlse=True)

    @pytest.mark.parametrize(("n", "head_dim"), [(packing.TILE_CENTRE_FROM + 77, 128), (131_072, 64), (2**20, 64)])
    @pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
    def test_alibi_at_long_range(self, n: int, head_dim: int, dtype: torch.dtype) -> None:
        q, k, v = (torch.randn(1, 2, n, head_dim, device=DEVICE, dtype=dtype) for _ in range(3))
        bias = far.alibi(n, [0.7071067 if dtype == torch.bfloat16 else 0.05, 0.001])
        out, lse = fb.attention(q, k, v, bias, is_causal=True, impl="hopper", return_lse=True)
        rows = torch.tensor([0, 1, 127, 128, n // 2, n - 2, n - 1], device=DEVICE)
        far.assert_rows_close(out, q, k, v, bias, rows, causal=True)
        self.assert_lse_close(lse, q, k, bias, rows, is_causal=True)

    @pytest.mark.parametrize("n", [40_000, 132_871])
    def test_a_mesh(self, n: int) -> None:
        """Distances between points of a box, of rank 5."""
        q, k, v = (torch.randn(1, 2, n, 16, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        points = torch.rand(n, 3, device=DEVICE) * torch.tensor([5.0, 2.0, 1.5], device=DEVICE)
        bias = fb.SquaredDistance(num_heads=2)(points, points, weight=torch.tensor([1.0, 30.0], device=DEVICE))
        out, lse = fb.attention(q, k, v, bias, impl="hopper", return_lse=True)
        rows = torch.arange(0, n, n // 9, device=DEVICE)
        far.assert_rows_close(out, q, k, v, bias, rows, causal=False)
        self.assert_lse_close(lse, q, k, bias, rows, is_causal=False)

    @pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
    @pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
    def test_gradients_beside_many_keys(self, head_dim: int, is_causal: bool) -> None:
        """As the portable kernels make them: of positions that reach 40,000, and of distances between points.

        Positions are seen causally, since dphi_q is a sum of bfloat16 numbers times how far away their key is.
        """
        n = 40_000
        torch.manual_seed(0)
        leaves = [torch.randn(1, 2, n, head_dim, device=DEVICE).bfloat16().requires_grad_() for _ in range(3)]
        given = far.alibi(n, [0.5, 0.002])
        if not is_causal:
            points = torch.rand(n, 3, device=DEVICE)
            given = fb.SquaredDistance(num_heads=2)(points, points, weight=torch.tensor([1.0, 30.0], device=DEVICE))
        leaves += [x.detach().clone().requires_grad_() for x in (given.phi_q, given.phi_k)]
        dout = torch.randn(1, 2, n, head_dim, device=DEVICE).bfloat16()

        def gradients(impl: str) -> tuple[torch.Tensor, ...]:
            bias = fb.FactoredBias(*leaves[3:])
            out = fb.attention(*leaves[:3], bias, is_causal=is_causal, impl=impl)
            assert isinstance(out, torch.Tensor)
            return torch.autograd.grad(out, leaves, dout)

        names = ("query", "key", "value", "phi_q", "phi_k")
        for name, found, right in zip(names, gradients("hopper"), gradients("triton"), strict=True):
            error = (found.double() - right.double()).norm() / right.double().norm()
            assert error <= 1e-2, f"{name}: {error}"

    @staticmethod
    def assert_lse_close(
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        bias: fb.FactoredBias,
        rows: torch.Tensor,
        *,
        is_causal: bool,
    ) -> None:
        """Within what float32 resolves of the largest bias of a row, with the constant put back."""
        bias_rows = bias.phi_q[..., rows, :].double() @ bias.phi_k.double().mT
        scores = q[..., rows, :].double() @ k.double().mT * q.shape[-1] ** -0.5 + bias_rows
        if is_causal:
            scores = scores.masked_fill(torch.arange(k.shape[-2], device=DEVICE) > rows[:, None], -torch.inf)
        error = (lse[..., rows].double() - scores.logsumexp(-1)).abs()
        size = (bias.phi_q[..., rows, :].double().abs() @ bias.phi_k.double().abs().mT).amax(-1)
        assert (error <= 1e-3 + 4 * UNIT_ROUNDOFF[torch.float32] * size).all(), error.max()


# -------------------------------------------------------------------- random shapes

PROBLEMS = 10_000
SHARES = 8
SEED = 20_260
WIDTHS = [(16, 16), (32, 32), (64, 64), (128, 128), (32, 64), (128, 64)]
BANDS = ["none", "whole tiles", "causal", "window"]
RANKS = [0, 4, 16, 1, 9]


@dataclass(frozen=True)
class Kind:
    """What is compiled: everything else of a problem is free."""

    index: int
    width: int
    width_v: int
    band: str

    @property
    def rank(self) -> int:
        return RANKS[self.index % len(RANKS)]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.index % 3 == 2 else torch.bfloat16

    @property
    def same_dtype(self) -> bool:
        """Of factors and queries."""
        return self.index // 3 % 2 == 0

    @property
    def wanted(self) -> tuple[str, ...]:
        """Leaves with gradients; beside float16 queries other kernels make those of factors."""
        choices = [("phi_q", "phi_k"), ("phi_q",), ("phi_k",), ()]
        factors = () if self.dtype == torch.float16 or not self.rank else choices[self.index % 4]
        return ("query", "key", "value", *factors)

    def draw(self, rng: random.Random) -> Case:
        """A problem of this kind."""
        heads, kv_heads = rng.choice([(1, None), (2, None), (3, None), (4, 2), (4, 1), (2, 1)])
        batch = rng.choice([(1,), (2,), (3,), (2, 2)])
        m = rng.choice([64, 128, 192]) if self.band == "whole tiles" else rng.randint(17, 200)
        if self.band != "whole tiles" and m % 64 == 0:
            m += 1
        return Case(
            f"{self.index}", batch=batch, heads=heads, kv_heads=kv_heads, n=rng.randint(17, 200), m=m,
            head_dim=self.narrower(self.width, rng), head_dim_v=self.narrower(self.width_v, rng), rank=self.rank,
            phi_q=self.lead(batch, heads, rng), phi_k=self.lead(batch, heads, rng), same_dtype=self.same_dtype,
            layout=rng.choice(["contiguous", "contiguous", "transposed", "sliced", "expanded"]),
            options=self.options(rng),
        )  # fmt: skip

    @staticmethod
    def narrower(width: int, rng: random.Random) -> int:
        """A multiple of 8 that is held in as many columns: just over half of them or all; between, much is compiled."""
        multiplied = (width // 2 + NARROWEST, width)
        return rng.choice([n for n in range(8, width + 1, 8) if columns_of(n) == width and width_of(n) in multiplied])

    @staticmethod
    def lead(batch: tuple[int, ...], heads: int, rng: random.Random) -> tuple[int, ...]:
        """Leading sizes of a factor, some of them shared."""
        return tuple(rng.choice([1, size]) for size in (*batch, heads))

    def options(self, rng: random.Random) -> dict[str, Any]:
        if self.band in ("none", "whole tiles"):
            return {}
        alignment = {"causal_alignment": rng.choice(["top_left", "bottom_right"])}
        if self.band == "causal":
            return {"is_causal": True} | alignment
        left = rng.randint(0, 120)
        # Every other width has no right side, so that a left one alone is compiled too.
        return {"window": (left, None if self.index % 8 == 3 else rng.randint(0, 120))} | alignment


KINDS = [Kind(index, *widths, band) for index, (widths, band) in enumerate(itertools.product(WIDTHS, BANDS))]


class ElsewhereError(Exception):
    """Gradients that the fused kernel does not make."""


@pytest.fixture
def no_portable_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the portable kernels are tested with them; here they would compile for each shape anew."""
    from flashbias.attention.hopper import backward

    def elsewhere(*_: Any) -> None:
        raise ElsewhereError

    monkeypatch.setattr(backward.portable, "launch_as", elsewhere)


def run(problem: Problem, wanted: tuple[str, ...], with_dlse: bool) -> tuple[Results, bool]:
    """Output, log-sum-exp and the gradients wanted; whether the fused kernel makes these."""
    leaves = problem.leaves(wanted)
    out, lse = problem.attend("hopper", leaves, return_lse=True)
    try:
        return differentiate(problem, leaves, out, lse, with_dlse), True
    except ElsewhereError:
        return Results({"out": out.detach(), "lse": lse.detach()}), False


def is_plainly_close(problem: Problem, results: Results, with_dlse: bool) -> bool:
    """Whether results are within the first two terms of the oracle's bound, at a tenth of its cost."""
    exact_leaves = {name: x.detach().double().requires_grad_(name in LEAVES) for name, x in problem.tensors.items()}
    exact = differentiate(problem, exact_leaves, *explicit(problem, exact_leaves, torch.float64), with_dlse)
    yardstick = eager(problem, with_dlse)
    verdicts = []
    for name in results.names():
        found, right = results[name].double(), exact[name]
        infinite = right.isinf()
        error, allowed, size = (
            torch.where(infinite, 0.0, x).norm() for x in (found - right, yardstick[name].double() - right, right)
        )
        u = UNIT_ROUNDOFF[torch.float32 if name == "lse" else problem.tensors["query"].dtype]
        verdicts += [error <= 2 * allowed + 2 * u * size, (found.isinf() == infinite).all()]
    return bool(torch.stack(verdicts).all())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", range(SHARES))
def test_random_shapes(share: int, no_portable_gradients: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Output, log-sum-exp and gradients of ten thousand small problems, without a failure.

    Most of the time is compiling, so the kinds are shared out to tests that can run side by side.
    """
    rng = random.Random(SEED + share)
    kinds = KINDS[share::SHARES]
    begin, failures, fused, looked_closer = time.monotonic(), [], 0, 0
    for turn in range(PROBLEMS // SHARES):
        kind = kinds[turn % len(kinds)]
        case, with_dlse = kind.draw(rng), rng.random() < 0.5
        problem = case.build(kind.dtype, DEVICE, seed=turn)
        results, is_fused = run(problem, kind.wanted, with_dlse)
        fused += is_fused
        if not is_plainly_close(problem, results, with_dlse):
            looked_closer += 1
            try:
                assert_close_to_oracle(problem, results, with_dlse)
            except AssertionError as error:
                failures.append(f"problem {turn}, {case!r}: {error}")
        if (turn + 1) % 500 == 0:
            with capsys.disabled():
                print(
                    f"\nshare {share}: {turn + 1} problems, {len(failures)} failures, {looked_closer} looked at "
                    f"more closely, gradients by the fused kernel in {fused}, {time.monotonic() - begin:.0f} s",
                    end="", flush=True,
                )  # fmt: skip
    assert fused > PROBLEMS // SHARES // 4
    assert not failures, f"{len(failures)} failures, the first ones:\n" + "\n".join(failures[:5])
