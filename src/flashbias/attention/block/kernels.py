"""A block of keys through the kernels, in O(N + M) memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashbias.attention import registration
from flashbias.attention.block.centring import reference_of, row_constant
from flashbias.attention.block.gradients import BlockGradients
from flashbias.attention.call import Call

__all__ = ["backward", "forward"]


def forward(call: Call, impl: str) -> tuple[Tensor, Tensor]:
    """Output of the block, and the log-sum-exp of its full scores in float64."""
    out, lse, _ = registration.attention_forward(*registration.operands(call), _operators(call, impl))
    return out, lse.double() + row_constant(call, impl)


def backward(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    needs_grad: Sequence[bool],
    reference: Tensor | None,
    impl: str,
) -> BlockGradients:
    """What the block adds to each gradient; arguments as in `attention_block_backward`.

    The backward operator, told to measure from `delta` alone: no output, and `-delta` as `dlse`.
    """
    centred_lse = (lse - row_constant(call, impl)).float()
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
        own = reference_of(call, impl)
        if reference is not None:
            step = -reference if own is None else own - reference
            found.phi_q += _moved(call, step, _row_sums(call, dout, lse, delta, impl))
    if found.phi_k is not None:
        found.phi_k = found.phi_k.sum_to_size(bias.phi_k.shape)
    return found


def _row_sums(call: Call, dout: Tensor, lse: Tensor, delta: Tensor, impl: str) -> Tensor:
    """`rowsum(dS)` of the block, from its own output: `exp(lse_block - lse) (dout · out_block - delta)`."""
    out, own_lse = forward(call, impl)
    share = torch.where(own_lse == -math.inf, 0.0, (own_lse - lse).exp()).float()
    return share * ((dout.float() * out.float()).sum(-1) - delta)


def _moved(call: Call, step: Tensor, row_sums: Tensor) -> Tensor:
    """`rowsum(dS) step`, summed to the shape of phi_q."""
    assert call.bias is not None
    moved = row_sums[..., None] * step.to(row_sums.dtype)
    if call.bias.ranks is not None:
        moved = moved * call.bias.rank_mask()[:, None, :]
    return moved.sum_to_size(call.bias.phi_q.shape).to(call.bias.phi_q.dtype)


def _operators(call: Call, impl: str) -> str:
    """The name under which operators know the kernels: the repeatable ones have one of their own."""
    return "hopper.repeatable" if impl == "hopper" and call.deterministic else impl
