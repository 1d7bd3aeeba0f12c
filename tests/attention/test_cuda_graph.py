"""A step that has run once can be captured as a CUDA graph: nothing in it waits for the GPU or copies from the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention.machine import tiers_for_every_width
from tests.conftest import INTERPRETED
from torch import Tensor

import flashbias as fb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device"),
]

HEADS, N = 4, 192
Leaves = dict[str, Tensor]


def alibi(leaves: Leaves) -> Any:
    return fb.Alibi(HEADS).cuda()(seqlen_q=N, seqlen_k=N)


def factors(leaves: Leaves) -> fb.FactoredBias:
    return fb.FactoredBias(leaves["phi_q"], leaves["phi_k"])


def ranks(leaves: Leaves) -> fb.FactoredBias:
    return fb.FactoredBias(leaves["phi_q"], leaves["phi_k"], ranks=(1, 8, 3, 5))


def tiers(leaves: Leaves) -> fb.FactoredBias:
    """In the kernels for Hopper two launches, of a head that is a view and of heads that are copied."""
    return fb.FactoredBias(leaves["phi_q"], leaves["phi_k"], leaves["table"], ranks=(8, 8, 0, 8))


def table(leaves: Leaves) -> fb.FactoredBias:
    return fb.FactoredBias(leaves["phi_q"], leaves["phi_k"], leaves["table"])


def mixed(leaves: Leaves) -> fb.MixedBias:
    low = fb.FactoredBias(leaves["phi_q"][:3], leaves["phi_k"][:3])
    return fb.MixedBias((low, leaves["dense"]), heads=((2, 0, 3), (1,)))


SHAPES = {"phi_q": (HEADS, N, 8), "phi_k": (HEADS, N, 8), "table": (HEADS, 63), "dense": (1, N, N)}


def drawn(seed: int) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(2, HEADS, N, 64, generator=generator).bfloat16() for name in ("query", "key", "value")}
    made |= {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: x.cuda().requires_grad_() for name, x in made.items()}


@pytest.mark.parametrize("bias", [alibi, factors, ranks, tiers, table, mixed], ids=lambda bias: bias.__name__)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_captured_step_gives_the_same_bits(impl: str, bias: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed with other numbers in the same tensors, outputs and gradients are what they are without a graph."""
    if bias is mixed and impl != "auto":
        pytest.skip("dense heads go through torch")
    if bias is tiers:
        tiers_for_every_width(monkeypatch)

    def step(leaves: Leaves) -> list[Tensor]:
        out = fb.attention(
            leaves["query"], leaves["key"], leaves["value"], bias(leaves), is_causal=True, impl=impl, deterministic=True
        )
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out.float().sin().sum(), list(leaves.values()), allow_unused=True)
        return [out, *(grad for grad in grads if grad is not None)]

    leaves, others = drawn(0), drawn(1)
    if bias is alibi:  # made outside, as a model that keeps it does
        made = alibi(leaves)
        bias = lambda _: made  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(leaves)
    with torch.no_grad():
        for name, x in leaves.items():
            x.copy_(others[name])
    graph.replay()
    for got, wanted in zip(found, step(others), strict=True):
        assert torch.equal(got, wanted)
