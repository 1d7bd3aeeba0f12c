"""Blocks of keys, merged, are the attention over all of them: results and every gradient, in both implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.attention.block import (
    attention_block,
    attention_block_backward,
    checked_block,
    reference,
    row_reference,
)
from flashbias.attention.call import INPUTS, Call, VarlenLayout

N, HEADS, KV_HEADS, WIDTH = 37, 2, 1, 8


@dataclass(frozen=True)
class Case:
    name: str
    rank: int = 3
    phi_q: tuple[int, ...] = (HEADS,)
    phi_k: tuple[int, ...] = (1,)
    table: int | None = None
    ranks: tuple[int, ...] | None = None
    is_causal: bool = True
    offset: float = 3.0  # how far phi_k is from zero
    half_factors: bool = False
    kv_heads: int = KV_HEADS
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("causal"),
    Case("full", is_causal=False),
    Case("no bias", rank=0),
    Case("table", table=9),
    Case("only a table", rank=0, table=9, is_causal=False),
    Case("ranks per head", ranks=(3, 0), phi_q=(1,), phi_k=(HEADS,)),
    Case("batch of factors", phi_q=(2, HEADS), phi_k=(2, 1)),
    Case("far from zero", offset=1000.0, phi_q=(HEADS,)),
    Case("half factors", half_factors=True),
    Case("half factors, no groups", half_factors=True, kv_heads=HEADS),
]


class Problem:
    """Inputs in a dtype, their float64 truth, and the tiles that two blocks of keys make."""

    def __init__(self, case: Case, dtype: torch.dtype, batch: int = 2) -> None:
        self.case, self.dtype, self.batch = case, dtype, batch
        torch.manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)
        factor = dtype if case.half_factors else wide
        shape = {"query": HEADS, "key": case.kv_heads, "value": case.kv_heads}
        self.leaves = {name: torch.randn(batch, heads, N, WIDTH).to(dtype) for name, heads in shape.items()}
        if case.rank:
            self.leaves["phi_q"] = (torch.randn(*case.phi_q, N, case.rank) / (1 + case.offset / 10)).to(factor)
            self.leaves["phi_k"] = (case.offset + torch.randn(*case.phi_k, N, case.rank)).to(factor)
        if case.table is not None:
            self.leaves["table"] = torch.randn(HEADS, case.table).to(wide)
        self.dout = torch.randn(batch, HEADS, N, WIDTH).to(dtype)
        self.dlse = torch.randn(batch, HEADS, N)
        self.code = torch.arange(N) * 2 if case.table is not None else None
        self.needs = [name in self.leaves for name in INPUTS]

    def bias(self, leaves: dict[str, Tensor]) -> fb.FactoredBias | None:
        if not self.case.rank and self.case.table is None:
            return None
        empty = leaves["query"].new_zeros(1, N, 0, dtype=torch.float64)
        return fb.FactoredBias(
            leaves.get("phi_q", empty), leaves.get("phi_k", empty), leaves.get("table"), self.code, self.code,
            self.case.ranks,
        )  # fmt: skip

    def truth(self) -> dict[str, Tensor]:
        leaves = {name: x.double().requires_grad_() for name, x in self.leaves.items()}
        out, lse = fb.attention(
            leaves["query"], leaves["key"], leaves["value"], self.bias(leaves), is_causal=self.case.is_causal,
            enable_gqa=True, impl="reference", return_lse=True,
        )  # fmt: skip
        loss = (out * self.dout).sum() + (lse * self.dlse).sum()
        grads = torch.autograd.grad(loss, tuple(leaves.values()))
        return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))

    def whole(self) -> Call:
        bias = self.bias(self.leaves)
        if bias is not None and bias.rank == 0:
            empty = torch.zeros(1, N, 0)
            bias = replace(bias, phi_q=empty, phi_k=empty)
        return checked_block(
            self.leaves["query"], self.leaves["key"], self.leaves["value"], bias, is_causal=self.case.is_causal,
            enable_gqa=True,
        )  # fmt: skip

    def tiles(self) -> list[tuple[slice, slice, Call]]:
        whole, cut = self.whole(), 14
        spans = [(slice(0, N), slice(0, cut), None), (slice(0, N), slice(cut, N), None)]
        if self.case.is_causal:
            spans = [(slice(0, cut), slice(0, cut), 0), (slice(cut, N), slice(0, cut), None),
                     (slice(cut, N), slice(cut, N), 0)]  # fmt: skip
        return [
            (
                rows,
                keys,
                replace(
                    whole,
                    query=whole.query[..., rows, :],
                    key=whole.key[..., keys, :],
                    value=whole.value[..., keys, :],
                    bias=None if whole.bias is None else whole.bias.slice(rows, keys),
                    window_right=right,
                ),
            )
            for rows, keys, right in spans
        ]

    def blockwise(self, impl: str) -> dict[str, Tensor]:
        """Forward and backward, tile by tile, summed in float64."""
        out = torch.zeros(self.batch, HEADS, N, WIDTH, dtype=torch.float64)
        lse = torch.full((self.batch, HEADS, N), -math.inf, dtype=torch.float64)
        for rows, _, call in self.tiles():
            own, own_lse = attention_block(call, impl)
            assert own.dtype == self.dtype and own_lse.dtype == torch.float64
            total = torch.logaddexp(lse[..., rows], own_lse)
            shares = ((x - total).exp()[..., None] for x in (lse[..., rows], own_lse))
            out[..., rows, :] = out[..., rows, :] * next(shares) + own * next(shares)
            lse[..., rows] = total
        reference = row_reference(self.whole(), impl)
        delta = (self.dout * out.to(self.dtype)).float().sum(-1) - self.dlse
        if self.dtype == torch.float64:
            delta = (self.dout * out).sum(-1) - self.dlse
        sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in self.leaves.items()}
        for rows, keys, call in self.tiles():
            where = None if reference is None else reference[..., rows, :]
            grads = attention_block_backward(
                call, self.dout[..., rows, :], lse[..., rows], delta[..., rows], self.needs, where, impl
            )
            for name in sums:
                part = getattr(grads, name)
                if name == "table":
                    sums[name] += part
                else:
                    sums[name][..., rows if name in ("query", "phi_q") else keys, :] += part
        if reference is not None and "phi_q" in sums:
            rest = reference.double() * self.dlse[..., None]
            if self.case.ranks is not None:
                bias = self.whole().bias
                assert bias is not None
                rest = rest * bias.rank_mask()[:, None, :]
            sums["phi_q"] += rest.sum_to_size(sums["phi_q"].shape)
        return {"out": out, "lse": lse} | sums


def assert_blocks_make_the_whole(case: Case, dtype: torch.dtype, impl: str, tolerance: float, batch: int = 2) -> None:
    problem = Problem(case, dtype, batch)
    found, right = problem.blockwise(impl), problem.truth()
    for name, x in right.items():
        error = (found[name] - x).norm() / x.norm()
        assert error <= tolerance, f"{case}, {dtype}: {name} is off by {error:.2g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 there is nothing but rounding; a few rows at a time or all at once."""
    tolerance = 1e-9 if case.offset > 100 else 1e-12
    assert_blocks_make_the_whole(case, torch.float64, "reference", tolerance)
    monkeypatch.setattr(reference, "BLOCK_SCORES", 1)
    assert_blocks_make_the_whole(case, torch.float64, "reference", tolerance)


BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize(("phi_q", "phi_k"), [(HEADS, HEADS), (1, HEADS), (HEADS, 1)])
def test_padding_of_ranks_is_never_read(phi_q: int, phi_k: int) -> None:
    """Columns at and beyond a head's rank may hold anything; shared ones, what lies beyond the rank of every head."""
    ranks = (2, 0)
    problem = Problem(Case("padding", ranks=ranks, phi_q=(phi_q,), phi_k=(phi_k,)), torch.float64)
    found = problem.blockwise("reference")
    for name in ("phi_q", "phi_k"):
        phi = problem.leaves[name]
        own = torch.tensor(ranks if phi.shape[0] == HEADS else (max(ranks),))
        problem.leaves[name] = phi.masked_fill(torch.arange(3) >= own[:, None, None], math.nan)
    for name, x in problem.blockwise("reference").items():
        torch.testing.assert_close(x, found[name], atol=0.0, rtol=0.0, msg=name)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["table", "ranks per head", "far from zero"])
def test_kernels_in_float32(name: str, nan_filled_buffers: None) -> None:
    tolerance = 1e-4 if BY_NAME[name].offset > 100 else 5e-6
    assert_blocks_make_the_whole(BY_NAME[name], torch.float32, "triton", tolerance, batch=1)


