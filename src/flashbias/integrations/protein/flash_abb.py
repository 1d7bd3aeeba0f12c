"""FlashABB, structures of antibodies, https://pypi.org/project/flash-abb: invariant point attention without pairs.

    b[h, i, j] = -w_h / 2 * sum_p ||x_ihp - y_jhp||^2,    w_h = softplus(head_weights[h]) * sqrt(2 / (27 P))

over P query and P key points in space, each moved there by the frame of its residue: exact in 3 P + 2 columns, 14 where
P = 4. The model's own code multiplies the squares out coordinate by coordinate, which takes 9 P columns, and about the
origin of space, where they cancel. The bias is of points that differ in every layer, so the attention's forward is
replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from flashbias.biases import SquaredDistance
from flashbias.factored import FactoredBias
from flashbias.integrations.base import SETTINGS, Changes, Family, Options, Plan
from flashbias.integrations.call import Settings, call
from flashbias.integrations.report import AttentionEntry

__all__ = ["FlashABB", "FlashABBEncoder", "point_bias"]

DIM = 3  # of space


def point_bias(attention: Any, x_q: Tensor, x_k: Tensor) -> FactoredBias:
    """The bias of an attention.

    Args:
        attention: has `head_weights`, before the softplus, and `no_qk_points`.
        x_q: `[B, H, N, P, 3]`, the queries' points in space.
        x_k: `[B, H, N, P, 3]`, the keys'.

    Returns:
        A bias of rank `3 P + 2`.
    """
    weight = softplus(attention.head_weights) * math.sqrt(2.0 / (27.0 * attention.no_qk_points))
    return SquaredDistance(attention.no_heads)(x_q.flatten(-2), x_k.flatten(-2), weight=0.5 * weight)


def forward(
    attention: Any,
    s: Tensor,
    res_idx: Tensor | None,
    r: Any,
    mask: Tensor,
    inplace_safe: bool = False,
    _offload_inference: bool = False,
    _z_reference_list: Any = None,
) -> Tensor:
    """`FlashpointAttention.forward` with 3 P + 2 columns."""
    if res_idx is None:
        res_idx = torch.arange(s.shape[-2], device=s.device).expand(s.shape[:-1])
    heads, frames = (attention.no_heads, -1), r[..., None, None]
    query = attention.linear_q(s).unflatten(-1, heads).transpose(1, 2)
    key, value = attention.linear_kv(s).unflatten(-1, heads).transpose(1, 2).chunk(2, dim=-1)
    query, key = (attention.rotary_emb.rotate_queries_or_keys(x) for x in (query, key))
    x_q, x_k, x_v = points(attention, s, frames)
    values = [value, x_v.flatten(-2)]
    if attention.use_spectra:
        values.append(position_values(res_idx, attention.rel_pos_dim, value))
    out = call(
        attention,
        query,
        key,
        torch.cat(values, dim=-1),
        point_bias(attention, x_q, x_k),
        scale=math.sqrt(1.0 / (3.0 * attention.c_hidden)),
        dropout_p=0.0,
        attn_mask=(mask == 1)[:, None, None, :],
    )
    seen, seen_points, *spectrum = out.split([x.shape[-1] for x in values], dim=-1)
    seen_points = frames.invert_apply(seen_points.unflatten(-1, (-1, DIM)))
    lengths = (seen_points.square().sum(-1) + attention.eps).sqrt()
    parts = [seen, *seen_points.unbind(-1), lengths, *(relative(x, res_idx) for x in spectrum)]
    return attention.linear_out(torch.cat([x.flatten(-2) for x in parts], dim=-1).to(seen.dtype))


def forward_with_weights(attention: Any, *args: Any, return_attn_weights: bool = False, **kwargs: Any) -> Any:
    """The same for the encoder's class, which also returns the probabilities, or None."""
    if return_attn_weights:
        raise NotImplementedError(
            "return_attn_weights=True asks for N×N probabilities, which a patched model never forms; "
            "call flashbias.integrations.unpatch(model) first"
        )
    return forward(attention, *args, **kwargs), None


def points(attention: Any, s: Tensor, frames: Any) -> tuple[Tensor, ...]:
    """Points of queries, keys and values in space, each `[B, H, N, number, 3]`."""
    local = torch.stack(attention.linear_points(s).chunk(DIM, dim=-1), dim=-1)
    moved = frames.apply(local.unflatten(-2, (attention.no_heads, -1))).transpose(1, 2)
    numbers = [attention.no_qk_points, attention.no_qk_points, attention.no_v_points]
    return moved.split(numbers, dim=-2)


def position_values(res_idx: Tensor, period: int, value: Tensor) -> Tensor:
    """Values `[B, H, N, period]` whose average is the probability of each residue number, modulo the period."""
    return one_hot(res_idx % period, period).to(value.dtype)[:, None].expand(-1, value.shape[1], -1, -1)


def relative(spectrum: Tensor, res_idx: Tensor) -> Tensor:
    """Count residue numbers from the query's own: `[B, N, H, period]` rolled along its last dimension."""
    period = spectrum.shape[-1]
    number = (res_idx[..., None] + torch.arange(period, device=res_idx.device)) % period
    return spectrum.gather(-1, number[:, :, None].expand_as(spectrum))


class FlashABB(Family):
    """The model that predicts structures."""

    name = "FlashABB"
    attentions = ("flash_abb.model.flashpoint_attention.FlashpointAttention",)
    forward: ClassVar[Callable[..., Any]] = staticmethod(forward)

    def plan(self, name: str, attention: Any, options: Options) -> Plan:
        """Replace it by its exact form."""
        rank = DIM * attention.no_qk_points + 2
        entry = AttentionEntry(name, self.name, "replaced", "exact points", rank, 0.0)
        return Plan(entry, lambda changes: self.change(attention, options, changes))

    def change(self, attention: nn.Module, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        changes.set(attention, SETTINGS, Settings(options.impl))
        changes.set(attention, "forward", partial(self.forward, attention))


class FlashABBEncoder(FlashABB):
    """The encoder of sequences and their structures; its own attention forms N×N probabilities."""

    name = "FlashABB encoder"
    attentions = ("flash_abb.model.fpa_transformer.flashpoint_attention.FlashpointAttention",)
    forward = staticmethod(forward_with_weights)
