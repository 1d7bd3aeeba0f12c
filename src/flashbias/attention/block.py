"""Attention of one block of keys: the one entry for whoever spreads keys over devices.

Softmax over all keys is put together from blocks of them. Forward, every block gives its own output and
log-sum-exp, which `flashbias.distributed` merges. Backward, every block needs the *global* log-sum-exp and nothing
else of the other blocks:

    P  = exp(S_block - lse)                       the block's share of the weights
    dS = P * (dout v^T - delta),                  delta = rowsum(dout * out) - dlse, of the global output
    dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout,  dphi_k = dS^T phi_q,  dphi_q = dS (phi_k - reference)

Summed over blocks these are the gradients of the whole. Two things differ from attention over all keys at once:

- **The log-sum-exp is float64.** Kernels centre phi_k, block by block, which shifts a row by a constant. Constants of
  different blocks differ by up to slope * 2^20, and float32 would round their difference.
- **Rows of dS do not sum to zero within a block**, so centring is seen by dphi_q. Each block's dphi_q is measured from
  a reference that the caller chooses, the same for all blocks of a row.

Implementations: the kernels `hopper` and `triton`, through the operators of `registration.py` in O(N + M) memory, and
`reference`, dense scores of some rows, `BLOCK_SCORES` numbers at once, for CPUs. Cost: the forward pass of the
block; backward, that of the block's backward pass, and with kernels its forward pass once more where phi_q needs a
gradient and the caller chooses another reference than the block's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from flashbias.attention import hopper, packing, registration, triton
from flashbias.attention.api import _checked
from flashbias.attention.call import Call, lse_dtype, visible
from flashbias.factored import FactoredBias

__all__ = [
    "INPUTS",
    "BlockGradients",
    "attention_block",
    "attention_block_backward",
    "block_implementation",
    "checked_block",
    "inputs_of",
    "row_reference",
]

BLOCK_SCORES = 1 << 22
"""Scores that `reference` holds at once."""


KERNELS = {"hopper": hopper, "triton": triton}
"""Kernels, fastest first. All centre alike (`packing.py`), so that blocks of one row may go through different ones."""

INPUTS = ("query", "key", "value", "phi_q", "phi_k", "table")
"""What gradients flow to, in the order of the operators."""


def inputs_of(call: Call) -> tuple[Tensor | None, ...]:
    """The tensors of a call that gradients flow to, in the order of `INPUTS`; None for those that it has not."""
    bias = call.bias
    of_bias = (None, None, None) if bias is None else (bias.phi_q, bias.phi_k, bias.table)
    return call.query, call.key, call.value, *of_bias


@dataclass
class BlockGradients:
    """What one block adds to each gradient; None where none is needed.

    Shapes are those of the inputs, broadcast dimensions summed. `phi_q` is `dS (phi_k - reference)`.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    phi_q: Tensor | None = None
    phi_k: Tensor | None = None
    table: Tensor | None = None


def checked_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    deterministic: bool | None = None,
) -> Call:
    """Check queries and keys that stand opposite to each other, as `flashbias.attention` does.

    Args:
        query: as in `flashbias.attention`.
        key: as in `flashbias.attention`; as many as queries.
        value: as in `flashbias.attention`.
        bias: as in `flashbias.attention`.
        is_causal: as in `flashbias.attention`.
        window: as in `flashbias.attention`.
        scale: as in `flashbias.attention`.
        enable_gqa: as in `flashbias.attention`.
        deterministic: as in `flashbias.attention`.

    Returns:
        The block, from which others are made with `dataclasses.replace`.

    Raises:
        TypeError: as in `flashbias.attention`.
        ValueError: as in `flashbias.attention`.
    """
    return _checked(
        query,
        key,
        value,
        bias,
        attn_mask=None,
        is_causal=is_causal,
        causal_alignment="top_left",
        window=window,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=0.0,
        deterministic=deterministic,
        return_lse=True,
    )


