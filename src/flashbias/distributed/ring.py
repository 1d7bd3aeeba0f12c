"""Ring attention: queries stay, keys, values and phi_k go round, and every rank merges what it has seen.

With P ranks, a rank attends at step t to the keys of rank `cp_rank - t`, while the keys of the next step are on their
way. Backward, keys go round once more; their gradients are added up on the way and come home after P hops.

Memory per rank: its own shard, two parcels of keys in flight, and backward the gradients of two parcels in float32:
O(n (head_dim + rank)), whatever the length of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashbias.attention.block import attention_block, attention_block_backward, row_reference
from flashbias.attention.block.gradients import BlockGradients
from flashbias.attention.call import INPUTS, Call, VarlenLayout, lse_dtype
from flashbias.distributed.exchange import Hop
from flashbias.distributed.merge import Merged
from flashbias.distributed.parcel import Parcel
from flashbias.distributed.shard import Layout
from flashbias.distributed.tiles import Mask, Tile, tiles
from flashbias.distributed.topology import Circle
from flashbias.factored import FactoredBias

__all__ = ["Plan", "ring_attention"]


@dataclass(frozen=True)
class Plan:
    """What stays the same through a pass of the ring. It holds no tensor, so it may outlive the forward pass.

    Args:
        circle: who takes part.
        layout: which tokens each of them holds.
        mask: which pairs are seen.
        scale: factor of the dot products.
        deterministic: as in `flashbias.attention`.
        ranks: columns of each head, as in `FactoredBias`.
        impl: as in `attention_block`.
    """

    circle: Circle
    layout: Layout
    mask: Mask
    scale: float
    deterministic: bool
    ranks: tuple[int, ...] | None
    impl: str

    def source(self, step: int) -> int:
        """Whose keys are here at a step."""
        return (self.circle.rank - step) % self.circle.size

    def tiles(self, source: int) -> list[Tile]:
        """What this rank's queries see of a rank's keys."""
        return tiles(self.layout, self.circle.rank, source, self.mask)


@dataclass(frozen=True)
class _Queries:
    """What stays on a rank."""

    query: Tensor
    phi_q: Tensor | None
    table: Tensor | None
    code_q: Tensor | None


@dataclass(frozen=True)
class _Keys:
    """What goes round."""

    key: Tensor
    value: Tensor
    phi_k: Tensor | None
    code_k: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order of a message."""
        return [x for x in (self.key, self.value, self.phi_k, self.code_k) if x is not None]

    def holding(self, tensors: Sequence[Tensor]) -> _Keys:
        """The same kind of keys, with the tensors of a message."""
        rest = iter(tensors)
        own = (self.key, self.value, self.phi_k, self.code_k)
        return _Keys(*(None if x is None else next(rest) for x in own))  # pyright: ignore[reportArgumentType]

    def parcel(self, length: int) -> Parcel:
        """The message of a rank that holds so many tokens."""
        shapes = [(length,) if x is self.code_k else (*x.shape[:-2], length, x.shape[-1]) for x in self.tensors()]
        return Parcel(tuple(shapes), tuple(x.dtype for x in self.tensors()))


