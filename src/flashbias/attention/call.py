"""`Call`: one checked and normalised request for attention, as every implementation receives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from flashbias.factored import FactoredBias

__all__ = ["INPUTS", "Call", "VarlenLayout", "empty_output", "inputs_of", "visible"]

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)

INPUTS = ("query", "key", "value", "phi_q", "phi_k", "table")
"""What gradients flow to, in the order of the operators."""


@dataclass(frozen=True)
class VarlenLayout:
    """Where each sequence lies in a packed batch: `cu_seqlens` int32 `[B + 1]` and the longest lengths."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Call:
    """A request whose arguments have been checked; shapes as in `flashbias.attention`.

    `window_left` and `window_right` bound `j - i - shift` from below and above (None: unbounded);
    causal masking is `window_right = 0`. `shift` is 0 for top-left alignment and M - N for bottom-right;
    with a varlen layout it is worked out for each sequence.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: FactoredBias | None
    attn_mask: Tensor | None
    window_left: int | None
    window_right: int | None
    bottom_right: bool
    scale: float
    dropout_p: float
    deterministic: bool
    return_lse: bool
    varlen: VarlenLayout | None = None

    @property
    def seqlen_q(self) -> int:
        """Number of queries, N (all tokens of a packed batch)."""
        return self.query.shape[-2]

    @property
    def seqlen_k(self) -> int:
        """Number of keys, M (all tokens of a packed batch)."""
        return self.key.shape[-2]

    @property
    def num_heads(self) -> int:
        """Query heads, H."""
        return self.query.shape[-3]

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads; H is a multiple of it."""
        return self.key.shape[-3]

    @property
    def shift(self) -> int:
        """Key position that stands on the diagonal of query 0."""
        return self.seqlen_k - self.seqlen_q if self.bottom_right else 0

    @property
    def is_banded(self) -> bool:
        """Whether causal masking or a window hides pairs by position."""
        return self.window_left is not None or self.window_right is not None

    @property
    def is_causal(self) -> bool:
        """Whether the only positional mask is the causal one."""
        return self.window_left is None and self.window_right == 0

    @property
    def has_table(self) -> bool:
        """Whether the bias reads a relative table."""
        return self.bias is not None and self.bias.table is not None

    @property
    def is_empty(self) -> bool:
        """Whether there is no query, no key or no batch element at all."""
        return 0 in self.query.shape[:-1] or self.seqlen_k == 0

    def needs_grad(self) -> bool:
        """Whether autograd will ask for a backward pass."""
        tensors = (self.query, self.key, self.value)
        wanted = any(t.requires_grad for t in tensors) or (self.bias is not None and self.bias.requires_grad)
        return torch.is_grad_enabled() and wanted

    def position_mask(self, queries: slice | None = None) -> Tensor | None:
        """Booleans `[N, M]` of the pairs that causal masking and the window leave, None if they leave all."""
        if not self.is_banded:
            return None
        start, stop, _ = (queries or slice(None)).indices(self.seqlen_q)
        i = torch.arange(start, stop, device=self.query.device)[:, None]
        j = torch.arange(self.seqlen_k, device=self.query.device)[None, :]
        return visible(j - i - self.shift, self.window_left, self.window_right)

    def per_sequence(self, run: Callable[[Call], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        """Run a packed batch one sequence at a time, for implementations without a path of their own.

        Reads `cu_seqlens` on the host.
        """
        layout = self.varlen
        if layout is None:
            raise ValueError("per_sequence needs a packed batch, got varlen=None")
        bounds_q, bounds_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
            part = self._sequence(slice(q0, q1), slice(k0, k1))
            out, lse = empty_output(part) if part.is_empty else run(part)
            outs.append(out)
            if lse is not None:
                lses.append(lse)
        out = torch.cat(outs, dim=-2)
        return out, (torch.cat(lses, dim=-1) if lses else None)

    def _sequence(self, queries: slice, keys: slice) -> Call:
        bias = self.bias
        if bias is not None:
            has_codes = bias.code_q is not None or bias.code_k is not None
            bias = replace(
                bias,
                phi_q=bias.phi_q[..., queries, :],
                phi_k=bias.phi_k[..., keys, :],
                # Default codes are positions within the sequence, so they start again at 0. Where one side has codes,
                # the other's are positions in the pack, as `FactoredBias.codes` says.
                code_q=bias.codes()[0][queries] if has_codes else None,
                code_k=bias.codes()[1][keys] if has_codes else None,
            )
        return replace(
            self,
            query=self.query[..., queries, :],
            key=self.key[..., keys, :],
            value=self.value[..., keys, :],
            bias=bias,
            varlen=None,
        )


def inputs_of(call: Call) -> tuple[Tensor | None, ...]:
    """The tensors of a call that gradients flow to, in the order of `INPUTS`; None for those that it has not."""
    bias = call.bias
    of_bias = (None, None, None) if bias is None else (bias.phi_q, bias.phi_k, bias.table)
    return call.query, call.key, call.value, *of_bias


def visible(difference: Tensor, left: int | None, right: int | None) -> Tensor:
    """Tell which differences `j - i - shift` lie within a window (None: unbounded on that side)."""
    keep = torch.ones_like(difference, dtype=torch.bool)
    if left is not None:
        keep &= difference >= -left
    if right is not None:
        keep &= difference <= right
    return keep


def empty_output(call: Call, *others: Tensor) -> tuple[Tensor, Tensor | None]:
    """The answer where nothing attends to anything: zeros, a log-sum-exp of -inf, and zero gradients (`others` too)."""
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    inputs = [call.query, call.key, call.value, *others]
    if call.bias is not None:
        inputs += [call.bias.phi_q, call.bias.phi_k]
        inputs += [] if call.bias.table is None else [call.bias.table]
    # An empty sum of every input: zero, yet part of the graph, so that gradients are zeros and not None.
    anchor = sum(x.flatten()[:0].sum().to(call.query.dtype) for x in inputs)
    out = call.query.new_zeros(shape) + anchor
    lse = call.query.new_full(shape[:-1], -math.inf, dtype=lse_dtype(call.query.dtype))
    return out, (lse if call.return_lse else None)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32