def attention_block(call: Call, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Attend to one block of keys.

    Formula: `out = softmax(S) v`, `lse = log sum exp S`, over the keys of the block alone. Not differentiable: see
    `attention_block_backward`.

    Args:
        call: the block. Its window counts from key 0 against query 0 (`bottom_right` False); a table has codes; a
            packed batch has no leading batch dimension.
        impl: "auto", "hopper", "triton" or "reference".

    Returns:
        Output `[*batch, H, N, head_dim_v]` in the queries' dtype, and the natural log-sum-exp of the full scores,
        float64 `[*batch, H, N]`; 0 and -inf for rows that see no key of the block.

    Raises:
        ValueError: an unknown `impl`, or a call with a mask, dropout or another alignment.
        NotImplementedError: the named implementation cannot do the call.

    Example:
        >>> import torch
        >>> from flashbias.attention.block import attention_block, checked_block
        >>> call = checked_block(*torch.randn(3, 2, 16, 8))
        >>> out, lse = attention_block(call)
        >>> out.shape, lse.dtype
        (torch.Size([2, 16, 8]), torch.float64)
    """
    with torch.no_grad():
        if (chosen := block_implementation(call, impl)) in KERNELS:
            out, lse, _ = registration.attention_forward(*registration.operands(call), _operators(call, chosen))
            return out, _restored(call, lse, chosen)
        return _join(call, _reference_forward)


def attention_block_backward(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    needs_grad: Sequence[bool],
    reference: Tensor | None = None,
    impl: str = "auto",
) -> BlockGradients:
    """Work out what one block of keys adds to each gradient.

    Args:
        call: the block, as in `attention_block`.
        dout: gradient of the global output, `[*batch, H, N, head_dim_v]`.
        lse: global log-sum-exp, float64 `[*batch, H, N]`.
        delta: `rowsum(dout * out) - dlse` of the global output, float32 or float64 `[*batch, H, N]`.
        needs_grad: for query, key, value, phi_q, phi_k and table, whether its gradient is needed.
        reference: `[*own, N, R]`, what phi_k is measured from in dphi_q; default the block's own
            (`row_reference`), which costs nothing. If rows of dS over all blocks sum to `dlse`, the caller adds
            `reference * dlse` to the sum of the blocks.
        impl: as in `attention_block`.

    Returns:
        The gradients, in the dtypes of the inputs (`reference`: of the computation).

    Raises:
        ValueError: as in `attention_block`.
        NotImplementedError: as in `attention_block`.
    """
    with torch.no_grad():
        if (chosen := block_implementation(call, impl)) in KERNELS:
            return _kernel_backward(call, dout, lse, delta, needs_grad, reference, chosen)
        return _reference_backward(call, dout, lse, delta, needs_grad, reference)


def block_implementation(call: Call, impl: str = "auto") -> str:
    """Say which implementation attends to a block: "hopper", "triton" or "reference".

    Args:
        call: the block.
        impl: "auto", or a name to ask about.

    Returns:
        The name. "auto" takes the fastest kernels on GPUs, as `attention` does, and "reference" on CPUs and for
        what no kernel supports.

    Raises:
        ValueError: an unknown `impl`, or a call that no block can be.
        NotImplementedError: the named implementation cannot do the call.
    """
    if impl not in ("auto", *KERNELS, "reference"):
        raise ValueError(f"impl must be 'auto', 'hopper', 'triton' or 'reference' for a block of keys, got {impl!r}")
    if call.attn_mask is not None or call.dropout_p > 0 or call.bottom_right:
        raise ValueError("a block of keys takes no attn_mask, no dropout_p and no causal_alignment='bottom_right'")
    if impl == "reference" or (impl == "auto" and call.query.device.type == "cpu"):
        return "reference"
    asked = KERNELS if impl == "auto" else {impl: KERNELS[impl]}
    device = call.query.device
    reasons = {name: kernels.unavailable(device) or kernels.unsupported(call) for name, kernels in asked.items()}
    possible = [name for name, reason in reasons.items() if reason is None]
    if impl != "auto" and not possible:
        raise NotImplementedError(f"impl={impl!r} cannot do this block: {reasons[impl]}; 'reference' would")
    if possible == ["hopper", "triton"] and hopper.is_slower(call):
        return "triton"
    return possible[0] if possible else "reference"


def row_reference(call: Call, impl: str = "auto") -> Tensor | None:
    """What phi_k is measured from in the scores of each query of a block.

    Args:
        call: the block.
        impl: as in `attention_block`.

    Returns:
        `[*own, N, R]` in float32 or float64; None where phi_k is taken as it is (no factors, packed batches, and
        half-precision factors in kernels).
    """
    bias = call.bias
    if bias is None or bias.rank == 0 or call.varlen is not None or call.seqlen_k == 0:
        return None
    if block_implementation(call, impl) == "reference":
        starts, length = packing.reference_starts(call.seqlen_q, call.seqlen_k, bias.device, tiled=False)
    elif packing.is_packed(bias.phi_q, bias.phi_k, call.query.dtype):
        tiled = packing.is_tile_centred(call.seqlen_k, call.query.dtype)
        starts, length = packing.reference_starts(call.seqlen_q, call.seqlen_k, bias.device, tiled=tiled)
    else:
        return None
    return packing.centre_of(bias.phi_k, starts, length)


# -------------------------------------------------------------------- through the kernels


def _operators(call: Call, impl: str) -> str:
    """The name under which operators know the kernels: the repeatable ones have one of their own."""
    return "hopper.repeatable" if impl == "hopper" and call.deterministic else impl


def _restored(call: Call, lse: Tensor, impl: str) -> Tensor:
    """The log-sum-exp of the full scores, in float64, from that of centred ones."""
    return lse.double() + _row_constant(call, impl)


def _row_constant(call: Call, impl: str) -> Tensor | float:
    """What centring takes from the scores of each row."""
    rows = row_reference(call, impl)
    return 0.0 if rows is None or call.bias is None else packing.row_sums(_own_columns(call.bias), rows)


def _own_columns(bias: FactoredBias) -> Tensor:
    """phi_q with zeros in the columns that a head does not have."""
    return bias.phi_q if bias.ranks is None else bias.phi_q * bias.rank_mask()[:, None, :]


def _kernel_backward(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    needs_grad: Sequence[bool],
    reference: Tensor | None,
    impl: str,
) -> BlockGradients:
    """The backward operator, told to measure from `delta` alone: no output, and `-delta` as `dlse`."""
    centred_lse = (lse - _row_constant(call, impl)).float()
    grads = registration.attention_backward(
        dout.to(call.query.dtype).contiguous(),
        -delta.float(),
        None,
        centred_lse.contiguous(),
        list(needs_grad),
        *registration.operands(call),
        _operators(call, impl),
    )
    found = BlockGradients(*(g if need else None for g, need in zip(grads, needs_grad, strict=True)))
    bias = call.bias
    if bias is None:
        return found
    if found.phi_q is not None:
        found.phi_q = found.phi_q.sum_to_size(bias.phi_q.shape)
        own = row_reference(call, impl)
        if reference is not None:
            step = -reference if own is None else own - reference
            found.phi_q += _moved(call, step, _row_sums(call, dout, lse, delta, impl))
    if found.phi_k is not None:
        found.phi_k = found.phi_k.sum_to_size(bias.phi_k.shape)
    return found


def _row_sums(call: Call, dout: Tensor, lse: Tensor, delta: Tensor, impl: str) -> Tensor:
    """`rowsum(dS)` of the block, from its own output: `exp(lse_block - lse) (dout · out_block - delta)`."""
    out, own_lse = attention_block(call, impl)
    share = torch.where(own_lse == -math.inf, 0.0, (own_lse - lse).exp()).float()
    return share * ((dout.float() * out.float()).sum(-1) - delta)


def _moved(call: Call, step: Tensor, row_sums: Tensor) -> Tensor:
    """`rowsum(dS) step`, summed to the shape of phi_q."""
    assert call.bias is not None
    moved = row_sums[..., None] * step.to(row_sums.dtype)
    if call.bias.ranks is not None:
        moved = moved * call.bias.rank_mask()[:, None, :]
    return moved.sum_to_size(call.bias.phi_q.shape).to(call.bias.phi_q.dtype)


# -------------------------------------------------------------------- by dense scores, some rows at a time


def _join(call: Call, run: Callable[[Call], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run over every sequence of a packed batch, or over the one there is."""
    outs, lses = zip(*(run(part) for part, _, _ in _sequences(call)), strict=True)
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)


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


