"""Packed batches: sequences of different lengths, and the truth worked out one sequence at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tests.attention import oracle
from tests.attention.problem import LEAVES, Case, Problem
from torch import Tensor

import flashbias as fb


@dataclass(frozen=True)
class VarlenCase:
    """Lengths of the sequences, and a case for everything else."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int = 2
    kv_heads: int | None = None
    rank: int = 5
    ranks: tuple[int, ...] | None = None
    phi_q_heads: int = 1
    phi_k_heads: int = 2
    head_dim: int = 16
    table: int | None = None
    with_lse: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype, device: str = "cpu", stretch: int = 1) -> Packed:
        lengths_q, lengths_k = (tuple(stretch * n for n in lengths) for lengths in (self.lengths_q, self.lengths_k))
        case = Case(
            self.name, batch=(), heads=self.heads, kv_heads=self.kv_heads, n=sum(lengths_q), m=sum(lengths_k),
            head_dim=self.head_dim, rank=self.rank, ranks=self.ranks, phi_q=(self.phi_q_heads,),
            phi_k=(self.phi_k_heads,), table=self.table,
        )  # fmt: skip
        problem = case.build(dtype, device)
        for name in ("query", "key", "value"):  # tokens first
            problem.tensors[name] = problem.tensors[name].transpose(0, 1).contiguous()
        options = dict(self.options)
        if options.get("is_causal") or "window" in options:
            options.setdefault("causal_alignment", "top_left")
        return Packed(
            case, lengths_q, lengths_k, problem.tensors, problem.dout.transpose(0, 1).contiguous(),
            problem.dlse.transpose(0, 1).contiguous(), options,
        )  # fmt: skip


@dataclass
class Packed:
    """Tensors of a packed batch: `[tokens, heads, …]`, factors `[H or 1, tokens, R]`."""

    case: Case
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    tensors: dict[str, Tensor]
    dout: Tensor
    dlse: Tensor
    options: dict[str, Any]

    def leaves(self, wanted: tuple[str, ...] = LEAVES) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_(name in wanted) for name, x in self.tensors.items()}

    def attend(self, impl: str, leaves: dict[str, Tensor], **options: Any) -> Any:
        bias = None
        if self.case.rank or self.case.table:
            table = leaves.get("table")
            bias = fb.FactoredBias(leaves["phi_q"], leaves["phi_k"], table, ranks=self.case.ranks)
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.dout.device)
            for lengths in (self.lengths_q, self.lengths_k)
        )
        return fb.varlen_attention(
            leaves["query"], leaves["key"], leaves["value"], cu_q, cu_k, bias, impl=impl,
            enable_gqa=self.case.kv_heads is not None, **self.options | options,
        )  # fmt: skip

    def sequences(self) -> list[tuple[Problem, slice, slice]]:
        """The problem of each sequence that has both queries and keys."""
        found = []
        starts_q, starts_k = ([0, *itertools.accumulate(x)] for x in (self.lengths_q, self.lengths_k))
        for start_q, n, start_k, m in zip(starts_q, self.lengths_q, starts_k, self.lengths_k, strict=False):
            queries, keys = slice(start_q, start_q + n), slice(start_k, start_k + m)
            if n == 0 or m == 0:
                continue
            case = replace(self.case, n=n, m=m, options=self.options)
            tensors = {
                "query": self.tensors["query"][queries].transpose(0, 1),
                "key": self.tensors["key"][keys].transpose(0, 1),
                "value": self.tensors["value"][keys].transpose(0, 1),
                "phi_q": self.tensors["phi_q"][:, queries],
                "phi_k": self.tensors["phi_k"][:, keys],
            }
            if "table" in self.tensors:
                tensors["table"] = self.tensors["table"]
            dout, dlse = self.dout[queries].transpose(0, 1), self.dlse[queries].transpose(0, 1)
            found.append((Problem(case, tensors, None, None, None, dout, dlse), queries, keys))
        return found

    def assert_close_to_oracle(self, leaves: dict[str, Tensor], out: Tensor, lse: Tensor | None) -> None:
        """Compare every sequence with its own truth; rows of sequences without a key are zero."""
        loss = (out.double() * self.dout.double()).sum()
        if lse is not None:
            loss = loss + (torch.where(lse.isfinite(), lse, 0.0).double() * self.dlse.double()).sum()
        wanted = {name: x for name, x in leaves.items() if x.numel() and x.requires_grad}
        grads = dict(zip(wanted, torch.autograd.grad(loss, tuple(wanted.values())), strict=True))
        table = grads.pop("table", None)
        covered_q = torch.zeros(out.shape[0], dtype=torch.bool)
        covered_k = torch.zeros(self.tensors["key"].shape[0], dtype=torch.bool)
        expected_table = torch.zeros(()) if table is None else torch.zeros_like(table, dtype=torch.float64)
        for problem, queries, keys in self.sequences():
            covered_q[queries], covered_k[keys] = True, True
            results = {"out": out[queries].transpose(0, 1).detach()}
            if lse is not None:
                results["lse"] = lse[queries].transpose(0, 1).detach()
            for name, grad in grads.items():
                rows = queries if name in ("query", "phi_q") else keys
                results[f"d{name}"] = grad[:, rows] if name.startswith("phi") else grad[rows].transpose(0, 1)
            oracle.assert_close_to_oracle(problem, oracle.Results(results), with_dlse=lse is not None)
            if table is not None:
                exact = oracle.truth(problem, with_dlse=lse is not None).results
                expected_table += exact["dtable"]
        if table is not None:  # a sum over sequences, each within its own bound
            u = oracle.UNIT_ROUNDOFF[out.dtype]
            error, size = (table - expected_table).norm(), expected_table.norm()
            assert error <= 16 * max(u, 2.0**-22) * size, f"dtable: error {error:.3g}, norm {size:.3g}"
        assert (out[~covered_q] == 0).all()
        for name, covered in (("query", covered_q), ("key", covered_k), ("value", covered_k)):
            assert name not in grads or (grads[name][~covered] == 0).all()


VARLEN = [
    VarlenCase("jagged", (17, 5, 33, 1), (17, 5, 33, 1), with_lse=True),
    VarlenCase("jagged-causal", (17, 5, 33, 1), (17, 5, 33, 1), options={"is_causal": True}),
    VarlenCase("lengths-differ", (17, 5), (9, 30), options={"is_causal": True, "causal_alignment": "bottom_right"}),
    VarlenCase("zero-length", (0, 7, 5, 0, 3, 0), (4, 7, 0, 0, 9, 0), with_lse=True),
    VarlenCase("window", (33, 20), (33, 20), options={"window": (5, 3)}),
    VarlenCase("gqa", (17, 9), (13, 11), heads=4, kv_heads=2, phi_k_heads=1),
    VarlenCase("table", (17, 26), (19, 14), table=9),
    VarlenCase("no-bias", (17, 26), (19, 14), rank=0),
]
