"""A block of keys by dense scores of some rows, `BLOCK_SCORES` numbers at once: for CPUs, and what no kernel does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from flashbias.attention.block.centring import own_columns, own_rows, reference_of, row_constant
from flashbias.attention.block.gradients import BlockGradients
from flashbias.attention.call import Call, inputs_of, lse_dtype, visible

__all__ = ["backward", "forward"]

BLOCK_SCORES = 1 << 22
"""Scores that are held at once."""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output of the block, and the log-sum-exp of its full scores in float64."""
    outs, lses = zip(*(_sequence_forward(part) for part, _, _ in _sequences(call)), strict=True)
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)


def backward(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs_grad: Sequence[bool], reference: Tensor | None
) -> BlockGradients:
    """What the block adds to each gradient; arguments as in `attention_block_backward`."""
    grads = _zeros(call, needs_grad)
    if reference is None and call.varlen is not None and call.bias is not None:
        # Sequences are centred one by one; the batch as a whole is measured from zero.
        reference = call.query.new_zeros(call.seqlen_q, call.bias.rank)
    with torch.autocast(call.query.device.type, enabled=False):
        for part, rows, keys in _sequences(call):
            if not part.is_empty:
                own = grads if call.varlen is None else _parts(grads, rows, keys)
                where = None if reference is None else reference[..., rows, :]
                _add_sequence(own, part, dout[..., rows, :], lse[..., rows], delta[..., rows], where)
    return grads


def _sequences(call: Call) -> Iterator[tuple[Call, slice, slice]]:
    """The sequences of a packed batch with their rows and keys; a call without a layout is one sequence."""
    if call.varlen is None:
        yield call, slice(None), slice(None)
        return
    layout = call.varlen
    bounds_q, bounds_k = (pairwise(cu.tolist()) for cu in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    for (q0, q1), (k0, k1) in zip(bounds_q, bounds_k, strict=True):
        rows, keys = slice(q0, q1), slice(k0, k1)
        bias = call.bias
        part = replace(
            call,
            query=call.query[..., rows, :],
            key=call.key[..., keys, :],
            value=call.value[..., keys, :],
            bias=None if bias is None else bias.slice(rows, keys),
            varlen=None,
        )
        yield part, rows, keys


def _sequence_forward(call: Call) -> tuple[Tensor, Tensor]:
    out = call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1])
    lse = call.query.new_full(call.query.shape[:-1], -math.inf, dtype=torch.float64)
    if call.is_empty:
        return out, lse
    with torch.autocast(call.query.device.type, enabled=False):
        dense = _Dense(call)
        for rows in dense.rows():
            scores = dense.scores(rows)
            top = scores.logsumexp(-1)
            # A row that sees nothing has weights exp(-inf - inf) = 0.
            weights = (scores - torch.where(top == -math.inf, math.inf, top)[..., None]).exp()
            out[..., rows, :] = (weights @ dense.value).to(out.dtype)
            lse[..., rows] = top.double()
    return out, lse + row_constant(call, "reference")


def _add_sequence(
    grads: BlockGradients, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, reference: Tensor | None
) -> None:
    """Add one sequence's gradients, from weights that are recomputed with the global log-sum-exp."""
    dense = _Dense(call)
    lse = torch.where(lse == -math.inf, math.inf, lse - row_constant(call, "reference")).to(dense.dtype)
    for rows in dense.rows():
        do, q = dout[..., rows, :].to(dense.dtype), dense.query[..., rows, :]
        p = (dense.scores(rows) - lse[..., rows, None]).exp()
        ds = p * (do @ dense.value.mT - delta[..., rows, None].to(dense.dtype))
        if grads.query is not None:
            grads.query[..., rows, :] += call.scale * (ds @ dense.key)
        if grads.key is not None:
            grads.key += _over_group(call.scale * (ds.mT @ q), dense.group)
        if grads.value is not None:
            grads.value += _over_group(p.mT @ do, dense.group)
        if grads.phi_q is not None and dense.phi_k is not None and dense.centre is not None:
            target = grads.phi_q[..., rows, :]
            own = ds @ dense.phi_k
            if reference is not None:
                step = (dense.centre[..., rows, :] - reference[..., rows, :]).to(dense.dtype)
                own = own + ds.sum(-1, keepdim=True) * step
            if call.bias is not None and call.bias.ranks is not None:
                own = own * call.bias.rank_mask()[:, None, :]
            target += own.sum_to_size(target.shape)
        if grads.phi_k is not None and dense.phi_q is not None:
            grads.phi_k += (ds.mT @ dense.phi_q[..., rows, :]).sum_to_size(grads.phi_k.shape)
        if grads.table is not None:
            per_head = ds.reshape(-1, *ds.shape[-3:]).sum(0).flatten(1).to(grads.table.dtype)
            entries = dense.index(rows).flatten()
            sums = per_head.new_zeros(per_head.shape[0], grads.table.shape[1]).index_add_(1, entries, per_head)
            grads.table += sums.sum_to_size(grads.table.shape)


