"""Heads of different rank in one call: tiers of heads that need as many packed columns, each launched on its own.

A kernel works through the columns of the widest head in every head, so that a head of rank 4 beside one of rank 100
takes half as long again as it would alone. Here heads are grouped by the columns that their ranks need, and each tier
is a call of its own to the same kernels: with its heads of every tensor, its factors as narrow as they may be, and none
at all where its ranks are 0. Heads that share keys stay together. Which columns stand beside each other in one tier is
chosen by the estimated time (`estimated_ms`); one tier for all is the call as it was.

Heads at equal distances are views, also of what is written; others are copied, and results brought back. Nothing waits
for the GPU. Packed factors are not handed from the forward to the backward pass: each tier packs its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbias.attention.hopper.configs import ready_columns
from flashbias.attention.packing import Handed
from flashbias.attention.registration import RANKS
from flashbias.constants import on_device

__all__ = ["Arguments", "Heads", "Tier", "backward", "forward", "tiers_of"]

SLOWDOWN = {0: 1.0, 16: 1.08, 32: 1.15, 64: 1.24, 128: 1.47, 256: 2.37}
"""Time of a forward pass over that without factors, by packed columns.

At 64, 128 and 256 the mean of the shapes in `benchmarks/results/h200/columns.txt`, which lie between 1.13 and 1.41,
1.39 and 1.59, 2.02 and 3.04; at 16 and 32 interpolated, not measured.
"""

FLOPS_PER_MS = 400e9
"""Assumed of a forward pass without factors."""

NARROWEST_HEAD = 64
"""Columns of queries and of values up to which the time of a head does not depend on them: exponentials decide."""

LAUNCH_MS = 0.05
"""Assumed of each launch beyond the first: some 10 µs of the GPU's time, more of the host's where nothing hides it."""

COPIED_PER_MS = 3e9
"""Bytes, assumed: of heads that do not lie at equal distances, which are read and written once more."""


class Arguments(NamedTuple):
    """The arguments that the operators share (`attention/registration.py`), by name."""

    query: Tensor
    key: Tensor
    value: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    table: Tensor | None
    code_q: Tensor | None
    code_k: Tensor | None
    attn_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    dropout_seed: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    ranks: Sequence[int]
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    dropout_p: float
    handed: Handed | None = None

    def of(self, tier: Tier) -> Arguments:
        """Those of the heads of a tier alone."""
        heads, kv_heads, rank = tier.heads, tier.kv_heads, tier.rank
        return self._replace(
            query=heads.of(self.query),
            key=kv_heads.of(self.key),
            value=kv_heads.of(self.value),
            phi_q=heads.of(self.phi_q[..., :rank]) if self.phi_q is not None and rank else None,
            phi_k=heads.of(self.phi_k[..., :rank]) if self.phi_k is not None and rank else None,
            table=_own(heads, self.table, -2),
            attn_mask=_own(heads, self.attn_mask, -3),
            ranks=tier.ranks,
            handed=None,
        )


@dataclass(frozen=True)
class Heads:
    """Some heads, in ascending order: a part of a tensor that has all of them in one dimension."""

    indices: tuple[int, ...]

    @functools.cached_property
    def run(self) -> slice | None:
        """The heads as a slice; None where they do not lie at equal distances."""
        first, last, count = self.indices[0], self.indices[-1], len(self.indices)
        step = max(1, (last - first) // max(1, count - 1))
        return slice(first, last + 1, step) if self.indices == tuple(range(first, last + 1, step)) else None

    def of(self, x: Tensor, dim: int = -3) -> Tensor:
        """These heads of x: a view where they lie at equal distances, else a copy.

        Args:
            x: any tensor with all heads.
            dim: where it has them, counted from the end.
        """
        if self.run is None:
            return x.index_select(dim, on_device(self.indices, x.device))
        return x[(..., self.run, *(slice(None),) * (-dim - 1))]

    def room(self, x: Tensor, dim: int = -3, *, is_dense: bool = False) -> Tensor:
        """Where kernels write these heads of a result x: in x itself if that is possible, else apart.

        Args:
            x: the result, of all heads.
            dim: where it has them, counted from the end.
            is_dense: whether they need a contiguous tensor.
        """
        if self.run is not None:
            place = self.of(x, dim)
            return place if place.is_contiguous() or not is_dense else x.new_empty(place.shape)
        shape = list(x.shape)
        shape[dim] = len(self.indices)
        return x.new_empty(shape)

    def put(self, x: Tensor, made: Tensor, dim: int = -3) -> None:
        """Bring what was written in `room` to its place in x, unless it is there."""
        if self.run is None:
            x.index_copy_(dim, on_device(self.indices, x.device), made)
            return
        place = self.of(x, dim)
        if place.data_ptr() != made.data_ptr():
            place.copy_(made)


def _own(heads: Heads, x: Tensor | None, dim: int) -> Tensor | None:
    """These heads of a tensor that may have one for all; x itself then."""
    return x if x is None or x.dim() < -dim or x.shape[dim] == 1 else heads.of(x, dim)


@dataclass(frozen=True)
class Tier:
    """Heads that are launched together.

    Args:
        heads: of queries.
        kv_heads: of keys and values.
        rank: the largest of the heads' ranks, and so the width of their factors; 0 where they have none.
        ranks: those of the heads, empty where all are `rank`.
    """

    heads: Heads
    kv_heads: Heads
    rank: int
    ranks: tuple[int, ...]


# -------------------------------------------------------------------- which heads stand together


class Form(NamedTuple):
    """What packed columns depend on beside the rank; in the order of `ready_columns`."""

    dtype_q: torch.dtype
    dtype_k: torch.dtype
    scale: float
    dtype: torch.dtype

    def columns(self, rank: int) -> int:
        """Packed columns of a head of a rank, 0 without factors."""
        return ready_columns(rank, *self) if rank else 0


class Size(NamedTuple):
    """What the time of a head depends on beside its columns.

    Args:
        pairs: scores of one head, of the whole batch.
        rows_q: queries of the whole batch.
        rows_k: keys of the whole batch.
        head_dim: width of queries and keys.
        head_dim_v: width of values.
        itemsize: bytes of an element of either.
    """

    pairs: float
    rows_q: int
    rows_k: int
    head_dim: int
    head_dim_v: int
    itemsize: int

    @property
    def head_ms(self) -> float:
        """Estimated time of one head without factors."""
        width = max(self.head_dim, NARROWEST_HEAD) + max(self.head_dim_v, NARROWEST_HEAD)
        return 2 * self.pairs * width / FLOPS_PER_MS

    def copies_ms(self, tier: Tier) -> float:
        """Estimated time in which queries, keys, values and output of a tier are copied, where they have to be."""
        rows = self.rows_q * len(tier.heads.indices) * (tier.heads.run is None)
        rows_kv = self.rows_k * len(tier.kv_heads.indices) * (tier.kv_heads.run is None)
        return 2 * (rows + rows_kv) * (self.head_dim + self.head_dim_v) * self.itemsize / COPIED_PER_MS


def tiers_of(arguments: Sequence[Any]) -> tuple[Tier, ...]:
    """Which heads are launched together.

    Args:
        arguments: those that the operators share.

    Returns:
        Tiers from the narrowest factors to the widest; none where the call is launched as it is.
    """
    if not arguments[RANKS]:
        return ()
    shared = Arguments(*arguments)
    query, key, phi_q, phi_k = shared.query, shared.key, shared.phi_q, shared.phi_k
    num_heads = query.shape[-3]
    if phi_q is None or phi_k is None or not len(shared.ranks) == phi_q.shape[-3] == phi_k.shape[-3] == num_heads:
        return ()
    form = Form(phi_q.dtype, phi_k.dtype, shared.scale, query.dtype)
    return decided(tuple(shared.ranks), num_heads // key.shape[-3], phi_q.shape[-1], form, _size(shared))


def _size(shared: Arguments) -> Size:
    """Of a packed batch sequences count as equally long: their lengths stay on the GPU."""
    query, value = shared.query, shared.value
    (seqlen_q, head_dim), (seqlen_k, head_dim_v) = query.shape[-2:], value.shape[-2:]
    sequences = 1 if shared.cu_seqlens_k is None else max(1, shared.cu_seqlens_k.shape[0] - 1)
    batch = query.shape[:-3].numel()
    seen = _seen(seqlen_k / sequences, shared.window_left, shared.window_right)
    return Size(batch * seqlen_q * seen, batch * seqlen_q, batch * seqlen_k, head_dim, head_dim_v, query.itemsize)


def _seen(seqlen_k: float, left: int, right: int) -> float:
    """About how many keys a query sees: half of those on a side that is cut, at most those of a window."""
    if left < 0 and right < 0:
        return seqlen_k
    if left < 0 or right < 0:
        return min(seqlen_k, seqlen_k / 2 + max(left, right))
    return min(seqlen_k, left + right + 1)


@functools.lru_cache(maxsize=256)
def decided(ranks: tuple[int, ...], group: int, rank: int, form: Form, size: Size) -> tuple[Tier, ...]:
    """The tiers that take the least time, by estimate.

    Args:
        ranks: of the heads of queries.
        group: heads that share keys.
        rank: width of the factors as given.
        form: what packed columns depend on.
        size: what times depend on.

    Returns:
        As `tiers_of`.
    """
    best = min(divisions(ranks, group, form), key=lambda tiers: estimated_ms(tiers, form, size))
    is_plain = len(best) == 1 and form.columns(best[0].rank) == form.columns(rank)
    return () if is_plain else best


def divisions(ranks: tuple[int, ...], group: int, form: Form) -> list[tuple[Tier, ...]]:
    """All ways to divide heads into tiers of neighbouring widths, from the one tier on that has all of them."""
    widest = [max(ranks[first : first + group]) for first in range(0, len(ranks), group)]
    columns = [form.columns(rank) for rank in widest]
    levels = [[head for head, own in enumerate(columns) if own == width] for width in sorted(set(columns))]
    found = []
    for cuts in itertools.product((False, True), repeat=len(levels) - 1):
        parts = [list(levels[0])]
        for is_cut, level in zip(cuts, levels[1:], strict=True):
            parts = [*parts, level] if is_cut else [*parts[:-1], parts[-1] + level]
        found.append(tuple(_tier(sorted(part), ranks, group) for part in parts))
    return found


def _tier(kv_heads: list[int], ranks: tuple[int, ...], group: int) -> Tier:
    heads = tuple(kv_head * group + member for kv_head in kv_heads for member in range(group))
    own = tuple(ranks[head] for head in heads)
    return Tier(Heads(heads), Heads(tuple(kv_heads)), max(own), own if len(set(own)) > 1 else ())


def estimated_ms(tiers: Sequence[Tier], form: Form, size: Size) -> float:
    """Time of a forward pass by tiers: products and exponentials, copies, and what each launch costs."""
    work = sum(len(tier.heads.indices) * SLOWDOWN[form.columns(tier.rank)] for tier in tiers)
    return size.head_ms * work + sum(map(size.copies_ms, tiers)) + LAUNCH_MS * len(tiers)


# -------------------------------------------------------------------- both passes


def forward(launch: Callable[..., None], out: Tensor, lse: Tensor, *arguments: Any) -> None:
    """Fill `out` and `lse`, tier by tier.

    Args:
        launch: fills them for all of the heads that it is given, by the same arguments.
        out: `[*batch, H, N, head_dim_v]`.
        lse: `[*batch, H, N]`, contiguous.
        *arguments: those that the operators share.
    """
    tiers = tiers_of(arguments)
    if not tiers:
        launch(out, lse, *arguments)
        return
    shared = Arguments(*arguments)
    for tier in tiers:
        own_out, own_lse = tier.heads.room(out), tier.heads.room(lse, -2, is_dense=True)
        launch(own_out, own_lse, *shared.of(tier))
        tier.heads.put(out, own_out)
        tier.heads.put(lse, own_lse, -2)


def backward(
    launch: Callable[..., None],
    grads: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    needs_grad: Sequence[bool],
    *arguments: Any,
) -> None:
    """Fill the gradients that are needed, tier by tier.

    Args:
        launch: fills them for all of the heads that it is given, by the same arguments.
        grads: as in the portable `launch`; those of factors and of a table are contiguous.
        dout: gradient of the output.
        dlse: gradient of the log-sum-exp, or None.
        out: output of the forward pass, or None.
        lse: log-sum-exp of the forward pass, contiguous.
        needs_grad: which gradients are needed.
        *arguments: those that the operators share.
    """
    tiers = tiers_of(arguments)
    if not tiers:
        launch(grads, dout, dlse, out, lse, needs_grad, *arguments)
        return
    shared = Arguments(*arguments)
    for which in (3, 4):
        if needs_grad[which]:
            grads[which].zero_()  # columns that a head lacks
    # Of one table for all heads each tier makes a part of the gradient.
    has_sums = needs_grad[5] and grads[5].shape[0] < shared.query.shape[-3]
    sums = grads[5].new_zeros((len(tiers), *grads[5].shape), dtype=torch.float64) if has_sums else None
    for n, tier in enumerate(tiers):
        heads = tier.heads
        needs = (*needs_grad[:3], *(need and tier.rank > 0 for need in needs_grad[3:5]), needs_grad[5])
        if not any(needs):
            continue
        wholes = grads if sums is None else [*grads[:5], sums[n]]
        parts = [part if need else None for part, need in zip(_gradients(wholes, tier), needs, strict=True)]
        made = [dout.new_empty(0) if part is None else part.room() for part in parts]
        launch(
            made, heads.of(dout), None if dlse is None else heads.of(dlse, -2), None if out is None else heads.of(out),
            heads.of(lse, -2).contiguous(), needs, *shared.of(tier),
        )  # fmt: skip
        for part, own in zip(parts, made, strict=True):
            if part is not None:
                part.put(own)
    if sums is not None:
        grads[5].copy_(sums.sum(0))


class Gradient(NamedTuple):
    """Some heads of a gradient.

    Args:
        whole: of all heads.
        heads: which.
        dim: where it has heads, counted from the end.
        is_dense: whether kernels need a contiguous tensor.
    """

    whole: Tensor
    heads: Heads
    dim: int = -3
    is_dense: bool = True

    def room(self) -> Tensor:
        """Where kernels write it."""
        return self.heads.room(self.whole, self.dim, is_dense=self.is_dense)

    def put(self, made: Tensor) -> None:
        """Bring it to its place."""
        self.heads.put(self.whole, made, self.dim)


def _gradients(grads: Sequence[Tensor], tier: Tier) -> tuple[Gradient, ...]:
    """What a tier fills of the gradients of query, key, value, phi_q, phi_k and the table."""
    heads, kv_heads = tier.heads, tier.kv_heads
    query, key, value, phi_q, phi_k, table = grads
    return (
        Gradient(query, heads, is_dense=False),
        Gradient(key, kv_heads, is_dense=False),
        Gradient(value, kv_heads, is_dense=False),
        Gradient(phi_q[..., : tier.rank], heads),
        Gradient(phi_k[..., : tier.rank], heads),
        Gradient(table, Heads((0,)) if table.shape[0] == 1 else heads, dim=-2),
    )
