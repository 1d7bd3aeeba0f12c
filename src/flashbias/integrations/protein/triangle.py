"""Triangle attention with cuEquivariance's signature, and attention with a pair bias as in AlphaFold 3.

Both take their bias as factors, or as the tensor that a model has, which is then compressed at every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashbias.attention import attention
from flashbias.attention.workload import Workload
from flashbias.decompose import compress
from flashbias.factored import FactoredBias

__all__ = ["compressed", "pair_bias_attention", "triangle_attention"]

BLOCK_ENTRIES = 1 << 24
"""Scores that are formed at once when their largest is asked for."""


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | FactoredBias,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_aux: bool = False,
    *,
    kv_lengths: Tensor | None = None,
    tol: float = 1e-3,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attend along the rows of a pair representation, with one bias for all rows.

    Formula: `out[b, n] = softmax(scale * q[b, n] k[b, n]^T + bias[b]) v[b, n]`, over the keys where `mask` is True.

    Arguments are those of `cuequivariance_torch.triangle_attention`, in its order. Use it in its place with a bias
    that comes as factors, as from `NeuralBias`: no Q×K matrix is then stored, forward or backward, and the factors are
    read by every row without a copy.

    A bias that comes as a tensor is compressed at each call, by `flashbias.compress` with `table=None`. That costs at
    least O(Q K) memory and O(Q K R) time for each head, seconds rather than milliseconds; its factors are constants.
    It suits a bias that is fixed, better still compressed once beforehand, and no training step.

    Differences from cuEquivariance: a row of which no key is valid gives 0 (there, the mean of the values), its `lse`
    and `max` are -inf; no limits on D; CPUs.

    Args:
        q: `[B, N, H, Q, D]`; N rows, attended along Q. `[N, H, Q, D]` stands for B = 1, here and below.
        k: `[B, N, H, K, D]`.
        v: `[B, N, H, K, D]`.
        bias: factors `[B, 1, H, Q, R]` and `[B, 1, H, K, R]`; factors without the dimension of rows, `[B, H, Q, R]`, as
            `NeuralBias` makes them from `[B, Q, features]`, are given one. Or a tensor `[B, 1, H, Q, K]`.
        mask: `[B, N, 1, 1, K]`, True (or not 0) where a key is valid.
        scale: factor of the dot products; default `1 / sqrt(D)`.
        return_aux: also return the log-sum-exp and the maximum of each row's scores. The maximum takes a second
            pass over the scores, in blocks. Not for a bias tensor: compression changes it by a constant in each row,
            which no output shows, but both of these would.
        kv_lengths: int32 `[B, N, 1, 1, 1]`, in place of `mask`: the keys before it are valid.
        tol: bound on the change of the output by the compression of a bias tensor, as in `compress`; no factors
            are changed.
        impl: implementation, as in `attention`.

    Returns:
        `[B, N, H, Q, D]` in q's dtype; with `return_aux` a tuple of it and two tensors `[B, N, H, Q]`, float32 (float64
        for such a q): the natural log-sum-exp of the scores, bias included, and the largest of them (without a
        gradient).

    Raises:
        TypeError: `bias` is neither a tensor nor a FactoredBias.
        ValueError: shapes that do not fit, both `mask` and `kv_lengths`, or a bias tensor that needs a gradient.
        NotLowRankError: a bias tensor for which no factors keep `tol` at less than the cost of a dense kernel.
        NotImplementedError: `return_aux` with a bias tensor, or what `attention` raises.

    Supports:
        Gradients to q, k, v and the factors, summed over the rows.

    Examples:
        >>> import torch, flashbias as fb
        >>> from flashbias.integrations.protein import triangle_attention
        >>> q, k, v = torch.randn(3, 1, 24, 4, 24, 8)  # [B, rows, heads, residues, D]
        >>> bias = fb.NeuralBias(in_features=5, num_heads=4, rank=6, hidden=(16,))(torch.randn(1, 24, 5))
        >>> mask = torch.ones(1, 24, 1, 1, 24, dtype=torch.bool)
        >>> triangle_attention(q, k, v, bias, mask).shape
        torch.Size([1, 24, 4, 24, 8])

    Reference:
        Jumper et al., "Highly accurate protein structure prediction with AlphaFold" (2021), supplement, algorithms 13
        and 14, https://doi.org/10.1038/s41586-021-03819-2; Wu et al., https://arxiv.org/abs/2505.12044, section 4.
    """
    _check_kind(bias)
    if return_aux and isinstance(bias, Tensor):
        raise NotImplementedError(
            "return_aux=True needs bias as a FactoredBias: compressing a tensor drops a constant in each row, which "
            "lse and max would show"
        )
    q, k, v = (_with_batch(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    if isinstance(bias, FactoredBias):
        bias = replace(bias, phi_q=_with_rows("phi_q", bias.phi_q), phi_k=_with_rows("phi_k", bias.phi_k))
    else:
        bias = _with_batch("bias", bias)
        _check_shape("bias", bias, (q.shape[0], 1, *q.shape[2:4], k.shape[3]))
    keep = _valid_keys(mask, kv_lengths, q, k)
    factors = _factors(bias, q, keep, tol, needs_grad=any(x.requires_grad for x in (q, k, v)))
    out = attention(q, k, v, factors, attn_mask=keep, scale=scale, impl=impl, return_lse=return_aux)
    return out if isinstance(out, Tensor) else (*out, _largest_scores(q, k, factors, keep, scale))


def pair_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | FactoredBias,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    tol: float = 1e-3,
    impl: str = "auto",
) -> Tensor:
    """Attend over single tokens with a bias from their pairs: the core of AlphaFold 3's AttentionPairBias.

    Formula: `out = softmax(scale * q k^T + bias) v`, over the keys where `mask` is True.

    Projections, gates and norms around it stay the model's. Samples of a diffusion model that share a bias are a batch
    dimension of q, k and v where that of the bias is 1; nothing is expanded.

    A bias tensor is compressed at each call, at the cost that `triangle_attention` states. The bias of the trunk is
    the same for all steps of the diffusion: compress it once, `flashbias.compress(bias, tol, table=None)`, and pass
    the factors.

    Args:
        q: `[*batch, H, N, D]`.
        k: `[*batch, H, M, D]`.
        v: `[*batch, H, M, D_v]`.
        bias: factors `[*batch, H or 1, N, R]` and `[*batch, H or 1, M, R]`, or a tensor `[*batch, H, N, M]`; batch
            dimensions equal to those of q, or 1.
        mask: booleans that broadcast to `[*batch, H, N, M]`, `[*batch, 1, 1, M]` for valid tokens.
        scale: factor of the dot products; default `1 / sqrt(D)`.
        tol: as in `triangle_attention`.
        impl: as in `attention`.

    Returns:
        `[*batch, H, N, D_v]` in q's dtype; rows without a valid key are 0.

    Raises:
        TypeError: `bias` is neither a tensor nor a FactoredBias, or `mask` is not boolean.
        ValueError: shapes that do not fit, or a bias tensor that needs a gradient.
        NotLowRankError: a bias tensor for which no factors keep `tol` at less than the cost of a dense kernel.

    Supports:
        Gradients to q, k, v and the factors, summed over the dimensions that these share.

    Examples:
        >>> import torch, flashbias as fb
        >>> from flashbias.integrations.protein import pair_bias_attention
        >>> q, k, v = torch.randn(3, 5, 4, 30, 8)  # [samples, heads, tokens, D]
        >>> bias = fb.FactoredBias(torch.randn(1, 4, 30, 6), torch.randn(1, 4, 30, 6))
        >>> pair_bias_attention(q, k, v, bias).shape
        torch.Size([5, 4, 30, 8])

    Reference:
        Abramson et al., "Accurate structure prediction of biomolecular interactions with AlphaFold 3" (2024),
        supplement, algorithm 24, https://doi.org/10.1038/s41586-024-07487-w.
    """
    _check_kind(bias)
    if isinstance(bias, Tensor) and bias.shape[-3:] != (*q.shape[-3:-1], k.shape[-2]):
        raise ValueError(
            f"bias must be [*batch, {', '.join(map(str, (*q.shape[-3:-1], k.shape[-2])))}], "
            f"got shape {tuple(bias.shape)}"
        )
    factors = _factors(bias, q, mask, tol, needs_grad=any(x.requires_grad for x in (q, k, v)))
    out = attention(q, k, v, factors, attn_mask=mask, scale=scale, impl=impl)
    assert isinstance(out, Tensor)
    return out


# -------------------------------------------------------------------- the bias as factors


def _factors(bias: Tensor | FactoredBias, q: Tensor, keep: Tensor | None, tol: float, needs_grad: bool) -> FactoredBias:
    """A bias tensor `[*batch, H, N, M]` compressed for what will be read of it; factors as they are."""
    if isinstance(bias, FactoredBias):
        return bias
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "bias is a tensor that needs a gradient, and the factors that compression finds are constants: pass a "
            "FactoredBias (of a NeuralBias, for instance), or bias.detach()"
        )
    if 0 in bias.shape or 0 in q.shape:  # there is no score that a bias could be added to
        return FactoredBias(bias.new_zeros(1, bias.shape[-2], 1), bias.new_zeros(1, bias.shape[-1], 1))
    needs_grad = needs_grad and torch.is_grad_enabled()
    return compressed(bias, keep, tol, q.shape[:-3], q.shape[-1], needs_grad=needs_grad)


