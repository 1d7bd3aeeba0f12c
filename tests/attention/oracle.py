"""What is right: attention written out pair by pair, and how far from it a result may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tests.attention.problem import Problem
from torch import Tensor

RECOMPUTED = ("dquery", "dkey", "dvalue", "dphi_q", "dphi_k", "dtable")
"""Results of the backward pass, whose weights are computed once more."""

UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32)}


@dataclass
class Results:
    """Output, log-sum-exp and gradients by name."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def names(self) -> list[str]:
        return list(self.tensors)


def visible_pairs(problem: Problem) -> Tensor | None:
    """Booleans that broadcast to `[*batch, H, N, M]`: the pairs that masks leave, by their definitions."""
    case, options = problem.case, problem.case.options
    n, m = case.n, case.seqlen_k
    device = problem.dout.device
    i, j = torch.arange(n, device=device)[:, None], torch.arange(m, device=device)[None, :]
    shift = m - n if options.get("causal_alignment") == "bottom_right" else 0
    keep = torch.ones(n, m, dtype=torch.bool, device=device)
    if options.get("is_causal"):
        keep = keep & (j <= i + shift)
    left, right = options.get("window", (None, None))
    if left is not None:
        keep = keep & (j >= i + shift - left)
    if right is not None:
        keep = keep & (j <= i + shift + right)
    if problem.attn_mask is not None:
        keep = keep & problem.attn_mask
    return None if bool(keep.all()) else keep


def dense_bias(problem: Problem, leaves: dict[str, Tensor], dtype: torch.dtype) -> Tensor | float:
    """The bias as a matrix, in the factors' own precision (float64 if asked for) and then rounded once."""
    case = problem.case
    wide = torch.float64 if dtype == torch.float64 else leaves["phi_q"].dtype
    total: Tensor | float = 0.0
    if case.rank:
        phi_q, phi_k = leaves["phi_q"].to(wide), leaves["phi_k"].to(wide)
        if case.ranks is not None:
            own = torch.tensor(case.ranks, device=phi_q.device)[:, None, None]
            phi_q = torch.where(torch.arange(case.rank, device=phi_q.device) < own, phi_q, 0.0)
        total = phi_q @ phi_k.mT
    if case.table is not None:
        table = leaves["table"].to(torch.promote_types(wide, torch.float32))
        half = table.shape[-1] // 2
        code_q = torch.arange(case.n, device=table.device) if problem.code_q is None else problem.code_q
        code_k = torch.arange(case.seqlen_k, device=table.device) if problem.code_k is None else problem.code_k
        total = total + table[:, (code_k[None, :] - code_q[:, None]).clamp(-half, half) + half]
    return total.to(dtype) if isinstance(total, Tensor) else total


