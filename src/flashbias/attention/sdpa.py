"""Concatenation through torch SDPA: `[phi_q / scale | q]` against `[phi_k | k]`, on any device that torch runs on.

The default on CPUs, and on GPUs without Triton. Values are padded to the width of the keys, because torch takes
its flash kernel only where all head dimensions are equal. What SDPA cannot express as a sum of products (tables,
windows, alignments, and key ranges so long that one centre is too coarse) is done in blocks of queries, recomputed
in the backward pass, so that memory stays O(N + M).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from flashbias.attention import packing
from flashbias.attention.call import Call, visible
from flashbias.factored import relative_lookup

__all__ = ["run", "unsupported"]

BLOCK_ENTRIES = 1 << 22
"""Entries of a table or mask that are realised at once."""

BLOCK_QUERIES = 16_384
"""Queries that share one centre of phi_k when there are too many keys for a single one."""

SAMPLED_KEYS = 8
"""Keys, evenly spread from the first to the last, among which a row looks for a large bias to start its sums at."""


def unsupported(call: Call) -> str | None:
    """Say what of the call this implementation cannot do, None if nothing."""
    if call.return_lse:
        return "return_lse=True is not available from torch SDPA"
    return None


def run(call: Call) -> tuple[Tensor, None]:
    """Compute attention through `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        call: the checked request.

    Returns:
        Output `[*batch, H, N, head_dim_v]` in the queries' dtype, and None in place of a log-sum-exp.
    """
    if call.varlen is not None:
        return call.per_sequence(run)[0], None
    if _fits_one_call(call):
        return _block(call, slice(0, call.seqlen_q)), None
    length = _block_length(call)
    outs = []
    for start in range(0, call.seqlen_q, length):
        block = partial(_block, call, slice(start, min(start + length, call.seqlen_q)))
        outs.append(checkpoint(block, use_reentrant=False) if _recomputes(call) else block())
    return torch.cat(outs, dim=-2), None


def _recomputes(call: Call) -> bool:
    """Whether blocks keep nothing for a backward pass. Under `torch.func` they must: it cannot recompute."""
    is_transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return call.needs_grad() and not is_transformed


def _fits_one_call(call: Call) -> bool:
    if call.has_table or call.dropout_p > 0 or _needs_many_centres(call):
        return False
    return not call.is_banded or _is_plain_causal(call, slice(0, call.seqlen_q))


def _is_plain_causal(call: Call, queries: slice) -> bool:
    """Whether SDPA's own `is_causal` says it all; the queries must be all of them."""
    # A branch: to torch.compile a comparison of sizes is a symbol, which SDPA would not take.
    if call.seqlen_q != call.seqlen_k or queries.stop - queries.start != call.seqlen_q:
        return False
    return call.is_causal and call.attn_mask is None and not call.has_table


def _needs_many_centres(call: Call) -> bool:
    has_factors = call.bias is not None and call.bias.rank > 0
    return has_factors and _is_split(call.query.dtype) and call.seqlen_k > packing.TILE_CENTRE_FROM


def _is_split(dtype: torch.dtype) -> bool:
    """Whether factors are packed in parts for operands of this dtype."""
    return dtype == torch.bfloat16


def _block_length(call: Call) -> int:
    if call.bias is not None and call.bias.table is None and not call.is_banded and call.dropout_p == 0:
        return BLOCK_QUERIES
    heads = call.num_heads if call.bias is None else call.bias.num_heads
    return max(64, min(BLOCK_QUERIES, BLOCK_ENTRIES // (heads * call.seqlen_k) // 64 * 64))


def _block(call: Call, queries: slice) -> Tensor:
    """Attention of a block of queries, over the keys that it can see."""
    keys = _visible_keys(call, queries)
    plain_causal = _is_plain_causal(call, queries)
    dtype = torch.float32 if call.query.dtype == torch.float16 else call.query.dtype
    q, k, v = _operands(call, queries, keys, dtype)
    keep = None if plain_causal else _kept_pairs(call, queries, keys)
    alive = None
    if keep is not None:
        alive = keep.any(-1, keepdim=True)
        keep = keep | ~alive  # a row without a key is computed on all of them, then set to zero
    out = scaled_dot_product_attention(
        _flat(q),
        _flat(k),
        _flat(v),
        attn_mask=_additive_mask(call, queries, keys, keep, dtype),
        dropout_p=call.dropout_p,
        is_causal=plain_causal,
        scale=call.scale,
    )
    out = out[..., : call.value.shape[-1]].reshape(*q.shape[:-1], -1)
    return (out if alive is None else out * alive).to(call.query.dtype)


def _visible_keys(call: Call, queries: slice) -> slice:
    first, last = queries.start + call.shift, queries.stop - 1 + call.shift
    start = 0 if call.window_left is None else max(0, first - call.window_left)
    stop = call.seqlen_k if call.window_right is None else min(call.seqlen_k, last + call.window_right + 1)
    # A block that sees no key keeps one, which the mask then hides.
    start = min(start, call.seqlen_k - 1)
    return slice(start, max(stop, start + 1))


def _operands(call: Call, queries: slice, keys: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenated and padded `[*batch, H, n, width]` operands of one width."""
    group = call.num_heads // call.num_kv_heads
    q = call.query[..., queries, :].to(dtype)
    k, v = (x[..., keys, :].to(dtype).repeat_interleave(group, dim=-3) for x in (call.key, call.value))
    if call.bias is not None and call.bias.rank > 0:
        phi_q, phi_k = _packed(call, queries, keys, dtype)
        # Factors first: their large products have met and cancelled before q and k are added.
        q = torch.cat([phi_q.expand(*q.shape[:-1], -1), q], dim=-1)
        k = torch.cat([phi_k.expand(*k.shape[:-1], -1), k], dim=-1)
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    q, k, v = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def _packed(call: Call, queries: slice, keys: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert call.bias is not None
    bias = call.bias.without_ranks()  # both factors: products with padding may be anything
    phi_q = bias.phi_q[..., queries, :]
    phi_k = bias.phi_k[..., keys, :]
    opposite = _opposite(call, queries)
    if _is_split(dtype):
        nearby = (bias.phi_k[..., opposite, :] if _needs_many_centres(call) else bias.phi_k).detach()
        centre = packing.within_reach(nearby.float().median(dim=-2, keepdim=True).values)
        return packing.pack(phi_q, phi_k, call.scale, dtype, centre)
    # Unsplit products are summed in order, one rounding each. A first column starts the sum at minus a large bias of
    # the row, a constant of it: what weighs most is then summed near zero.
    packed_q, packed_k = packing.pack(phi_q, phi_k, call.scale, dtype, torch.zeros_like(phi_k[..., :1, :]))
    start = (-_large_bias(call, phi_q, bias.phi_k, queries, opposite) / call.scale).to(dtype)[..., None]
    packed_q = packed_q.expand(*start.shape[:-1], -1)
    return torch.cat([start, packed_q], dim=-1), torch.cat([torch.ones_like(packed_k[..., :1]), packed_k], dim=-1)


def _opposite(call: Call, queries: slice) -> Tensor:
    """The key that stands opposite to each query, ends aligned."""
    i = torch.arange(queries.start, queries.stop, device=call.query.device)
    return (i + call.seqlen_k - call.seqlen_q).clamp(0, call.seqlen_k - 1)


def _large_bias(call: Call, phi_q: Tensor, phi_k: Tensor, queries: slice, opposite: Tensor) -> Tensor:
    """The largest bias that each row has among its opposite and a few other keys; 0 where it sees none of them.

    One key alone may be padding: hidden, or pushed down by a column of -1e9, from where nothing else can be told apart.
    """
    device = call.query.device
    sampled = torch.arange(SAMPLED_KEYS, device=device) * (call.seqlen_k - 1) // (SAMPLED_KEYS - 1)
    own = packing.row_sums(phi_q, phi_k[..., opposite, :])[..., None]
    # Any start near will do: it need not be exact.
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    products = phi_q.detach().to(dtype) @ phi_k[..., sampled, :].detach().to(dtype).mT
    biases = torch.cat([own.to(dtype), products], dim=-1)
    keys = torch.cat([opposite[:, None], sampled.expand(opposite.shape[0], -1)], dim=-1)
    if call.is_banded:
        i = torch.arange(queries.start, queries.stop, device=device)[:, None]
        biases = biases.masked_fill(~visible(keys - i - call.shift, call.window_left, call.window_right), -math.inf)
    if call.attn_mask is not None:
        mask = call.attn_mask.expand(*call.attn_mask.shape[:-2], call.seqlen_q, -1)[..., queries, :]
        biases = biases.masked_fill(~mask.gather(-1, keys.expand(*mask.shape[:-1], -1)), -math.inf)
    largest = biases.amax(-1)
    return torch.where(largest == -math.inf, 0.0, largest)


def _kept_pairs(call: Call, queries: slice, keys: slice) -> Tensor | None:
    position = call.position_mask(queries)
    if position is not None:
        position = position[:, keys]
    if call.attn_mask is None:
        return position
    rows = queries if call.attn_mask.shape[-2] > 1 else slice(None)
    mask = call.attn_mask[..., rows, keys] if call.attn_mask.shape[-1] > 1 else call.attn_mask[..., rows, :]
    return mask if position is None else mask & position


def _additive_mask(call: Call, queries: slice, keys: slice, keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The block of the table with -inf where a pair is hidden; booleans where there is no table."""
    bias = call.bias
    if bias is None or bias.table is None:
        return None if keep is None else _flat_mask(call, keep)
    code_q, code_k = bias.codes()
    # A lookup's gradient is a sum over all pairs, which half precision cannot hold.
    wide = torch.promote_types(dtype, torch.float32)
    mask = relative_lookup(bias.table.to(wide), code_q[queries], code_k[keys])
    # float32 rows beside half-precision queries are allowed on CPUs alone.
    mask = mask if call.query.device.type == "cpu" else mask.to(dtype)
    if keep is not None:
        mask = mask.masked_fill(~keep, -math.inf)
    return _flat_mask(call, mask)


def _flat(x: Tensor) -> Tensor:
    """`[*batch, H, n, width]` to the four dimensions that SDPA's kernels want."""
    return x.reshape(-1, *x.shape[-3:])


def _flat_mask(call: Call, mask: Tensor) -> Tensor:
    """Bring a mask to four dimensions without expanding a batch that it does not have."""
    if mask.dim() <= 3 or all(size == 1 for size in mask.shape[:-3]):
        mask = mask.reshape(-1, *mask.shape[-2:]) if mask.dim() > 2 else mask[None]
        return mask[None]
    batch = call.query.shape[:-3]
    return mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