def compressed(
    bias: Tensor, keep: Tensor | None, tol: float, batch: Sequence[int], head_dim: int, *, needs_grad: bool
) -> FactoredBias:
    """Compress a bias tensor for the attention that will read it.

    Args:
        bias: `[*batch or 1, H, N, M]`, without a gradient.
        keep: booleans that broadcast to the scores `[*batch, H, N, M]`, True where an entry is read; None: everywhere.
        tol: as in `compress`.
        batch: the batch dimensions of the queries.
        head_dim: width of the queries.
        needs_grad: whether queries, keys or values need gradients, which changes what forms cost.

    Returns:
        Constant factors that keep `tol`, with their report.

    Raises:
        ValueError: entries that are read are not finite.
        NotLowRankError: no factors keep `tol` at less than the cost of a dense kernel.
    """
    workload = Workload(
        *bias.shape[-3:],
        head_dim=head_dim,
        batch=math.prod(batch),
        shared_bias=math.prod(bias.shape[:-3]),
        training="frozen" if needs_grad else "none",
    )
    read = _read_by_any(keep, bias.shape)
    if read is not None and not bool(read.any()):  # nothing is, so that any bias will do
        bias, read = torch.zeros_like(bias), None
    factors = compress(bias, tol, table=None, mask=read, workload=workload)
    assert isinstance(factors, FactoredBias), "a MixedBias comes of allow_dense alone"
    return factors