def explicit(
    problem: Problem,
    leaves: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    bias_dtype: torch.dtype | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
    stretch: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention with the N×M matrix, every step in `dtype`.

    In float64 that is the truth, in the queries' dtype it is eager PyTorch.

    Args:
        problem: what to compute.
        leaves: its tensors.
        dtype: dtype of every step.
        bias_dtype: dtype that the dense bias is stored in, if another.
        kept: which weights dropout left, if it was applied.
        dropout_p: with which probability.
        stretch: what scores are multiplied by (a perturbation).

    Returns:
        Output and log-sum-exp; 0 and -inf for rows without a key.
    """
    case = problem.case
    group = case.heads // (case.kv_heads or case.heads)
    q, k, v = (leaves[name].to(dtype) for name in ("query", "key", "value"))
    k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    bias = dense_bias(problem, leaves, bias_dtype or dtype)
    scores = (q @ k.mT * problem.scale + (bias.to(dtype) if isinstance(bias, Tensor) else bias)) * stretch
    keep = visible_pairs(problem)
    if keep is not None:
        alive = keep.any(-1, keepdim=True)
        scores = scores.masked_fill(~keep & alive, -math.inf)
    weights, lse = scores.softmax(-1), scores.logsumexp(-1)
    if keep is not None:
        weights, lse = (
            weights * alive,
            lse.masked_fill(~alive.expand(*scores.shape[:-1], 1)[..., 0], -math.inf),
        )
    if kept is not None:
        weights = weights * kept / (1.0 - dropout_p)
    return weights @ v, lse


def differentiate(
    problem: Problem,
    leaves: dict[str, Tensor],
    out: Tensor,
    lse: Tensor | None,
    with_dlse: bool,
    retain_graph: bool = False,
) -> Results:
    """Gradients of `<out, dout> (+ <lse, dlse>)` over the rows that attend to something."""
    results = {"out": out}
    loss = (out * problem.dout.to(out.dtype)).sum()
    if lse is not None:
        results["lse"] = lse
        if with_dlse:
            loss = loss + (torch.where(lse.isfinite(), lse, 0.0) * problem.dlse.to(lse.dtype)).sum()
    wanted = {name: x for name, x in leaves.items() if x.requires_grad and x.numel()}
    grads = torch.autograd.grad(loss, tuple(wanted.values()), retain_graph=retain_graph)
    results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return Results({name: x.detach() for name, x in results.items()})


@dataclass
class Truth:
    """float64 results on the same quantised inputs, and how sensitive they are.

    Attributes:
        results: output, log-sum-exp and gradients.
        largest_score: largest absolute score that a mask leaves.
        moved: what each gradient would be if that of the log-sum-exp of row i were `+-||out_i * dout_i||`.
        shaken: how fast each result moves, per unit, when every score is stretched by `1 +- unit`.
    """

    results: Results
    largest_score: float
    moved: dict[str, float]
    shaken: dict[str, float]


def truth(problem: Problem, with_dlse: bool = False) -> Truth:
    """Compute everything in float64."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in problem.tensors.items()}
    out, lse = explicit(problem, leaves, torch.float64)
    results = differentiate(problem, leaves, out, lse, with_dlse, retain_graph=True)
    wanted = {name: x for name, x in leaves.items() if x.numel()}
    size = (out * problem.dout.double()).detach().norm(dim=-1)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    moved = {f"d{name}": 0.0 for name in wanted}
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):  # signs of the rounding errors are unknown: the worst of some draws
        signs = torch.randint(0, 2, lse.shape, generator=generator).to(lse.device) * 2.0 - 1.0
        loss = (finite * signs * size).sum()
        grads = torch.autograd.grad(loss, tuple(wanted.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(wanted, grads, strict=True):
            moved[f"d{name}"] = max(moved[f"d{name}"], 0.0 if grad is None else grad.norm().item())
    with torch.no_grad():
        scores = visible_scores(problem, leaves)
    unit = 2.0**-20
    stretch = 1.0 + unit * (torch.randint(0, 2, scores.shape, generator=generator).to(scores) * 2.0 - 1.0)
    shaken = differentiate(problem, leaves, *explicit(problem, leaves, torch.float64, stretch=stretch), with_dlse)
    speed = {
        name: torch.where(results[name].isinf(), 0.0, shaken[name] - results[name]).norm().item() / unit
        for name in results.names()
    }
    return Truth(results, scores.abs().max().item(), moved, speed)


def visible_scores(problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
    """Scores in the leaves' dtype, 0 where a mask hides them."""
    case = problem.case
    k = leaves["key"].repeat_interleave(case.heads // (case.kv_heads or case.heads), dim=-3)
    scores = leaves["query"] @ k.mT * problem.scale + dense_bias(problem, leaves, k.dtype)
    keep = visible_pairs(problem)
    return scores if keep is None else scores.masked_fill(~keep, 0.0)


def eager(problem: Problem, with_dlse: bool = False) -> Results:
    """PyTorch step by step in the queries' dtype, dense bias included; the log-sum-exp in float32."""
    leaves = problem.leaves()
    out, lse = explicit(problem, leaves, problem.tensors["query"].dtype)
    results = differentiate(problem, leaves, out, lse, with_dlse)
    # The log-sum-exp is float32 by contract: its yardstick rounds nothing but the bias.
    rounded = {name: x.detach().float() for name, x in problem.tensors.items()}
    bias_dtype = problem.tensors["query"].dtype
    results.tensors["lse"] = explicit(problem, rounded, torch.float32, bias_dtype=bias_dtype)[1]
    return results


def assert_close_to_oracle(problem: Problem, results: Results, with_dlse: bool = False) -> None:
    """Assert that no result is much further from the truth than eager PyTorch is.

    With `e(x) = ||x - exact||` (norm over the tensor, exact in float64 on the same quantised inputs), u the
    unit roundoff of the queries' dtype (2^-24, 2^-11, 2^-8), w = 2^-24 that of float32, a result passes if

        e(result) <= 2 e(eager) + (2 u + w max|score|) ||exact|| + 2 w ||shaken||
                     + (u + sqrt(head_dim_v) w) ||moved||.

    - `2 e(eager)`: eager rounds scores, bias, weights and result to that dtype once each; an implementation
      that rounds as often, in another order, has errors of the same size. Two is what is left for the order.
    - `2 u ||exact||`: where eager happens to be exact, the weights and the result are still rounded once
      each, each rounding moving an element by at most u of itself.
    - `w max|score| ||exact|| + 2 w ||shaken||`: weights are exp(score - lse) with a float32 exponent. Rounding
      the log-sum-exp moves a row as a whole by w |lse| of itself; rounding a score and the difference moves
      each weight on its own by up to 2 w |score|, which `shaken` follows to the result. Both matter in float32
      alone, where they come to 3 to 8 units of roundoff at usual sizes.
    - `sqrt(R) w max|score| ||exact||`, gradients alone: their weights are exp(score - lse) with scores that are summed
      anew, in an order of their own, over R products of the factors. Rounding the partial sums moves a row by about
      sqrt(R) w |score| against its log-sum-exp, which eager attention, where the weights are kept, does not see. It
      counts where biases are huge, and by the CPU: numpy's products sum a matrix and its transpose differently.
    - `(u + sqrt(head_dim_v) w) ||moved||`, gradients alone: with `dS = P (dP - delta)`, delta is the dot
      product of the gradient and the *stored*, hence rounded output, and as long a float32 sum as dP is. Both
      together are off by about that factor times `||out_i * dout_i||` in row i, which moves every gradient
      exactly as a gradient of the log-sum-exp of that size would. It counts where a gradient vanishes by
      cancellation, as for a single key.

    The log-sum-exp is float32 for every dtype, with u = w. Infinities (rows without a key) must be in the
    same places.
    """
    exact = truth(problem, with_dlse)
    yardstick = eager(problem, with_dlse)
    dtype = problem.tensors["query"].dtype
    w = UNIT_ROUNDOFF[torch.float32]
    failures = []
    for name in results.names():
        found, right = results[name], exact.results[name]
        assert found.shape == right.shape, f"{name} has shape {tuple(found.shape)}, not {tuple(right.shape)}"
        infinite = right.isinf()
        assert torch.equal(found.isinf(), infinite), f"{name} is infinite elsewhere"
        error, allowed = (
            torch.where(infinite, 0.0, x.double() - right).norm().item() for x in (found, yardstick[name])
        )
        size = torch.where(infinite, 0.0, right).norm().item()
        u = w if name == "lse" else UNIT_ROUNDOFF[dtype]
        bound = 2 * allowed + (2 * u + w * exact.largest_score) * size
        bound += 2 * w * exact.shaken[name]
        if name in RECOMPUTED:
            bound += problem.case.rank**0.5 * w * exact.largest_score * size
        bound += (u + problem.dout.shape[-1] ** 0.5 * w) * exact.moved.get(name, 0.0)
        if not error <= bound:
            failures.append(f"{name}: error {error:.3g} > {bound:.3g} (eager {allowed:.3g}, norm {size:.3g})")
    assert not failures, f"{problem.case} in {dtype}: " + "; ".join(failures)
