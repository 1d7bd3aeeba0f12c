"""One attention problem over a whole sequence, its float64 truth, and its parts."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tests.distributed.ranks import Place
from torch import Tensor

import flashbias as fb
import flashbias.distributed as cp

LEAVES = ("query", "key", "value", "phi_q", "phi_k", "table")
ROWS = ("query", "key", "value", "phi_q", "phi_k")
"""Leaves that are cut among ranks; the table is held by all."""


@dataclass(frozen=True)
class Case:
    """A shape, and how ranks share it. Leading sizes of factors include the head dimension."""

    name: str
    n: int = 26
    batch: tuple[int, ...] = (2,)
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 4
    head_dim_v: int = 4
    rank: int = 3
    phi_q: tuple[int, ...] = (12,)
    phi_k: tuple[int, ...] = (1,)
    table: tuple[int, int] | None = None
    codes: bool = False
    ranks: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None  # of contiguous shards; default as `shard` cuts
    with_dlse: bool = False
    frozen: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """The leaves, the gradients of the results, and codes: always the same ones."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        n, wide = self.n, torch.promote_types(self.dtype, torch.float32)
        tensors = {
            "query": draw(*self.batch, self.heads, n, self.head_dim).to(self.dtype),
            "key": draw(*self.batch, self.kv_heads, n, self.head_dim).to(self.dtype),
            "value": draw(*self.batch, self.kv_heads, n, self.head_dim_v).to(self.dtype),
            "dout": draw(*self.batch, self.heads, n, self.head_dim_v).to(self.dtype),
            "dlse": draw(*self.batch, self.heads, n).to(wide),
        }
        if self.rank:
            tensors["phi_q"] = draw(*self.phi_q, n, self.rank).to(wide)
            # Far from zero, as positions are: what centring is for.
            tensors["phi_k"] = (5.0 + draw(*self.phi_k, n, self.rank)).to(wide)
        if self.table is not None:
            tensors["table"] = draw(*self.table).to(wide)
            if self.codes:
                tensors["code_q"] = torch.randint(0, 9, (n,), generator=generator)
                tensors["code_k"] = torch.randint(0, 9, (n,), generator=generator)
        return tensors

    def bias(self, tensors: dict[str, Tensor]) -> fb.FactoredBias | None:
        if not self.rank and self.table is None:
            return None
        table = tensors.get("table")
        if not self.rank:
            assert table is not None
            empty = [table.new_zeros(1, tensors[name].shape[-2], 0) for name in ("query", "key")]
            return fb.FactoredBias(*empty, table, tensors.get("code_q"), tensors.get("code_k"), self.ranks)
        return fb.FactoredBias(
            tensors["phi_q"], tensors["phi_k"], table, tensors.get("code_q"), tensors.get("code_k"), self.ranks
        )

    def leaves(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, asking for gradients."""
        return {
            name: x.detach().clone().requires_grad_(name in LEAVES and name not in self.frozen)
            for name, x in tensors.items()
        }


def gradients(case: Case, leaves: dict[str, Tensor], out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """Results by name."""
    loss = (out * leaves["dout"]).sum()
    if case.with_dlse:
        loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * leaves["dlse"]).sum()
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, tuple(wanted.values()))
    results = {"out": out, "lse": lse} | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def truth(case: Case) -> dict[str, Tensor]:
    """What one process finds, in float64, through the dense matrix and autograd."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors().items()}
    leaves = case.leaves(wide)
    options = {key: case.options[key] for key in ("is_causal", "window", "scale") if key in case.options}
    if case.documents is None:
        out, lse = fb.attention(
            leaves["query"], leaves["key"], leaves["value"], case.bias(leaves), impl="reference", return_lse=True,
            enable_gqa=True, **options,
        )  # fmt: skip
    else:
        out, lse = _by_document(case, leaves, options)
    return gradients(case, leaves, out, lse)


def _by_document(case: Case, leaves: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Each document by itself; a table without codes is read by positions within it."""
    assert case.documents is not None
    outs, lses = [], []
    for start, stop in zip(case.documents, case.documents[1:], strict=False):
        part = {
            name: x[..., start:stop, :] if name in ROWS else x[start:stop] if name.startswith("code") else x
            for name, x in leaves.items()
        }
        if stop > start:
            out, lse = fb.attention(
                part["query"], part["key"], part["value"], case.bias(part), impl="reference", return_lse=True,
                enable_gqa=True, **options,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def layout_of(case: Case, size: int) -> cp.Layout:
    """Which rank holds what."""
    if case.sizes is not None:
        return cp.Layout.of_sizes(case.sizes)
    return cp.Layout.of(case.n, size, case.options.get("order", "contiguous"))


def part_of(case: Case, tensors: dict[str, Tensor], layout: cp.Layout, rank: int) -> dict[str, Tensor]:
    """A rank's part of every tensor."""
    dims = {"dlse": -1, "lse": -1, "code_q": 0, "code_k": 0}
    return {
        name: x if name.endswith("table") else layout.cut(x, rank, dims.get(name, -2)) for name, x in tensors.items()
    }


def solve(
    place: Place, case: Case, mesh_shape: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """One rank's part, through the ranks: its results, and the bytes that it sent."""
    layout = layout_of(case, place.size)
    own = part_of(case, case.tensors(), layout, place.rank)
    leaves = case.leaves({name: x.to(place.device) for name, x in own.items()})
    where: dict[str, Any] = {"group": place.group}
    if mesh_shape is not None:
        where = {"mesh": grid(place, mesh_shape)}
    if case.documents is not None:
        where["cu_seqlens"] = torch.tensor(case.documents, dtype=torch.int32)
    with cp.count_traffic() as traffic:
        out, lse = cp.context_parallel_attention(
            leaves["query"], leaves["key"], leaves["value"], case.bias(leaves), enable_gqa=True, return_lse=True,
            **where, **case.options,
        )  # fmt: skip
        results = gradients(case, leaves, out, lse)
    return {name: x.cpu() for name, x in results.items()}, dict(traffic.sent)


def solve_all(place: Place, cases: list[Case], mesh_shape: tuple[int, int] | None = None) -> list[dict[str, Tensor]]:
    """One rank's parts of several problems, one after the other."""
    return [solve(place, case, mesh_shape)[0] for case in cases]


_meshes: dict[tuple[int, ...], Any] = {}


def grid(place: Place, shape: tuple[int, ...]) -> Any:
    """A mesh over the first ranks, made once."""
    from torch.distributed.device_mesh import DeviceMesh

    if shape not in _meshes:
        names = ("ring", "heads")[-len(shape) :]
        _meshes[shape] = DeviceMesh(place.device.type, torch.arange(place.size).reshape(shape), mesh_dim_names=names)
    return _meshes[shape]


def assert_equal(case: Case, parts: list[dict[str, Tensor]], tolerance: float) -> None:
    """Every rank's part is that of the truth; every rank holds all of the table's gradient."""
    whole = truth(case)
    layout = layout_of(case, len(parts))
    for rank, found in enumerate(parts):
        right = part_of(case, whole, layout, rank)
        assert found.keys() == right.keys()
        for name, x in found.items():
            scale = max(1.0, torch.where(whole[name].isfinite(), whole[name], 0.0).norm().item())
            assert x.shape == right[name].shape, name
            assert torch.equal(x.isinf(), right[name].isinf()), name
            difference = torch.where(right[name].isinf(), 0.0, x.double() - right[name])
            error = difference.norm().item() / scale
            assert error <= tolerance, f"{case}, rank {rank}: {name} is off by {error:.2g}"