def _read_by_any(keep: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The entries of a bias that some element of the batch reads: `keep` reduced to a shape that broadcasts to it."""
    if keep is None:
        return None
    keep = keep.flatten(0, keep.dim() - len(shape)).any(0, keepdim=True) if keep.dim() > len(shape) else keep
    for dim in range(-keep.dim(), 0):
        if shape[dim] == 1:
            keep = keep.any(dim, keepdim=True)
    return keep


def _with_rows(name: str, phi: Tensor) -> Tensor:
    """`[B, H, Q, R]` to `[B, 1, H, Q, R]`; shared factors `[H, Q, R]` broadcast as they are."""
    if phi.dim() > 4 and phi.shape[-4] != 1:
        raise ValueError(f"{name} of bias must be [B, 1, H, length, R] or [B, H, length, R], got {tuple(phi.shape)}")
    return phi[:, None] if phi.dim() == 4 else phi


# -------------------------------------------------------------------- what else the signature has


def _valid_keys(mask: Tensor | None, kv_lengths: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """`[B, N, 1, 1, K]` booleans."""
    if mask is not None and kv_lengths is not None:
        raise ValueError("mask and kv_lengths say the same: give one of them")
    lead, length = q.shape[:2], k.shape[-2]
    if kv_lengths is not None:
        _check_shape("kv_lengths", kv_lengths, (*lead, 1, 1, 1))
        return torch.arange(length, device=k.device) < kv_lengths
    if mask is None:
        return None
    mask = _with_batch("mask", mask).bool()
    _check_shape("mask", mask, (*lead, 1, 1, length))
    return mask


@torch.no_grad()
def _largest_scores(q: Tensor, k: Tensor, bias: FactoredBias, keep: Tensor | None, scale: float | None) -> Tensor:
    """`[B, N, H, Q]`: the maximum of each row's scores, a block of queries at a time."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = max(1, BLOCK_ENTRIES // max(1, math.prod(q.shape[:-2]) * k.shape[-2]))
    key = k.to(dtype).mT
    largest = []
    for start in range(0, q.shape[-2], queries):
        block = slice(start, start + queries)
        scores = scale * (q[..., block, :].to(dtype) @ key) + bias.slice(block).dense(dtype)
        if keep is not None:
            scores = scores.masked_fill(~keep, -math.inf)
        largest.append(scores.amax(-1))
    return torch.cat(largest, dim=-1)


# -------------------------------------------------------------------- checks


def _check_kind(bias: object) -> None:
    if not isinstance(bias, (Tensor, FactoredBias)):
        raise TypeError(f"bias must be a FactoredBias or a tensor, got {type(bias).__name__}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _with_batch(name: str, tensor: Tensor) -> Tensor:
    """Five dimensions; four stand for a batch of one."""
    if tensor.dim() not in (4, 5):
        raise ValueError(f"{name} must have 5 dimensions, or 4 for a batch of one, got shape {tuple(tensor.shape)}")
    return tensor if tensor.dim() == 5 else tensor[None]
