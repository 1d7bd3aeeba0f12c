"""Attention over a protein: the inputs, the two ways to give it its bias, and the truth in float64.

The bias is `-weight_h * ||x_i - x_j||^2` between residues, one learned weight for each head. The geometry is
real; queries, keys and values are random, since no trained model is needed to measure cost and error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from flashbias.attention import attention
from flashbias.biases import SquaredDistance
from flashbias.demo.protein import crystal

__all__ = ["METHODS", "Problem", "forward", "make_problem", "training_step", "truth"]

SHORTEST_LENGTH = 4.0
"""Length scale of the first head in ångström, about that of neighbours in the chain; doubles per head."""

NUM_SCORED = 128
"""Residues that the loss looks at, as in masked modelling. Truth in float64 needs the rows of these alone."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one attention layer over a protein.

    Args:
        query: `[1, H, N, head_dim]`.
        key: `[1, H, N, head_dim]`.
        value: `[1, H, N, head_dim]`.
        coordinates: `[N, 3]` in ångström.
        weight: `[H]` in 1/ångström², the learned parameter.
        scored: `[K]`, the residues that the loss looks at.
        target: `[1, H, K, head_dim]`, what their output should be.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    coordinates: Tensor
    weight: Tensor
    scored: Tensor
    target: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What a training step needs gradients of."""
        return self.query, self.key, self.value, self.weight


def make_problem(
    copies: int, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Problem:
    """Draw the inputs for a number of copies of the protein.

    Args:
        copies: of the protein, as in `crystal`.
        num_heads: H.
        head_dim: width of queries, keys and values.
        device: where everything lives.
        dtype: of queries, keys and values; coordinates and weight are float32.
        seed: of the random numbers, which are drawn on the CPU and are thus the same on every device.

    Returns:
        The problem; its parameters require gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.from_numpy(crystal(copies)).to(device, torch.float32)
    length = coordinates.shape[0]

    def draw(rows: int) -> Tensor:
        return torch.randn(1, num_heads, rows, head_dim, generator=generator).to(device, dtype)

    lengths = SHORTEST_LENGTH * 2.0 ** torch.arange(num_heads)
    query, key, value = draw(length), draw(length), draw(length)
    problem = Problem(
        query,
        key,
        value,
        coordinates,
        weight=(0.5 / lengths.square()).to(device),
        scored=torch.randperm(length, generator=generator)[:NUM_SCORED].to(device),
        target=draw(min(NUM_SCORED, length)),
    )
    for parameter in problem.parameters:
        parameter.requires_grad_()
    return problem


# ---------------------------------------------------------------- two ways


def dense_attention(problem: Problem) -> Tensor:
    """Form the bias of every pair of residues, and give it to torch as a mask."""
    distance = torch.cdist(problem.coordinates, problem.coordinates)
    bias = -problem.weight[:, None, None] * distance.square()
    return scaled_dot_product_attention(
        problem.query, problem.key, problem.value, attn_mask=bias.to(problem.query.dtype)[None]
    )


def factored_attention(problem: Problem) -> Tensor:
    """Form five numbers for each residue."""
    bias = SquaredDistance(problem.weight.shape[0])(problem.coordinates, weight=problem.weight)
    out = attention(problem.query, problem.key, problem.value, bias)
    assert isinstance(out, Tensor)
    return out


METHODS: dict[str, Callable[[Problem], Tensor]] = {"dense": dense_attention, "factored": factored_attention}


def forward(problem: Problem, method: Callable[[Problem], Tensor]) -> tuple[Tensor, ...]:
    """Compute the output, without a graph.

    Args:
        problem: the inputs.
        method: one of `METHODS`.

    Returns:
        The output at the scored residues, `[1, H, K, head_dim]`.
    """
    with torch.no_grad():
        return (method(problem)[:, :, problem.scored],)


def training_step(problem: Problem, method: Callable[[Problem], Tensor]) -> tuple[Tensor, ...]:
    """Compute the loss at the scored residues and its gradients.

    Args:
        problem: the inputs.
        method: one of `METHODS`.

    Returns:
        Gradients to query (at the scored residues; zero elsewhere), key, value and weight.
    """
    loss = mse_loss(method(problem)[:, :, problem.scored].float(), problem.target.float())
    dquery, *rest = torch.autograd.grad(loss, problem.parameters)
    return dquery[:, :, problem.scored], *rest


# ---------------------------------------------------------------- truth


def truth(problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute what `forward` and `training_step` return, in float64 on the CPU and by the plain formula.

    Only the rows of the scored residues are formed: `[H, K, N]`.

    Args:
        problem: the inputs, exactly as they are rounded.

    Returns:
        Output, and gradients.
    """
    q, k, v, weight = (p.detach().cpu().double().requires_grad_() for p in problem.parameters)
    x, scored = problem.coordinates.cpu().double(), problem.scored.cpu()
    distance = torch.cdist(x[scored], x, compute_mode="donot_use_mm_for_euclid_dist")
    scores = q[:, :, scored] @ k.mT / q.shape[-1] ** 0.5 - weight[:, None, None] * distance.square()
    out = scores.softmax(-1) @ v
    dq, dk, dv, dweight = torch.autograd.grad(mse_loss(out, problem.target.cpu().double()), (q, k, v, weight))
    return (out.detach(),), (dq[:, :, scored], dk, dv, dweight)


def tiny(problem: Problem, length: int = 64) -> Problem:
    """Cut a problem down, to warm up with.

    Args:
        problem: any problem.
        length: residues to keep.

    Returns:
        A problem of its own with gradients of its own.
    """
    query, key, value = (x[:, :, :length].detach().requires_grad_() for x in problem.parameters[:3])
    scored = torch.arange(problem.scored.shape[0], device=query.device) % length
    return replace(problem, query=query, key=key, value=value, coordinates=problem.coordinates[:length], scored=scored)
