"""The oracle: dense scores, any dtype, any device, differentiable twice. Memory is O(N·M)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashbias.attention.call import Call, lse_dtype
from flashbias.factored import without_autocast

__all__ = ["run", "unsupported"]


def unsupported(call: Call) -> str | None:
    """Everything is supported."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute `softmax(scale q k^T + bias) v` as it is written.

    Args:
        call: the checked request.

    Returns:
        Output `[*batch, H, N, head_dim_v]` in the queries' dtype and, if asked for, the log-sum-exp
        `[*batch, H, N]` in float32 (float64 for float64 inputs).
    """
    if call.varlen is not None:
        return call.per_sequence(run)
    # The formula in the inputs' own precision, also where autocast would lower it.
    with without_autocast(call.query.device):
        return _dense(call)


def _dense(call: Call) -> tuple[Tensor, Tensor | None]:
    dtype = lse_dtype(call.query.dtype)
    group = call.num_heads // call.num_kv_heads
    q = call.query.to(dtype)
    k = call.key.to(dtype).repeat_interleave(group, dim=-3)
    v = call.value.to(dtype).repeat_interleave(group, dim=-3)
    scores = call.scale * (q @ k.mT)
    if call.bias is not None:
        scores = scores + call.bias.dense(torch.promote_types(dtype, call.bias.phi_q.dtype)).to(dtype)
    keep = _kept_pairs(call)
    probabilities, lse = _softmax(scores, keep)
    if call.dropout_p > 0.0:
        probabilities = torch.nn.functional.dropout(probabilities, call.dropout_p)
    out = (probabilities @ v).to(call.query.dtype)
    return out, (lse if call.return_lse else None)


def _kept_pairs(call: Call) -> Tensor | None:
    position = call.position_mask()
    if call.attn_mask is None or position is None:
        return call.attn_mask if position is None else position
    return call.attn_mask & position


def _softmax(scores: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp; a row with nothing to attend to has probabilities 0 and gradients 0."""
    if keep is None:
        return scores.softmax(-1), scores.logsumexp(-1)
    alive = keep.any(-1, keepdim=True)
    # Dead rows are computed on all their keys, so that nothing is NaN, and are then set to zero.
    scores = scores.masked_fill(~(keep | ~alive), -math.inf)
    probabilities = scores.softmax(-1) * alive
    return probabilities, scores.logsumexp(-1).masked_fill(~alive[..., 0], -math.inf)
