"""Ways to compute the attention of a window: what people run today, dense kernels, and this library.

Each takes queries, keys and values `[images * windows, H, N, head_dim]` whose dot products are the scores, and what a
layer adds to them; what can be made beforehand is made beforehand, in the form that is fastest for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashbias as fb
from flashbias.biases.regions import region_factors
from flashbias.factored import FactoredBias

__all__ = ["Added", "Attend", "bias_free", "dense_sdpa", "eager", "flex", "ours", "without"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Added:
    """What a layer adds to its scores.

    Args:
        bias: `[H, N, N]`.
        regions: `[windows, N]`, in which region each token of a shifted layer is; None where nothing is shifted.
        penalty: what is taken off between two regions.
    """

    bias: Tensor
    regions: Tensor | None
    penalty: float = 200.0

    @property
    def windows(self) -> int:
        """Of an image, if they differ from one another; else 1."""
        return 1 if self.regions is None else len(self.regions)

    def mask(self) -> Tensor | None:
        """`[windows, 1, N, N]`."""
        if self.regions is None:
            return None
        apart = self.regions[:, None, :, None] != self.regions[:, None, None, :]
        return -self.penalty * apart.to(self.bias.dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Bias and mask, `[windows, H, N, N]`."""
        mask = self.mask()
        return (self.bias[None] if mask is None else self.bias + mask).to(dtype)


def eager(added: Added, dtype: torch.dtype) -> Attend:
    """Scores, bias, mask and softmax one after the other, as the models' libraries write them."""
    bias, mask = added.bias.to(dtype), added.mask()
    mask = None if mask is None else mask.to(dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        return scores.softmax(-1) @ value

    return attend


def dense_sdpa(backend: SDPBackend | None) -> Callable[[Added, torch.dtype], Attend]:
    """SDPA with the matrix, not spread over images: windows that differ are heads of it."""

    def make(added: Added, dtype: torch.dtype) -> Attend:
        matrix, windows = added.matrix(dtype).flatten(0, 1)[None], added.windows

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (_heads_of_windows(x, windows) for x in (query, key, value))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=matrix, scale=1.0)
            return out if windows == 1 else out.unflatten(1, (windows, -1)).flatten(0, 1)

        return _held_to(backend, run)

    return make


def bias_free(backend: SDPBackend | None) -> Callable[[Added, torch.dtype], Attend]:
    """SDPA without bias and mask: no result of the model, but the time that a bias should not exceed by much."""

    def make(added: Added, dtype: torch.dtype) -> Attend:
        return _held_to(backend, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0))

    return make


def without(added: Added, dtype: torch.dtype) -> Attend:
    """No attention at all: the time of everything else."""
    return lambda query, key, value: value


def flex() -> Callable[[Added, torch.dtype], Attend]:
    """FlexAttention, compiled once for each shape: a score function reads the bias, and compares regions."""
    from torch.nn.attention.flex_attention import flex_attention

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Any:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[h, i, j]

        return flex_attention(query, key, value, score_mod, scale=1.0)

    def shifted(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, regions: Tensor, penalty: float) -> Any:
        windows = regions.shape[0]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            apart = regions[b % windows, i] != regions[b % windows, j]
            return score + bias[h, i, j] - torch.where(apart, penalty, 0.0)

        return flex_attention(query, key, value, score_mod, scale=1.0)

    # Each shape is compiled once, and a model with all its peers has more of them than the default limit.
    torch._dynamo.config.recompile_limit = 64
    compiled_plain = torch.compile(plain, dynamic=False, fullgraph=True)
    compiled_shifted = torch.compile(shifted, dynamic=False, fullgraph=True)

    def make(added: Added, dtype: torch.dtype) -> Attend:
        bias, regions, penalty = added.bias.to(dtype), added.regions, added.penalty
        if regions is None:
            return lambda q, k, v: compiled_plain(q, k, v, bias)
        numbers = regions.to(torch.int32)
        return lambda q, k, v: compiled_shifted(q, k, v, bias, numbers, penalty)

    return make


def ours(bias: FactoredBias) -> Callable[[Added, torch.dtype], Attend]:
    """This library, with a form of the bias; regions join it as three columns."""

    def make(added: Added, dtype: torch.dtype) -> Attend:
        regions, whole = added.regions, bias
        if regions is not None:
            numbers = torch.arange(4, device=regions.device)
            whole = bias + region_factors(regions[:, None], regions[:, None], numbers, added.penalty, torch.bfloat16)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if regions is not None:
                query, key, value = (x.unflatten(0, (-1, len(regions))) for x in (query, key, value))
            out = fb.attention(query, key, value, whole, scale=1.0)
            assert isinstance(out, Tensor)
            return out if regions is None else out.flatten(0, 1)

        return attend

    return make


def _heads_of_windows(x: Tensor, windows: int) -> Tensor:
    """`[images * windows, H, N, d]` to `[images, windows * H, N, d]`."""
    return x if windows == 1 else x.unflatten(0, (-1, windows)).flatten(1, 2)


def _held_to(backend: SDPBackend | None, run: Attend) -> Attend:
    if backend is None:
        return run

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return run(query, key, value)

    return attend
