"""Factors of a bias that is linear in the pairs, from random sketches of the pairs: nothing is taught.

With random test matrices Ω `[N, R]` and Ψ `[N, 2R]`, a matrix B of rank R or little more is nearly

    B Ω (Ψᵀ B Ω)⁺ Ψᵀ B

(Nakatsukasa, "Fast and stable randomized low-rank matrix approximation", https://arxiv.org/abs/2009.11392). Where
B = z W for pairs z and a linear map W, its sketches are those of the pairs, mapped: B Ω = (z Ω) W. The pairs are
read twice, and no N×N matrix is formed. The means of the rows of B are left out: softmax does not see them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashbias import FactoredBias

__all__ = ["sketched"]


def sketched(z: Tensor, project: nn.Module, rank: int, seed: int = 0) -> FactoredBias:
    """Factor the bias `project(z)`.

    Args:
        z: `[B, N, N, c]`.
        project: a linear map from c to H channels, without a constant.
        rank: R; N where that is less.
        seed: of the sketches.

    Returns:
        `[B, H, N, R]` twice, float32.
    """
    batch, length = z.shape[:2]
    rank = min(rank, length)
    generator = torch.Generator(z.device).manual_seed(seed)
    test = torch.randn(3 * rank, length, device=z.device, generator=generator).to(z.dtype) / length**0.5
    right, left = test[:rank], test[rank:]
    right = right - right.mean(-1, keepdim=True)  # softmax does not see what a row's entries have in common
    of_rows = torch.bmm(right.expand(batch * length, -1, -1), z.flatten(0, 1)).unflatten(0, (batch, length))
    of_columns = torch.bmm(left.expand(batch, -1, -1), z.flatten(2)).unflatten(2, z.shape[2:])
    # Float64, because the Gram matrix squares the condition; all that is small but for the columns of N.
    b_right = project(of_rows).movedim(-1, 1).double()  # [B, H, N, R]
    left_b = project(of_columns).movedim(-1, 1).double()  # [B, H, 2R, N]
    left_b = left_b - left_b.mean(-1, keepdim=True)
    core = left.double() @ b_right  # [B, H, 2R, R]
    gram = core.mT @ core
    # What lies below the rounding of the pairs is noise, and is not to be divided by.
    ridge = torch.finfo(z.dtype).eps ** 2 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(rank, dtype=gram.dtype, device=z.device)
    root = torch.linalg.cholesky_ex(gram + (ridge + torch.finfo(torch.float32).tiny) * eye).L
    phi_q = torch.linalg.solve_triangular(root, b_right.mT, upper=False).mT
    phi_k = torch.linalg.solve_triangular(root, core.mT @ left_b, upper=False).mT
    return FactoredBias(phi_q.float(), phi_k.float())
