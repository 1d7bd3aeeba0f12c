"""The agreement check: what a provider returns against float64, before its time is taken.

The reference is computed here, in plain formulas and apart from every implementation of the library, so
that nothing is compared with itself. It streams over blocks of scores and keeps O(N) memory, which lets the
check cover the case at full size: on an H200 it costs well under a second for each case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.bench.cases import Inputs

__all__ = ["TOLERANCE", "Reference", "max_rel_error"]

# Half precision attention agrees with float64 within 1e-3 to 1e-2 of its norm, TF32 within 3e-4.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}

BLOCK_SCORES = 2**25  # scores held at once, in float64: 256 MiB for each temporary
CHECKED_SCORES = 2**32  # beyond it only some of the heads are checked
PROBES = 4


@dataclass(frozen=True, eq=False)
class Reference:
    """Outputs and gradients of a case, computed in float64, kept in float32, for the heads that are checked.

    `tensors` holds `out, query, key, value` as `[B, heads, N, d]` and, for gradients of the bias,
    `phi_q, phi_k` as `[B or 1, heads or 1, N, R]` and `bias`: the gradient of a dense bias times `probe`.
    """

    heads: tuple[int, ...]
    probe: Tensor
    tensors: dict[str, Tensor]

    @classmethod
    def compute(cls, inputs: Inputs, *, biased: bool, grads: bool) -> Reference:
        """Compute softmax(scale q kᵀ [+ phi_q phi_kᵀ]) v and, on request, every gradient of it.

        With P the probabilities and dP = dout vᵀ: dS = P ⊙ (dP − rowsum(dout ⊙ out)), dq = scale dS k,
        dk = scale dSᵀ q, dv = Pᵀ dout, dphi_q = dS phi_k, dphi_k = dSᵀ phi_q, dbias = dS; what is
        broadcast is summed.

        Args:
            inputs: of the case.
            biased: whether the bias is added.
            grads: whether gradients are wanted as well.
        """
        inputs = inputs.flat()
        case, device = inputs.case, inputs.query.device
        heads = _checked_heads(inputs, biased and grads and case.learns_bias)
        # A gradient of a dense bias is compared through random projections of its rows.
        probe = torch.randn(case.seqlen, PROBES, device=device, dtype=torch.float64)
        sums = _zeros(inputs, heads, biased=biased, grads=grads)
        for slot, head in enumerate(heads):
            for batch, queries in _blocks(inputs.query.shape[0], case.seqlen):
                _add_block(sums, inputs, slot, head, batch, queries, probe, biased=biased, grads=grads)
        return cls(heads, probe, {name: value.float() for name, value in sums.items()})


def _checked_heads(inputs: Inputs, needs_shared_sums: bool) -> tuple[int, ...]:
    """All heads where that is cheap or a gradient is a sum over heads; else some, first and last included."""
    case = inputs.case
    shared_over_heads = 1 in (inputs.phi_q.shape[1], inputs.phi_k.shape[1])
    affordable = CHECKED_SCORES // (inputs.query.shape[0] * case.seqlen**2)
    if affordable >= case.num_heads or (needs_shared_sums and shared_over_heads):
        return tuple(range(case.num_heads))
    count = max(affordable, 1)
    return tuple(sorted({round(h) for h in torch.linspace(0, case.num_heads - 1, count).tolist()}))


def _zeros(inputs: Inputs, heads: tuple[int, ...], *, biased: bool, grads: bool) -> dict[str, Tensor]:
    """Float64 accumulators, one for each result."""
    batch, _, seqlen, head_dim = inputs.query.shape
    names = ("out", "query", "key", "value") if grads else ("out",)
    shapes = {name: (batch, len(heads), seqlen, head_dim) for name in names}
    if biased and grads:
        bias_batch = inputs.phi_q.shape[0]
        shapes["bias"] = (bias_batch, len(heads), seqlen, PROBES)
        if inputs.case.learns_bias:
            for name, phi in (("phi_q", inputs.phi_q), ("phi_k", inputs.phi_k)):
                shapes[name] = (bias_batch, min(phi.shape[1], len(heads)), seqlen, phi.shape[-1])
    return {name: torch.zeros(shape, dtype=torch.float64, device=inputs.query.device) for name, shape in shapes.items()}


def _blocks(batch: int, seqlen: int) -> Iterator[tuple[slice, slice]]:
    """Cut one head into blocks of batch entries and of query rows with at most `BLOCK_SCORES` scores each."""
    rows = max(1, min(seqlen, BLOCK_SCORES // seqlen))
    entries = max(1, BLOCK_SCORES // (rows * seqlen)) if rows == seqlen else 1
    for first in range(0, batch, entries):
        for row in range(0, seqlen, rows):
            yield slice(first, min(first + entries, batch)), slice(row, min(row + rows, seqlen))


def _add_block(
    sums: dict[str, Tensor],
    inputs: Inputs,
    slot: int,
    head: int,
    batch: slice,
    queries: slice,
    probe: Tensor,
    *,
    biased: bool,
    grads: bool,
) -> None:
    """Add what a block of batch entries and query rows of one head contributes to every result."""
    scale = inputs.case.scale
    q, dout = (t[batch, head, queries].double() for t in (inputs.query, inputs.dout))
    k, v = (t[batch, head].double() for t in (inputs.key, inputs.value))
    scores = scale * q @ k.mT
    bias_batch = batch if inputs.phi_q.shape[0] > 1 else slice(0, 1)
    phi_q = inputs.phi_q[bias_batch, head % inputs.phi_q.shape[1], queries].double()
    phi_k = inputs.phi_k[bias_batch, head % inputs.phi_k.shape[1]].double()
    if biased:
        scores += phi_q @ phi_k.mT
    if inputs.case.is_causal:
        i = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
        scores.masked_fill_(torch.arange(k.shape[1], device=q.device) > i, -torch.inf)
    p = torch.softmax(scores, dim=-1)
    out = p @ v
    sums["out"][batch, slot, queries] = out
    if not grads:
        return
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    sums["query"][batch, slot, queries] = scale * ds @ k
    sums["key"][batch, slot] += scale * ds.mT @ q
    sums["value"][batch, slot] += p.mT @ dout
    if not biased:
        return
    if inputs.phi_q.shape[0] == 1:
        ds = ds.sum(0, keepdim=True)  # one bias for the whole batch takes the sum of its gradients
    sums["bias"][bias_batch, slot, queries] += ds @ probe
    if inputs.case.learns_bias:
        sums["phi_q"][bias_batch, slot % sums["phi_q"].shape[1], queries] += ds @ phi_k
        sums["phi_k"][bias_batch, slot % sums["phi_k"].shape[1]] += ds.mT @ phi_q


def max_rel_error(results: dict[str, Tensor], reference: Reference) -> float:
    """Largest relative error of a provider's results.

    For every result and every (batch, head) pair the error is ‖x − ref‖ / ‖ref‖, Frobenius norms over tokens
    and columns; the largest of them is returned, so that a single wrong window or head cannot hide in a norm
    over many. A gradient of a dense bias is projected onto the reference's probe first. Infinite where a
    value is not finite.

    Args:
        results: by name, `out` and the gradients that the provider computes, with one batch dimension.
        reference: of the same case; it must hold every name in `results`.

    Raises:
        ValueError: a result has another shape than the reference.
    """
    worst = 0.0
    for name, actual in results.items():
        expected = reference.tensors[name]
        heads = (0,) if actual.shape[1] == 1 else reference.heads
        chosen = _project(actual, heads, reference.probe) if name == "bias" else actual[:, list(heads)]
        if chosen.shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(chosen.shape)}, the reference {tuple(expected.shape)}")
        error = torch.linalg.vector_norm(chosen.float() - expected, dim=(-2, -1))
        norm = torch.linalg.vector_norm(expected, dim=(-2, -1))
        relative = error / norm.clamp_min(torch.finfo(torch.float32).tiny)
        worst = max(worst, relative.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item())
    return worst


def _project(dbias: Tensor, heads: tuple[int, ...], probe: Tensor) -> Tensor:
    """`[B, heads, N, M] @ probe`, a block of rows at a time: the whole matrix upcast could be many GB."""
    rows = max(1, BLOCK_SCORES // dbias.shape[-1])
    parts = [
        dbias[batch, head, first : first + rows].double() @ probe
        for batch in range(dbias.shape[0])
        for head in heads
        for first in range(0, dbias.shape[2], rows)
    ]
    return torch.cat(parts).reshape(dbias.shape[0], len(heads), dbias.shape[2], probe.shape[-1])