def ring_attention(plan: Plan, call: Call) -> tuple[Tensor, Tensor]:
    """Attend to the keys of all ranks.

    Args:
        plan: who takes part, and how.
        call: this rank's queries, keys, values and bias; a table has codes.

    Returns:
        Output `[*batch, H, n, head_dim_v]` in the queries' dtype and the log-sum-exp `[*batch, H, n]`, float32 (float64
        beside float64), both differentiable once.

    Raises:
        RankError: a neighbour did not answer.
    """
    bias = call.bias
    has_factors = bias is not None and bias.rank > 0
    codes = bias.codes() if bias is not None and bias.table is not None else (None, None)
    return _RingAttention.apply(  # pyright: ignore[reportReturnType]
        plan,
        call.query,
        call.key,
        call.value,
        bias.phi_q if bias is not None and has_factors else None,
        bias.phi_k if bias is not None and has_factors else None,
        None if bias is None else bias.table,
        *codes,
    )


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        queries, keys = _sides(tensors)
        merged = Merged(queries.query, keys.value.shape[-1])
        for step, visiting in _circulate(plan, keys, "forward"):
            for tile in plan.tiles(plan.source(step)):
                merged.add(tile.queries, *attention_block(_block(plan, tile, queries, visiting), plan.impl))
        # Where this rank has met no key, the sums are still zeros that take no memory.
        out = merged.out.to(queries.query.dtype).contiguous()
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, merged.lse)
        return out, merged.lse.to(lse_dtype(queries.query.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        needs_grad = ctx.needs_input_grad[1:7]
        grads = _Backward(ctx.plan, tensors, out, lse, dout, dlse, needs_grad).run()
        found = (getattr(grads, name) for name in INPUTS)
        inputs = [
            None if grad is None or x is None else grad.to(x.dtype) for grad, x in zip(found, tensors[:6], strict=True)
        ]
        return None, *inputs, None, None


def _sides(tensors: Sequence[Any]) -> tuple[_Queries, _Keys]:
    query, key, value, phi_q, phi_k, table, code_q, code_k = tensors
    return _Queries(query, phi_q, table, code_q), _Keys(key, value, phi_k, code_k)


def _circulate(plan: Plan, keys: _Keys, phase: str) -> Iterator[tuple[int, _Keys]]:
    """The keys of every rank in turn, one's own first; the next are on their way while these are used."""
    size = plan.circle.size
    message = keys.parcel(keys.key.shape[-2]).pack(keys.tensors()) if size > 1 else None
    for step in range(size):
        hop = None
        if message is not None and step + 1 < size:
            parcel = keys.parcel(plan.layout.sizes[plan.source(step + 1)])
            name = f"keys and values, step {step + 1} of {size - 1}, {phase}"
            hop = Hop(plan.circle, message, parcel.empty(message.device), "keys", name)
        yield step, keys if step == 0 else keys.holding(_unpacked(plan, keys, message, step))
        if hop is not None:
            message = hop.wait()


def _unpacked(plan: Plan, keys: _Keys, message: Tensor | None, step: int) -> list[Tensor]:
    assert message is not None
    return keys.parcel(plan.layout.sizes[plan.source(step)]).unpack(message)


def _block(plan: Plan, tile: Tile, queries: _Queries, keys: _Keys) -> Call:
    """The attention of one tile."""
    query, key, value = queries.query[..., tile.queries, :], *(x[..., tile.keys, :] for x in (keys.key, keys.value))
    bias = None
    if queries.table is not None or queries.phi_q is not None:
        phi_q, phi_k = queries.phi_q, keys.phi_k
        if phi_q is None or phi_k is None:  # rank 0: a table and nothing else
            assert queries.table is not None
            phi_q, phi_k = (queries.table.new_zeros(1, x.shape[-2], 0) for x in (queries.query, keys.key))
        bias = FactoredBias(
            phi_q[..., tile.queries, :],
            phi_k[..., tile.keys, :],
            queries.table,
            None if queries.code_q is None else queries.code_q[tile.queries],
            None if keys.code_k is None else keys.code_k[tile.keys],
            plan.ranks,
        )
    return Call(
        query=query,
        key=key,
        value=value,
        bias=bias,
        attn_mask=None,
        window_left=tile.left,
        window_right=tile.right,
        bottom_right=False,
        scale=plan.scale,
        dropout_p=0.0,
        deterministic=plan.deterministic,
        return_lse=True,
        varlen=None if tile.documents is None else _packed(tile.documents, query.device),
    )


def _packed(bounds: tuple[int, ...], device: torch.device) -> VarlenLayout:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(bounds))
    return VarlenLayout(cu_seqlens, cu_seqlens, longest, longest)


# -------------------------------------------------------------------- backward


class _Backward:
    """One backward pass: gradients of queries gather here, those of keys travel with the keys."""

    def __init__(
        self,
        plan: Plan,
        tensors: Sequence[Any],
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        needs_grad: Sequence[bool],
    ) -> None:
        self.plan, self.needs_grad = plan, tuple(needs_grad)
        self.queries, self.keys = _sides(tensors)
        self.dtype = lse_dtype(out.dtype)
        self.lse, self.dout, self.dlse = lse, dout, dlse
        self.delta = (dout.to(self.dtype) * out.to(self.dtype)).sum(-1)
        if dlse is not None:
            self.delta = self.delta - dlse
        need_q, _, _, need_phi_q, _, need_table = self.needs_grad
        self.here = BlockGradients(
            query=self._zeros(self.queries.query, need_q),
            phi_q=self._zeros(self.queries.phi_q, need_phi_q),
            table=self._zeros(self.queries.table, need_table),
        )
        self.reference = self._reference() if need_phi_q and self.queries.phi_q is not None else None

    def run(self) -> BlockGradients:
        """Go round once."""
        size, homing = self.plan.circle.size, None
        travelling: list[Tensor] = []
        for step, visiting in _circulate(self.plan, self.keys, "backward"):
            source = self.plan.source(step)
            found = [(tile, self._tile(tile, visiting, step)) for tile in self.plan.tiles(source)]
            parcel = self._parcel(source)
            # What this rank adds was worked out while the sums of the ranks before were on their way.
            message = parcel.empty(self.dout.device).zero_() if homing is None else homing.wait()
            travelling = parcel.unpack(message)
            for tile, grads in found:
                self._add(tile, grads, travelling)
            if size > 1 and any(self._travels()):
                buffer = self._parcel(self.plan.source(step + 1)).empty(message.device)
                name = f"gradients of keys and values, step {step + 1} of {size}"
                homing = Hop(self.plan.circle, message, buffer, "gradients", name)
        if homing is not None:
            travelling = self._parcel(self.plan.circle.rank).unpack(homing.wait())
        return self._home(travelling)

    def _tile(self, tile: Tile, visiting: _Keys, step: int) -> BlockGradients:
        block = _block(self.plan, tile, self.queries, visiting)
        rows = tile.queries
        # The reference is that of the whole shard's own keys: a tile of just these need not be told.
        is_reference = step == 0 and tile.keys == rows == slice(0, self.queries.query.shape[-2])
        reference = None if is_reference or self.reference is None else self.reference[..., rows, :]
        return attention_block_backward(
            block,
            self.dout[..., rows, :],
            self.lse[..., rows],
            self.delta[..., rows],
            self.needs_grad,
            reference,
            self.plan.impl,
        )

    def _add(self, tile: Tile, grads: BlockGradients, travelling: list[Tensor]) -> None:
        for total, part in ((self.here.query, grads.query), (self.here.phi_q, grads.phi_q)):
            if total is not None and part is not None:
                total[..., tile.queries, :] += part
        if self.here.table is not None and grads.table is not None:
            self.here.table += grads.table
        wanted = (
            grad for grad, goes in zip((grads.key, grads.value, grads.phi_k), self._travels(), strict=True) if goes
        )
        for total, part in zip(travelling, wanted, strict=True):
            assert part is not None
            total[..., tile.keys, :] += part

    def _home(self, travelling: list[Tensor]) -> BlockGradients:
        """All gradients of this rank's inputs."""
        rest = iter(travelling)
        key, value, phi_k = (next(rest) if goes else None for goes in self._travels())
        phi_q = self.here.phi_q
        if phi_q is not None and self.reference is not None and self.dlse is not None:
            # Over all blocks, rows of dS sum to dlse.
            step = self.reference.to(self.dtype) * self.dlse[..., None]
            if self.plan.ranks is not None:
                columns = torch.arange(phi_q.shape[-1], device=phi_q.device)
                own = torch.tensor(self.plan.ranks, device=phi_q.device)
                step = step * (columns < own[:, None])[:, None, :]
            phi_q = phi_q + step.sum_to_size(phi_q.shape)
        return replace(self.here, key=key, value=value, phi_q=phi_q, phi_k=phi_k)

    def _reference(self) -> Tensor | None:
        """What phi_k is measured from in dphi_q, the same for all tiles of a row: see `attention/block/`."""
        phi_q, length = self.queries.phi_q, self.queries.query.shape[-2]
        assert phi_q is not None
        everything = slice(0, length)
        whole = _block(self.plan, Tile(everything, everything), self.queries, self.keys)
        own = row_reference(whole, self.plan.impl)
        if own is not None and self.plan.mask.documents is not None:
            return torch.zeros_like(own)  # packed batches are not centred
        return own

    def _travels(self) -> tuple[bool, bool, bool]:
        """Which gradients of keys go round: of key, value, phi_k."""
        _, need_k, need_v, _, need_phi_k, _ = self.needs_grad
        return need_k, need_v, need_phi_k and self.keys.phi_k is not None

    def _parcel(self, source: int) -> Parcel:
        """The gradients that travel with a rank's keys."""
        tensors = (self.keys.key, self.keys.value, self.keys.phi_k)
        shapes = [
            (*x.shape[:-2], self.plan.layout.sizes[source], x.shape[-1])
            for x, goes in zip(tensors, self._travels(), strict=True)
            if goes and x is not None
        ]
        return Parcel(tuple(shapes), (self.dtype,) * len(shapes))

    def _zeros(self, x: Tensor | None, need: bool) -> Tensor | None:
        return None if x is None or not need else torch.zeros_like(x, dtype=torch.promote_types(self.dtype, x.dtype))
