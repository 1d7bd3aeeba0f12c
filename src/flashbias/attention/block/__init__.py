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

This module chooses who does it: the kernels `hopper` and `triton`, in O(N + M) memory (`kernels.py`), or `reference`,
dense scores of some rows at a time (`reference.py`). Cost: the forward pass of the block; backward, that of the block's
backward pass, and with kernels its forward pass once more where phi_q needs a gradient and the caller chooses another
reference than the block's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashbias.attention import hopper
from flashbias.attention.block import kernels
from flashbias.attention.block import reference as by_rows
from flashbias.attention.block.centring import has_reference, reference_of
from flashbias.attention.block.gradients import BlockGradients
from flashbias.attention.call import Call
from flashbias.attention.checks import checked
from flashbias.attention.choice import KERNELS
from flashbias.factored import FactoredBias

__all__ = [
    "attention_block",
    "attention_block_backward",
    "block_implementation",
    "checked_block",
    "row_reference",
]


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
    return checked(
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

    Examples:
        >>> import torch
        >>> from flashbias.attention.block import attention_block, checked_block
        >>> call = checked_block(*torch.randn(3, 2, 16, 8))
        >>> out, lse = attention_block(call)
        >>> out.shape, lse.dtype
        (torch.Size([2, 16, 8]), torch.float64)
    """
    with torch.no_grad():
        if (chosen := block_implementation(call, impl)) in KERNELS:
            return kernels.forward(call, chosen)
        return by_rows.forward(call)


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
            return kernels.backward(call, dout, lse, delta, needs_grad, reference, chosen)
        return by_rows.backward(call, dout, lse, delta, needs_grad, reference)


def block_implementation(call: Call, impl: str = "auto") -> str:
    """Say which implementation attends to a block: "hopper", "triton" or "reference".

    Args:
        call: the block.
        impl: "auto", or a name to ask about.

    Returns:
        The name. "auto" takes the fastest kernels on GPUs, as `attention` does, and "reference" on CPUs and for
        what no kernel supports. All kernels centre alike (`packing.py`): blocks of one row may go through different
        ones.

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
    reasons = {name: module.unavailable(device) or module.unsupported(call) for name, module in asked.items()}
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
    return reference_of(call, block_implementation(call, impl)) if has_reference(call) else None
