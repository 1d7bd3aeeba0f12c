"""What is attended to, by which ways, and what each way must send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import flashbias as fb
import flashbias.distributed as cp
from flashbias.bench.cases import CASES, Case

__all__ = ["ALONE", "Part", "Way", "points", "relative_error", "sample", "theory", "ways", "work"]

TIMES = (2, 4, 8, 16)
"""Lengths of the language model, in multiples of its frozen case's."""

POINTS = (132_871, 1_048_576)
"""Points of the meshes."""

CONTIGUOUS_UP_TO = 65_536
"""Tokens up to which the order that wastes half of a causal ring is timed too."""

GRADIENTS = ("query", "key", "value", "phi_q", "phi_k")


@dataclass(frozen=True)
class Way:
    """How ranks share a sequence; `strategy` "alone" is one GPU with all of it."""

    strategy: str
    order: str = "contiguous"


ALONE = Way("alone")


def points(is_small: bool) -> list[Case]:
    """The problems, cheapest first: a causal ALiBi model and a mesh, each at several lengths."""
    alibi, mesh = replace(CASES["alibi-128-16k"], name="alibi-128"), replace(CASES["mesh-32k"], name="mesh")
    times, meshes = TIMES, POINTS
    if is_small:
        alibi, mesh = replace(alibi, num_heads=4, head_dim=32, seqlen=64), replace(mesh, num_heads=4)
        times, meshes = (2, 4), (131, 256)
    lengths = [(alibi, n * alibi.seqlen) for n in times] + [(mesh, n) for n in meshes]
    return sorted((replace(case, seqlen=n) for case, n in lengths), key=work)


def work(case: Case) -> float:
    """Grows as the time does: products of scores and values."""
    return case.num_heads * case.seqlen**2 * max(case.head_dim, 64) * (0.5 if case.is_causal else 1.0)


def ways(case: Case, cp_size: int) -> list[Way]:
    """How a case is shared, without those that its heads do not allow."""
    if cp_size == 1:
        return []
    found = [Way("ring", "zigzag" if case.is_causal else "contiguous")]
    if case.num_heads % cp_size == 0:
        found.append(Way("ulysses"))
    if case.is_causal and case.seqlen <= CONTIGUOUS_UP_TO:
        found.append(Way("ring", "contiguous"))
    return found


class Part:
    """A rank's tokens of a case, and its passes.

    Args:
        case: the whole.
        way: how it is shared.
        cp_size: ranks that share it.
        cp_rank: this one's place.
        device: where it lives.
        dtype: of query, key and value.
    """

    def __init__(
        self, case: Case, way: Way, cp_size: int, cp_rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.case, self.way = case, way
        self.layout = cp.Layout.of(case.seqlen, cp_size, way.order)
        self.rank = cp_rank
        whole = case.inputs(dtype, device)  # the same numbers on every rank
        names = (*GRADIENTS, "dout")
        cut = {name: self.layout.cut(getattr(whole, name), cp_rank, -2).contiguous() for name in names}
        del whole
        self.dout = cut.pop("dout")
        frozen = () if case.learns_bias else ("phi_q", "phi_k")
        self.leaves = {name: x.clone().requires_grad_(name not in frozen) for name, x in cut.items()}
        self.learned = [name for name in GRADIENTS if name not in frozen]

    def passes(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """What is timed, by name; each gives tensors whose last dimensions are tokens and width."""
        return {"fwd": self.output, "fwdbwd": self.both}

    def output(self) -> dict[str, Tensor]:
        """The output, without a thought of gradients."""
        with torch.no_grad():
            return {"out": self.forward()}

    def forward(self) -> Tensor:
        """The output of this rank's tokens."""
        q, k, v, phi_q, phi_k = (self.leaves[name] for name in GRADIENTS)
        bias, is_causal = fb.FactoredBias(phi_q, phi_k), self.case.is_causal
        if self.way == ALONE:
            out = fb.attention(q, k, v, bias, is_causal=is_causal)
        else:
            out = cp.context_parallel_attention(
                q, k, v, bias, is_causal=is_causal, strategy=self.way.strategy, order=self.way.order,
                seqlen=self.case.seqlen, check=False,
            )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def both(self) -> dict[str, Tensor]:
        """The output and all gradients."""
        out = self.forward()
        grads = torch.autograd.grad(out, [self.leaves[name] for name in self.learned], self.dout)
        return {"out": out.detach()} | dict(zip(self.learned, grads, strict=True))

    def rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Rows of the whole sequence, float32; zeros where another rank holds them."""
        own = self.layout.positions(self.rank, x.device)
        held = torch.isin(chosen, own)
        found = x.new_zeros(*x.shape[:-2], len(chosen), x.shape[-1], dtype=torch.float32)
        found[..., held, :] = x[..., torch.searchsorted(own, chosen[held]), :].float()
        return found

    def explained(self) -> str:
        """Which implementation attends where one GPU does."""
        q, k, v, phi_q, phi_k = (self.leaves[name] for name in GRADIENTS)
        return fb.explain(q, k, v, fb.FactoredBias(phi_q, phi_k), is_causal=self.case.is_causal).impl


def sample(seqlen: int, count: int, device: torch.device) -> Tensor:
    """Positions whose rows are compared: spread over the sequence, both ends among them."""
    return torch.linspace(0, seqlen - 1, min(count, seqlen), dtype=torch.float64).round().long().unique().to(device)


def theory(case: Case, way: Way, cp_size: int, element: int, is_backward: bool) -> tuple[float, float]:
    """Bytes that a rank must send in the mean, and those among them that are factors."""
    if way.strategy == "ring":
        return _ring_theory(case, cp_size, element, is_backward)
    return _all_to_all_theory(case, cp_size, element, is_backward)


def _ring_theory(case: Case, cp_size: int, element: int, is_backward: bool) -> tuple[float, float]:
    # All ranks together send what one with all tokens would.
    whole = cp.RingBytes(
        cp_size=cp_size, tokens=case.seqlen, num_kv_heads=case.num_heads, head_dim=case.head_dim,
        head_dim_v=case.head_dim, element=element, rank=case.rank, factor_heads=factor_heads(case),
    )  # fmt: skip
    sent, factors = whole.forward, (cp_size - 1) * whole.factors
    if is_backward:
        learned = whole if case.learns_bias else replace(whole, rank=0)
        sent += whole.forward + cp_size * learned.gradients
        factors += (cp_size - 1) * whole.factors + cp_size * (learned.gradients - replace(whole, rank=0).gradients)
    return sent / cp_size, factors / cp_size


def factor_heads(case: Case) -> int:
    """Heads of phi_k: ALiBi's and a mesh's are shared by all."""
    assert case.bias in ("alibi", "distance")
    return 1


def _all_to_all_theory(case: Case, cp_size: int, element: int, is_backward: bool) -> tuple[float, float]:
    rows = case.num_heads * case.seqlen
    away = (cp_size - 1) / cp_size  # what all heads have goes to one rank each, what they share to every rank
    inputs, results = 3 * rows * case.head_dim * element, rows * (case.head_dim * element + 4)
    factors = (rows * away + factor_heads(case) * case.seqlen * (cp_size - 1)) * case.rank * 4
    sent, of_bias = away * (inputs + results) + factors, factors
    if is_backward:
        sent, of_bias = sent + away * (inputs + results), of_bias
        if case.learns_bias:
            sent, of_bias = sent + factors, of_bias + factors
    return sent / cp_size, of_bias / cp_size


def relative_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest of the tensors' errors, each relative to its own norm; NaN if there is one."""
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, right, strict=True)])
    return float(errors.max())