def _zeros(call: Call, needs_grad: Sequence[bool]) -> BlockGradients:
    dtype = lse_dtype(call.query.dtype)
    return BlockGradients(
        *(
            torch.zeros_like(x, dtype=torch.promote_types(dtype, x.dtype), memory_format=torch.contiguous_format)
            if need and x is not None
            else None
            for x, need in zip(inputs_of(call), needs_grad, strict=True)
        )
    )


def _parts(grads: BlockGradients, rows: slice, keys: slice) -> BlockGradients:
    """Views of the gradients that belong to one sequence."""

    def cut(x: Tensor | None, where: slice) -> Tensor | None:
        return None if x is None else x[..., where, :]

    return BlockGradients(
        cut(grads.query, rows),
        cut(grads.key, keys),
        cut(grads.value, keys),
        cut(grads.phi_q, rows),
        cut(grads.phi_k, keys),
        grads.table,
    )


class _Dense:
    """The tensors of one sequence in the dtype of the computation, heads of keys repeated, phi_k centred."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.dtype = lse_dtype(call.query.dtype)
        self.group = call.num_heads // call.num_kv_heads
        self.query = call.query.to(self.dtype)
        self.key, self.value = (x.to(self.dtype).repeat_interleave(self.group, dim=-3) for x in (call.key, call.value))
        self.phi_q = self.phi_k = self.table = None
        self.centre = reference_of(replace(call, varlen=None), "reference")
        if call.bias is not None and self.centre is not None:
            self.phi_q = own_columns(call.bias).to(self.dtype)
            self.phi_k = (own_rows(call.bias).to(self.centre.dtype) - self.centre[..., :1, :]).to(self.dtype)
        if call.bias is not None and call.bias.table is not None:
            self.table = call.bias.table.to(self.dtype)
            self.codes = call.bias.codes()

    def rows(self) -> Iterator[slice]:
        """Ranges of queries whose scores fit into `BLOCK_SCORES`."""
        across = max(1, math.prod(self.query.shape[:-2]) * self.call.seqlen_k)
        length = max(1, BLOCK_SCORES // across)
        for start in range(0, self.call.seqlen_q, length):
            yield slice(start, min(start + length, self.call.seqlen_q))

    def index(self, rows: slice) -> Tensor:
        """Which entry of the table each pair reads, `[n, M]`."""
        assert self.table is not None
        code_q, code_k = self.codes
        half = self.table.shape[1] // 2
        return (code_k[None, :] - code_q[rows, None]).clamp(-half, half) + half

    def scores(self, rows: slice) -> Tensor:
        """Scores of centred factors, -inf where a pair is hidden."""
        call = self.call
        scores = call.scale * (self.query[..., rows, :] @ self.key.mT)
        if self.phi_q is not None and self.phi_k is not None:
            scores = scores + self.phi_q[..., rows, :] @ self.phi_k.mT
        if self.table is not None:
            scores = scores + self.table[:, self.index(rows)]
        if call.is_banded:
            i = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
            j = torch.arange(call.seqlen_k, device=scores.device)[None, :]
            scores = scores.masked_fill(~visible(j - i, call.window_left, call.window_right), -math.inf)
        return scores


def _over_group(grad: Tensor, group: int) -> Tensor:
    """Sum over the query heads that share a key head."""
    return grad if group == 1 else grad.unflatten(-3, (-1, group)).sum(-3)