class _Dense:
    """The tensors of one sequence in the dtype of the computation, heads of keys repeated, phi_k centred."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.dtype = lse_dtype(call.query.dtype)
        self.group = call.num_heads // call.num_kv_heads
        self.query = call.query.to(self.dtype)
        self.key, self.value = (x.to(self.dtype).repeat_interleave(self.group, dim=-3) for x in (call.key, call.value))
        self.phi_q = self.phi_k = self.table = None
        self.centre = row_reference(replace(call, varlen=None), "reference")
        if call.bias is not None and self.centre is not None:
            self.phi_q = _own_columns(call.bias).to(self.dtype)
            self.phi_k = (call.bias.phi_k.to(self.centre.dtype) - self.centre[..., :1, :]).to(self.dtype)
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


def _reference_forward(call: Call) -> tuple[Tensor, Tensor]:
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
    return out, lse + _row_constant(call, "reference")


def _reference_backward(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, needs_grad: Sequence[bool], reference: Tensor | None
) -> BlockGradients:
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


def _add_sequence(
    grads: BlockGradients, call: Call, dout: Tensor, lse: Tensor, delta: Tensor, reference: Tensor | None
) -> None:
    """Add one sequence's gradients, from weights that are recomputed with the global log-sum-exp."""
    dense = _Dense(call)
    lse = torch.where(lse == -math.inf, math.inf, lse - _row_constant(call, "reference")).to(dense.dtype)
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


def _over_group(grad: Tensor, group: int) -> Tensor:
    """Sum over the query heads that share a key head."""
    return grad if group == 1 else grad.unflatten(-3, (-1, group)).sum(-3)
