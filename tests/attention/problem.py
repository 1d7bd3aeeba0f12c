"""One attention problem: a named description (`Case`) and the tensors made from it (`Problem`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import flashbias as fb

LEAVES = ("query", "key", "value", "phi_q", "phi_k", "table")


@dataclass(frozen=True)
class Case:
    """A shape worth testing. Leading sizes of factors and masks include the head dimension."""

    name: str
    batch: tuple[int, ...] = (2,)
    heads: int = 2
    kv_heads: int | None = None
    n: int = 33
    m: int | None = None
    head_dim: int = 16
    head_dim_v: int | None = None
    rank: int = 5
    phi_q: tuple[int, ...] | None = None  # default [1, H]
    phi_k: tuple[int, ...] | None = None
    same_dtype: bool = False  # factors in the queries' dtype; else float32
    ranks: tuple[int, ...] | None = None
    table: int | str | None = None  # T, or "toeplitz"
    table_heads: int | None = None
    codes: str | None = None  # "window": codes of a 2-D window
    mask: str | None = None
    layout: str = "contiguous"
    size: float = 1.0  # standard deviation of queries and keys
    bias_size: float = 1.0
    fixed: bool = False  # the lengths are the point: never stretched
    core: bool = False  # run in more than one dtype even where runs are slow
    slow: bool = False  # not run where runs are slow
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def seqlen_k(self) -> int:
        return self.n if self.m is None else self.m

    def stretched(self, factor: int) -> Case:
        """The same case with longer sequences, for machines that work in larger tiles."""
        if self.fixed or factor == 1:
            return self

        def longer(length: int) -> int:
            return length if length < 8 else factor * length - 1

        options = dict(self.options)
        if "window" in options:
            options["window"] = tuple(w and factor * w for w in options["window"])
        return replace(self, n=longer(self.n), m=longer(self.seqlen_k), options=options)

    def build(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Problem:
        """Draw the tensors, always the same ones."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        n, m, heads, kv_heads = self.n, self.seqlen_k, self.heads, self.kv_heads or self.heads
        dv = self.head_dim_v or self.head_dim
        shapes = {
            "query": (*self.batch, heads, n, self.head_dim),
            "key": (*self.batch, kv_heads, m, self.head_dim),
            "value": (*self.batch, kv_heads, m, dv),
        }
        factor_dtype = dtype if self.same_dtype else torch.promote_types(dtype, torch.float32)
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            size = 1.0 if name == "value" else self.size
            tensors[name] = _laid_out((size * draw(*shape)).to(device, dtype), self.layout)
        size = (self.bias_size / max(self.rank, 1) ** 0.5) ** 0.5
        tensors["phi_q"] = (size * draw(*(self.phi_q or (1, heads)), n, self.rank)).to(factor_dtype)
        tensors["phi_k"] = (size * draw(*(self.phi_k or (1, heads)), m, self.rank)).to(factor_dtype)
        if self.table is not None:
            entries = n + m - 1 + (n + m) % 2 if self.table == "toeplitz" else int(self.table)
            tensors["table"] = draw(self.table_heads or heads, entries)
        code_q, code_k = (_window_codes(n), _window_codes(m)) if self.codes == "window" else (None, None)
        return Problem(
            case=self,
            tensors={name: tensor.to(device) for name, tensor in tensors.items()},
            code_q=None if code_q is None else code_q.to(device),
            code_k=None if code_k is None else code_k.to(device),
            attn_mask=_mask(self, generator, device),
            dout=draw(*self.batch, heads, n, dv).to(device, dtype),
            dlse=draw(*self.batch, heads, n).to(device),
        )


@dataclass
class Problem:
    """The tensors of a case, and what it means to run it."""

    case: Case
    tensors: dict[str, Tensor]
    code_q: Tensor | None
    code_k: Tensor | None
    attn_mask: Tensor | None
    dout: Tensor
    dlse: Tensor

    @property
    def scale(self) -> float:
        return self.case.options.get("scale", self.case.head_dim**-0.5)

    @property
    def options(self) -> dict[str, Any]:
        options = dict(self.case.options)
        if self.case.kv_heads is not None:
            options["enable_gqa"] = True
        if self.attn_mask is not None:
            options["attn_mask"] = self.attn_mask
        return options

    def leaves(self, wanted: tuple[str, ...] = LEAVES) -> dict[str, Tensor]:
        """Views of the tensors that ask for gradients; the memory layout stays what it is."""
        return {name: x.detach().requires_grad_(name in wanted) for name, x in self.tensors.items()}

    def bias(self, leaves: dict[str, Tensor]) -> fb.FactoredBias | None:
        if self.case.rank == 0 and self.case.table is None:
            return None
        table = leaves.get("table")
        return fb.FactoredBias(leaves["phi_q"], leaves["phi_k"], table, self.code_q, self.code_k, self.case.ranks)

    def attend(self, impl: str, leaves: dict[str, Tensor], **options: Any) -> Any:
        """Run the library on the leaves."""
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        return fb.attention(query, key, value, self.bias(leaves), impl=impl, **self.options | options)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory order, which `Tensor.to` need not keep where it converts."""
    if layout == "transposed":  # [B, N, H, D], as projections leave it
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":  # a slice of something wider, with an odd row stride
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 3)
        wide[..., 1 : 1 + x.shape[-1]] = x
        return wide[..., 1 : 1 + x.shape[-1]]
    if layout == "framed":  # columns of something wider, NaN beside them, with rows that the copy engine can address
        wide = x.new_full((*x.shape[:-1], 8 + x.shape[-1] + 64), torch.nan)
        wide[..., 8 : 8 + x.shape[-1]] = x
        return wide[..., 8 : 8 + x.shape[-1]]
    if layout == "columns":  # the last dimension is the slow one
        return x.mT.contiguous().mT
    if layout == "expanded":  # one batch element for all
        return x[:1].expand(x.shape)
    assert layout == "contiguous"
    return x


def _window_codes(length: int) -> Tensor:
    """Codes `y * (2W - 1) + x` of the positions in a window of width W."""
    width = max(1, round(length**0.5))
    index = torch.arange(length)
    return index // width * (2 * width - 1) + index % width


def _mask(case: Case, generator: torch.Generator, device: str) -> Tensor | None:
    if case.mask is None:
        return None
    n, m = case.n, case.seqlen_k
    if case.mask == "padding":  # the last keys of each batch element but the first are padding
        lengths = m - torch.arange(case.batch[0]) * (m // 3)
        keep = torch.arange(m) < lengths[:, None]
        keep = keep.reshape(case.batch[0], *(1,) * (len(case.batch) + 1), m)
    elif case.mask == "heads":  # each head has keys of its own, the same for all queries
        keep = torch.rand(*case.batch, case.heads, 1, m, generator=generator) > 0.4
    elif case.mask == "matrix":  # one for all
        keep = torch.rand(n, m, generator=generator) > 0.4
    elif case.mask == "full":
        keep = torch.rand(*case.batch, case.heads, n, m, generator=generator) > 0.4
    elif case.mask == "dead rows":  # every third row attends to nothing
        keep = torch.rand(*case.batch, 1, n, m, generator=generator) > 0.4
        keep[..., ::3, :] = False
    else:
        raise AssertionError(case.mask)
    return keep.to(device)