@pytest.mark.interpreter
def test_kernels_in_bfloat16(nan_filled_buffers: None) -> None:
    assert_blocks_make_the_whole(BY_NAME["half factors"], torch.bfloat16, "triton", 2e-2, batch=1)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_blocks_that_share_their_bias(dtype: torch.dtype, nan_filled_buffers: None) -> None:
    """Kernels that make delta of their own weights would take a block of keys for all of them."""
    assert_blocks_make_the_whole(BY_NAME["half factors, no groups"], dtype, "triton", 2e-2)


def test_centring_is_undone_where_positions_are_far() -> None:
    """ALiBi a million tokens on, in float32: products of positions are never formed."""
    start, n = 2**20 - 64, 64
    position = torch.arange(start, start + n)
    alibi = fb.Alibi(8)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, n, 8)
    right, right_lse = fb.attention(
        q.double(), k.double(), v.double(), alibi.at(position, position, torch.float64), is_causal=True,
        impl="reference", return_lse=True,
    )  # fmt: skip
    whole = checked_block(q, k, v, alibi.at(position, position), is_causal=True)
    out, lse = attention_block(whole, "reference")
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    assert lse.dtype == torch.float64 and right_lse.shape == lse.shape


def test_packed_documents() -> None:
    torch.manual_seed(0)
    bounds = (0, 5, 5, 20, N)
    bias = fb.FactoredBias(torch.randn(HEADS, N, 2), 5 + torch.randn(1, N, 2))
    whole = checked_block(*torch.randn(3, HEADS, N, WIDTH), bias, is_causal=True)
    cu = torch.tensor(bounds, dtype=torch.int32)
    out, lse = attention_block(replace(whole, varlen=VarlenLayout(cu, cu, 17, 17)))
    for start, stop in ((0, 5), (5, 20), (20, N)):
        rows = slice(start, stop)
        part = replace(
            whole, query=whole.query[:, rows], key=whole.key[:, rows], value=whole.value[:, rows],
            bias=bias.slice(rows, rows),
        )  # fmt: skip
        own, own_lse = attention_block(part)
        torch.testing.assert_close(out[:, rows], own)
        torch.testing.assert_close(lse[:, rows], own_lse)


def test_rows_without_a_key() -> None:
    x = torch.randn(2, 4, 8)
    call = replace(checked_block(x, x, x), key=x[:, 2:], value=x[:, 2:], window_left=0, window_right=0)
    out, lse = attention_block(call)
    assert torch.equal(out[:, 2:], torch.zeros(2, 2, 8)) and bool(lse[:, 2:].isneginf().all())
    grads = attention_block_backward(call, torch.ones_like(out), lse, torch.zeros(2, 4), [True] * 3 + [False] * 3)
    assert grads.query is not None and torch.equal(grads.query[:, 2:], torch.zeros(2, 2, 8))
    assert all(g is not None and bool(g.isfinite().all()) for g in (grads.query, grads.key, grads.value))


def test_only_what_is_needed() -> None:
    x = torch.randn(2, 4, 8)
    out, lse = attention_block(call := checked_block(x, x, x))
    grads = attention_block_backward(call, out, lse, torch.zeros(2, 4), [False, True] + [False] * 4)
    assert grads.key is not None and grads.query is grads.value is grads.phi_q is grads.table is None


def test_bad_input() -> None:
    call = checked_block(*torch.randn(3, 2, 4, 8))
    with pytest.raises(ValueError, match="impl must be 'auto', 'hopper', 'triton' or 'reference'"):
        attention_block(call, "sdpa")
    with pytest.raises(ValueError, match="takes no attn_mask"):
        attention_block(replace(call, attn_mask=torch.ones(4, 4, dtype=torch.bool)))
    with pytest.raises(NotImplementedError, match=r"impl='triton' cannot do this block: .*; 'reference' would"):
        attention_block(replace(call, query=call.query.double()), "triton")
