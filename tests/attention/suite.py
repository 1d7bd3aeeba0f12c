"""What every implementation owes: one class, subclassed with a name and with what it supports.

Whatever a subclass does not support must raise NotImplementedError; that is tested too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tests.attention.cases import CASES
from tests.attention.oracle import assert_close_to_oracle, differentiate, explicit, visible_pairs
from tests.attention.problem import Case, Problem
from tests.attention.varlen import VARLEN, VarlenCase

import flashbias as fb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AttentionSuite:
    """Tests of one implementation."""

    impl: ClassVar[str]
    device: ClassVar[str] = "cpu"
    stretch: ClassVar[int] = 1
    is_slow: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)  # what it takes, the widest first

    supports_lse: ClassVar[bool] = True
    supports_float64: ClassVar[bool] = False
    supports_double_backward: ClassVar[bool] = False
    supports_wide_heads: ClassVar[bool] = True
    centres_factors: ClassVar[bool] = True

    @classmethod
    def grid(cls) -> list[tuple[Case, str]]:
        """Cases and dtypes that the subclass runs."""
        if not cls.is_slow:
            return list(itertools.product(CASES, DTYPES))
        names, chosen = list(DTYPES), []
        for turn, case in enumerate(case for case in CASES if not case.slow):
            chosen += [(case, name) for name in (names[:2] if case.core else [names[turn % 3]])]
        return chosen

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"case", "dtype"} <= set(metafunc.fixturenames):
            grid = self.grid()
            metafunc.parametrize(
                ("case", "dtype"), [(c, DTYPES[d]) for c, d in grid], ids=[f"{c}-{d}" for c, d in grid]
            )
        if "dtype_of_choice" in metafunc.fixturenames:
            names = ["bfloat16"] if self.is_slow else self.dtypes
            metafunc.parametrize("dtype_of_choice", [DTYPES[name] for name in names], ids=names)

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """Every test of the suite runs on buffers filled with NaN."""

    def test_output_and_gradients(self, case: Case, dtype: torch.dtype) -> None:
        problem = case.stretched(self.stretch).build(dtype, self.device)
        with_lse = self.supports_lse and bool(case.options.get("return_lse"))
        leaves = problem.leaves()
        result = problem.attend(self.impl, leaves, return_lse=with_lse)
        out, lse = result if with_lse else (result, None)
        assert out.dtype == dtype
        assert lse is None or lse.dtype == torch.float32
        results = differentiate(problem, leaves, out, lse, with_dlse=with_lse)
        for name, x in leaves.items():
            assert f"d{name}" not in results.names() or results[f"d{name}"].dtype == x.dtype
        assert_close_to_oracle(problem, results, with_dlse=with_lse)

    # ---------------------------------------------------------------- rows and tensors with nothing in them

    @pytest.mark.parametrize(
        "options", [{}, {"causal_alignment": "bottom_right", "is_causal": True}], ids=["mask", "causal"]
    )
    def test_rows_without_a_key_are_zero(self, options: dict[str, object]) -> None:
        """Output 0, gradients 0 and never NaN, log-sum-exp -inf."""
        case = Case("dead", n=19, m=13, mask=None if options else "dead rows", options=options)
        problem = case.build(torch.float32, self.device)
        leaves = problem.leaves()
        keep = visible_pairs(problem)
        assert keep is not None
        dead = ~keep.any(-1).expand(*case.batch, case.heads, case.n)
        assert dead.any()
        assert not dead.all()
        result = problem.attend(self.impl, leaves, return_lse=self.supports_lse)
        out, lse = result if self.supports_lse else (result, None)
        assert (out[dead] == 0).all()
        if lse is not None:
            assert torch.equal(lse == -torch.inf, dead)
        # A gradient that comes in at dead rows alone moves nothing at all.
        grads = torch.autograd.grad(out, tuple(leaves.values()), problem.dout * dead[..., None])
        assert all((grad == 0).all() for grad in grads)

    @pytest.mark.parametrize(
        "sizes",
        [{"batch": (0,)}, {"n": 0}, {"m": 0}, {"batch": (2, 0)}],
        ids=["batch", "queries", "keys", "windows"],
    )
    def test_zero_length(self, sizes: dict[str, object]) -> None:
        lead = (1,) * len(sizes.get("batch", (2,))) + (2,)  # type: ignore[arg-type]
        case = replace(Case("empty", n=5, m=7, phi_q=lead[1:], phi_k=lead, table=5), **sizes)  # type: ignore[arg-type]
        problem = case.build(torch.float32, self.device)
        leaves = problem.leaves()
        out = problem.attend(self.impl, leaves)
        assert out.shape == (*case.batch, case.heads, case.n, case.head_dim)
        assert (out == 0).all()
        for name, grad in zip(leaves, torch.autograd.grad(out.sum(), tuple(leaves.values())), strict=True):
            assert grad.shape == leaves[name].shape
            assert (grad == 0).all(), name

    # ---------------------------------------------------------------- numbers far out

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_positions_far_from_the_origin(self, dtype: torch.dtype) -> None:
        """ALiBi among positions near 2^20 is ALiBi among positions near 0: only differences count."""
        case = Case("alibi", n=40, heads=2, batch=(1,), rank=1, options={"is_causal": True})
        problem = case.build(dtype, self.device)
        slopes = torch.tensor([0.7071067, 0.0441942], device=self.device)[:, None, None]
        near = torch.arange(float(case.n), device=self.device)[None, :, None]
        far = near + (2**20 - case.n)
        problem.tensors["phi_q"] = slopes.expand(2, case.n, 1)
        problem.tensors["phi_k"] = near
        leaves = problem.leaves() | {"phi_k": far.requires_grad_()}
        results = differentiate(problem, leaves, problem.attend(self.impl, leaves), None, False)
        del results.tensors["dphi_q"]  # it is a sum over positions, and is not the same far out
        if self.centres_factors:
            assert_close_to_oracle(problem, results)
        else:  # the formula as it is written, in float32 at least: as good as its dense bias
            written = explicit(problem, problem.tensors | {"phi_k": far.detach()}, torch.float32)[0]
            torch.testing.assert_close(results["out"].float(), written, atol=1e-2, rtol=1e-2)

    def test_huge_biases_leave_one_key(self) -> None:
        """With biases of 1e4 apart a row is the value of one key, to the last bit.

        The values have 8 bits: a float32 product made of TF32 products keeps no more than 23 of 24.
        """
        n = 24
        query, key, value = (torch.randn(1, 1, n, 16, device=self.device).bfloat16().float() for _ in range(3))
        position = torch.arange(float(n), device=self.device)[None, :, None]
        phi = 100.0 * position
        favoured = fb.FactoredBias(
            torch.cat([phi, torch.full_like(phi, -5000.0)], -1), torch.cat([phi, position**2], -1)
        )  # 1e4 * (i j - j^2 / 2) is largest at j = i, by 5e3
        out = fb.attention(query, key, value, favoured, impl=self.impl)
        assert torch.equal(out, value)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("masking", [-1e4, -1e9])
    def test_a_column_may_mask_most_keys(self, masking: float, side: str, dtype_of_choice: torch.dtype) -> None:
        """Keys of padding, pushed far down by a column of the factors, change nothing for the others.

        Most keys from which a centre could be taken are padding, and so are all of the tile that is seen first.
        """
        n, m, seen = 20, 150, slice(30) if side == "right" else slice(120, None)
        problem = Case("column", batch=(1,), n=n, m=m, rank=2, size=2.0).build(dtype_of_choice, self.device)
        column = torch.full((1, m, 1), masking, device=self.device)
        column[:, seen] = 0.0
        leaves = problem.leaves()
        phi_q = torch.cat([leaves["phi_q"], torch.ones_like(leaves["phi_q"][..., :1])], dim=-1)
        phi_k = torch.cat([leaves["phi_k"], column.expand(*leaves["phi_k"].shape[:-1], 1)], dim=-1)
        out = problem.attend(self.impl, leaves | {"phi_q": phi_q, "phi_k": phi_k})
        exact = {name: x.detach().double() for name, x in leaves.items()}
        exact |= {name: exact[name][..., seen, :] for name in ("key", "value", "phi_k")}
        problem.case = replace(problem.case, m=30)
        wanted, _ = explicit(problem, exact, torch.float64)
        bound = {torch.float32: 2e-3 if masking == -1e4 else 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
        torch.testing.assert_close(out.double(), wanted, atol=bound[dtype_of_choice], rtol=0.0)

    def test_padding_of_ranks_is_never_read(self) -> None:
        """Columns at and beyond a head's rank may hold anything, as memory that nobody has written to does."""
        case = Case("ranks", n=19, heads=3, batch=(1,), rank=7, ranks=(0, 7, 3), phi_q=(3,), phi_k=(3,))
        problem = case.build(DTYPES[self.dtypes[0]], self.device)
        padding = torch.arange(7, device=self.device) >= torch.tensor(case.ranks, device=self.device)[:, None, None]
        leaves = problem.leaves()
        found = differentiate(problem, leaves, problem.attend(self.impl, leaves), None, False)
        for name in ("phi_q", "phi_k"):
            problem.tensors[name] = problem.tensors[name].masked_fill(padding, math.nan)
        leaves = problem.leaves()
        poisoned = differentiate(problem, leaves, problem.attend(self.impl, leaves), None, False)
        for name in found.names():
            torch.testing.assert_close(poisoned[name], found[name], atol=0.0, rtol=0.0, msg=name)

    # ---------------------------------------------------------------- gradients

    @pytest.mark.parametrize(
        "wanted",
        [("phi_q", "phi_k"), ("phi_q",), ("phi_k",), ("table",), ("query",), ("value",)],
        ids="-".join,
    )
    def test_only_some_need_a_gradient(self, wanted: tuple[str, ...]) -> None:
        """Frozen inputs get none; the others get the same as when all ask."""
        problem = Case("some", n=13, m=15, phi_q=(2, 1), phi_k=(1, 2), table=9).build(torch.float32, self.device)
        everything, some = problem.leaves(), problem.leaves(wanted)
        results = differentiate(problem, everything, problem.attend(self.impl, everything), None, False)
        found = differentiate(problem, some, problem.attend(self.impl, some), None, False)
        assert set(found.names()) == {"out"} | {f"d{name}" for name in wanted}
        for name in found.names():
            torch.testing.assert_close(found[name], results[name], atol=1e-5, rtol=1e-5)

    def test_arguments_are_left_alone(self) -> None:
        problem = Case("mutation", n=19, table=9, mask="full").build(torch.bfloat16, self.device)
        before = {name: x.clone() for name, x in problem.tensors.items()}
        leaves = problem.leaves()
        problem.attend(self.impl, leaves).sum().backward()
        assert all(torch.equal(before[name], x) for name, x in problem.tensors.items())

    def test_lse_alone_is_differentiable(self) -> None:
        problem = Case("lse", n=17, m=21, batch=(1,), table=9).build(torch.float32, self.device)
        leaves = problem.leaves()
        if not self.supports_lse:
            with pytest.raises(NotImplementedError, match="return_lse"):
                problem.attend(self.impl, leaves, return_lse=True)
            return
        _, lse = problem.attend(self.impl, leaves, return_lse=True)
        leaves.pop("value")  # the log-sum-exp does not depend on it
        grads = torch.autograd.grad((lse * problem.dlse).sum(), tuple(leaves.values()))
        exact = {name: x.detach().double().requires_grad_() for name, x in problem.tensors.items()}
        loss = (explicit(problem, exact, torch.float64)[1] * problem.dlse.double()).sum()
        for grad, name in zip(grads, leaves, strict=True):
            (right,) = torch.autograd.grad(loss, exact[name], retain_graph=True)
            torch.testing.assert_close(grad.double(), right, atol=1e-5, rtol=1e-5, msg=name)

    # ---------------------------------------------------------------- repeatable

    def test_deterministic_twice(self, dtype_of_choice: torch.dtype) -> None:
        """Bit for bit, for factors shared by a batch, a table and grouped queries."""
        case = Case(
            "twice", n=19, m=23, heads=2, kv_heads=1, head_dim=24, phi_q=(2, 1), phi_k=(1, 2), rank=7, table=9
        )  # fmt: skip
        problem = case.stretched(self.stretch).build(dtype_of_choice, self.device)

        def once() -> list[torch.Tensor]:
            leaves = problem.leaves()
            out = problem.attend(self.impl, leaves, deterministic=True)
            return [out, *torch.autograd.grad(out, tuple(leaves.values()), problem.dout)]

        assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))

    # ---------------------------------------------------------------- what cannot be done

    def test_what_is_unsupported_raises(self) -> None:
        plain = Case("plain", n=5, batch=(1,))
        problem = plain.build(torch.float32, self.device)
        if not self.supports_lse:
            with pytest.raises(NotImplementedError, match=f"impl='{self.impl}'.*return_lse.*would take"):
                problem.attend(self.impl, problem.leaves(), return_lse=True)
        if not self.supports_float64:
            double = plain.build(torch.float64, self.device)
            with pytest.raises(NotImplementedError, match=f"impl='{self.impl}'.*float64.*would take"):
                double.attend(self.impl, double.leaves())
        if not self.supports_wide_heads:
            wide = replace(plain, head_dim=257).build(torch.float32, self.device)
            with pytest.raises(NotImplementedError, match=r"head_dim 257.*256.*would take"):
                wide.attend(self.impl, wide.leaves())
            wide = replace(plain, head_dim_v=264).build(torch.float32, self.device)
            with pytest.raises(NotImplementedError, match=r"head_dim_v 264.*256.*would take"):
                wide.attend(self.impl, wide.leaves())
        leaves = problem.leaves()
        (grad,) = torch.autograd.grad(
            problem.attend(self.impl, leaves).pow(2).sum(), leaves["query"], create_graph=True
        )
        if not self.supports_double_backward:
            with pytest.raises(NotImplementedError, match="impl='reference'"):
                torch.autograd.grad(grad.sum(), leaves["query"])

    def test_what_is_supported_works(self) -> None:
        plain = Case("plain", n=5, batch=(1,))
        if self.supports_float64:
            problem = plain.build(torch.float64, self.device)
            leaves = problem.leaves()
            out = problem.attend(self.impl, leaves)
            assert out.dtype == torch.float64
            torch.testing.assert_close(out, explicit(problem, leaves, torch.float64)[0], atol=1e-13, rtol=1e-13)
        if self.supports_wide_heads:
            problem = replace(plain, head_dim=300).build(torch.float32, self.device)
            assert problem.attend(self.impl, problem.leaves()).isfinite().all()

    # ---------------------------------------------------------------- dropout

    def dropped(self, problem: Problem, dropout_p: float) -> torch.Tensor:
        """Weights after dropout, read off by attending to the identity."""
        m = problem.case.seqlen_k
        identity = torch.eye(m, device=self.device).expand_as(problem.tensors["value"])
        return problem.attend(self.impl, problem.tensors | {"value": identity}, dropout_p=dropout_p)

    def test_dropout_keeps_its_share(self) -> None:
        """A weight is 0 with probability p, and else it is what it was over 1 - p."""
        problem = Case("dropout", n=32, m=24, head_dim_v=24, mask="padding").build(torch.float32, self.device)
        torch.manual_seed(0)
        p = 0.3
        weights, before = self.dropped(problem, p), self.dropped(problem, 0.0)
        possible = before > 0
        kept = weights > 0
        assert (kept <= possible).all()
        torch.testing.assert_close(weights[kept], before[kept] / (1 - p), rtol=1e-5, atol=0.0)
        count = int(possible.sum())
        share = kept.sum().item() / count
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
        # Different heads, queries and keys draw differently.
        assert not torch.equal(kept[0, 0], kept[0, 1])
        assert not torch.equal(kept[0, 0, 0], kept[0, 0, 1])
        assert not torch.equal(self.dropped(problem, p) > 0, kept)

    def test_dropout_gradients_know_what_was_dropped(self) -> None:
        case = Case("dropout", n=13, m=16, head_dim_v=16, phi_q=(2, 1), phi_k=(1, 2), table=9)
        problem = case.build(torch.float32, self.device)
        torch.manual_seed(3)
        kept = self.dropped(problem, 0.4) > 0
        torch.manual_seed(3)
        leaves = problem.leaves()
        found = differentiate(problem, leaves, problem.attend(self.impl, leaves, dropout_p=0.4), None, False)
        exact = {name: x.detach().double().requires_grad_() for name, x in problem.tensors.items()}
        out, _ = explicit(problem, exact, torch.float64, kept=kept, dropout_p=0.4)
        right = differentiate(problem, exact, out, None, False)
        for name in right.names():
            torch.testing.assert_close(found[name].double(), right[name], atol=2e-5, rtol=2e-5, msg=name)

    def test_no_dropout_is_no_dropout(self) -> None:
        problem = Case("dropout", n=21).build(torch.float32, self.device)
        leaves = problem.leaves()
        assert torch.equal(problem.attend(self.impl, leaves, dropout_p=0.0), problem.attend(self.impl, leaves))

    # ---------------------------------------------------------------- packed batches

    @pytest.mark.parametrize("varlen", VARLEN, ids=lambda case: case.name)
    def test_varlen_is_attention_of_each_sequence(self, varlen: VarlenCase, dtype_of_choice: torch.dtype) -> None:
        with_lse = self.supports_lse and varlen.with_lse
        packed = varlen.build(dtype_of_choice, self.device, self.stretch)
        leaves = packed.leaves()
        result = packed.attend(self.impl, leaves, return_lse=with_lse)
        out, lse = result if with_lse else (result, None)
        packed.assert_close_to_oracle(leaves, out, lse)

    def test_varlen_with_codes_of_one_side(self) -> None:
        """Those of the other are positions in the pack, as `FactoredBias` says, and not what a band would read."""
        ends = [0, 5 * self.stretch, n := 12 * self.stretch]
        bounds, table = torch.tensor(ends, dtype=torch.int32, device=self.device), torch.randn(2, 2 * n - 3)
        x, table = torch.randn(n, 2, 16, device=self.device).to(DTYPES[self.dtypes[0]]), table.to(self.device)
        bound = 1e-5 if x.dtype == torch.float32 else 2e-2
        code = torch.arange(n, 0, -1, device=self.device)
        for given in ({"code_q": code}, {"code_k": code}):
            bias = fb.FactoredBias.from_table(table, n, n, **given)
            out = fb.varlen_attention(x, x, x, bounds, bounds, bias, impl=self.impl)
            for start, stop in itertools.pairwise(ends):
                own = x[start:stop].transpose(0, 1)
                wanted = fb.attention(own, own, own, bias[start:stop, start:stop], impl="reference")
                torch.testing.assert_close(out[start:stop].transpose(0, 1), wanted, atol=bound, rtol=bound)

    @pytest.mark.parametrize("poison", [1e4, 3e30], ids=["large", "enormous"])
    def test_varlen_does_not_leak(self, poison: float) -> None:
        """What stands in the other sequences changes no bit of a sequence's output and gradients."""
        packed = VarlenCase("leak", (17, 5, 40), (19, 21, 7), options={"is_causal": True}).build(
            torch.float32, self.device
        )
        own_q, own_k = slice(0, 17), slice(0, 19)

        def first_sequence() -> dict[str, torch.Tensor]:
            leaves = packed.leaves()
            out = packed.attend(self.impl, leaves)[own_q]
            wanted = {n: leaves[n] for n in ("query", "key", "value", "phi_q", "phi_k")}
            grads = torch.autograd.grad(out, tuple(wanted.values()), packed.dout[own_q])
            own = {"query": own_q, "key": own_k, "value": own_k}
            cut = {
                n: g[own[n]] if n in own else g[:, own_q if n == "phi_q" else own_k]
                for n, g in zip(wanted, grads, strict=True)
            }
            return {"out": out, **cut}

        clean = first_sequence()
        for name, x in packed.tensors.items():
            if name in ("query", "key", "value"):
                x[17 if name == "query" else 19 :] *= poison
            elif name != "table":
                x[:, 17 if name == "phi_q" else 19 :] *= poison**0.5
        for name, x in first_sequence().items():
            assert torch.equal(x, clean[name]), name
