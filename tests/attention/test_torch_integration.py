"""What torch offers around a function: compile, export, autocast, checkpointing, higher derivatives.

Through `sdpa` and `reference` on CPUs; `triton/test_integration.py` has what concerns the kernels' operators.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashbias as fb


def inputs(dtype: torch.dtype = torch.float32, n: int = 12, requires_grad: bool = False) -> list[Tensor]:
    """query, key, value, phi_q, phi_k."""
    torch.manual_seed(0)
    shapes = [(2, 4, n, 8)] * 3 + [(4, n, 3), (1, n, 3)]
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, **options: Any) -> Tensor:
    return fb.attention(q, k, v, fb.FactoredBias(phi_q, phi_k), **options)  # type: ignore[return-value]


def results(function: Any, leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


# -------------------------------------------------------------------- torch.compile

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    """The bias made inside the compiled region, outputs and gradients."""

    def model(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
        return attend(q * 2.0, k, v, phi_q.tanh(), phi_k, is_causal=True)

    leaves = inputs(requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for found, wanted in zip(results(compiled, leaves), results(model, leaves), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_bias_passes_through_compile_as_an_argument() -> None:
    """Its tensors are inputs of the graph, not constants caught in it."""

    def model(q: Tensor, k: Tensor, v: Tensor, bias: fb.FactoredBias) -> Tensor:
        return fb.attention(q, k, v, bias, impl="sdpa")  # type: ignore[return-value]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        q, k, v, phi_q, phi_k = inputs()
        torch.manual_seed(seed)
        bias = fb.FactoredBias(torch.randn_like(phi_q).requires_grad_(), phi_k, torch.randn(4, 5))
        out = compiled(q, k, v, bias)
        torch.testing.assert_close(out, model(q, k, v, bias), atol=1e-5, rtol=1e-5)
        out.sum().backward()
        assert bias.phi_q.grad is not None


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_every_option_compiles(impl: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        bias = fb.FactoredBias(phi_q, phi_k, table) + fb.FactoredBias(phi_q, phi_k)
        return fb.attention(q, k, v, bias, attn_mask=mask, window=(5, 2), scale=0.3, impl=impl)  # type: ignore[return-value]

    arguments = [*inputs(), torch.randn(1, 7), torch.rand(2, 1, 1, 12) > 0.2]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), model(*arguments), atol=1e-5, rtol=1e-5)


def test_another_length_does_not_recompile_for_ever() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for n in (12, 13, 17, 24):
        compiled(*inputs(n=n))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("keys", ["as many", "more"])
def test_causal_attention_compiles_for_sizes_that_are_symbols(keys: str) -> None:
    """All sizes, heads among them, beside a bias whose heads are a number."""

    def model(q: Tensor, k: Tensor) -> Tensor:
        bias = fb.Alibi(4)(q.shape[-2], k.shape[-2])
        return fb.attention(q, k, k, bias, is_causal=True, causal_alignment="bottom_right")  # type: ignore[return-value]

    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for n in (12, 20):
        q, k = torch.randn(2, 4, n, 8), torch.randn(2, 4, n if keys == "as many" else n + 3, 8)
        torch.testing.assert_close(compiled(q, k), model(q, k))


# -------------------------------------------------------------------- export, autocast, checkpointing


def test_forward_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
            return attend(q, k, v, phi_q, phi_k, is_causal=True)

    arguments = tuple(inputs())
    program = torch.export.export(Layer(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Layer()(*arguments))


def test_exports_for_any_length() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alibi = fb.Alibi(4)

        def forward(self, q: Tensor) -> Tensor:
            return fb.attention(q, q, q, self.alibi(q.shape[-2], q.shape[-2]), is_causal=True)  # type: ignore[return-value]

    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(Layer(), (torch.randn(1, 4, 12, 8),), dynamic_shapes=({2: length},))
    q = torch.randn(1, 4, 40, 8)
    torch.testing.assert_close(program.module()(q), Layer()(q))


def test_sizes_are_known_without_values() -> None:
    """On torch's meta device, as models are laid out before they have weights."""
    q = torch.randn(2, 4, 12, 8, device="meta")
    bias = fb.Alibi(4)(12, 12).to("meta")
    for impl in ("auto", "sdpa", "reference"):
        out = fb.attention(q, q, q[..., :5], bias, is_causal=True, impl=impl)
        assert isinstance(out, Tensor) and out.shape == (2, 4, 12, 5) and out.device.type == "meta"


def test_a_bias_exports_as_an_argument() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, bias: fb.FactoredBias) -> Tensor:
            return fb.attention(q, q, q, bias)  # type: ignore[return-value]

    q, _, _, phi_q, phi_k = inputs()
    bias = fb.FactoredBias(phi_q, phi_k, ranks=(1, 2, 3, 3))
    program = torch.export.export(Layer(), (q, bias))
    torch.testing.assert_close(program.module()(q, bias), Layer()(q, bias))


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_autocast_casts_queries_and_leaves_factors(impl: str) -> None:
    q, k, v, phi_q, phi_k = inputs()
    phi_k = phi_k + 1000.0  # bfloat16 would lose it
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, phi_q, phi_k, impl=impl)
    wanted = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), phi_q, phi_k, impl=impl)
    rounded = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), phi_q, phi_k.bfloat16().float(), impl=impl)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    assert not torch.equal(found, rounded)


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*inputs(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(impl: str, use_reentrant: bool) -> None:
    def plain(*leaves: Tensor) -> Tensor:
        return attend(*leaves, impl=impl)

    def kept(*leaves: Tensor) -> Tensor:
        return checkpoint(plain, *leaves, use_reentrant=use_reentrant)  # type: ignore[return-value]

    def outcome(function: Any) -> list[Tensor]:
        leaves = inputs(requires_grad=True)
        out = function(*leaves)
        out.sin().sum().backward()  # the reentrant kind knows no torch.autograd.grad
        return [out, *(leaf.grad for leaf in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(outcome(kept), outcome(plain), strict=True))


def test_checkpointing_of_a_layer_that_takes_a_bias() -> None:
    def layer(q: Tensor, bias: fb.FactoredBias) -> Tensor:
        return fb.attention(q, q, q, bias)  # type: ignore[return-value]

    q, _, _, phi_q, phi_k = inputs(requires_grad=True)
    bias = fb.FactoredBias(phi_q, phi_k)
    found = torch.autograd.grad(checkpoint(layer, q, bias, use_reentrant=False).sin().sum(), (q, phi_q, phi_k))  # type: ignore[union-attr]
    wanted = torch.autograd.grad(layer(q, bias).sin().sum(), (q, phi_q, phi_k))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# -------------------------------------------------------------------- derivatives of the reference


def small(**options: Any) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(2, 2, 3, 2), (2, 1, 4, 2), (2, 1, 4, 3), (1, 2, 3, 2), (2, 1, 4, 2), (2, 3)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, table: Tensor) -> Any:
        bias = fb.FactoredBias(phi_q, phi_k, table)
        return fb.attention(q, k, v, bias, enable_gqa=True, impl="reference", **options)

    return function, leaves


OPTIONS = {
    "plain": {},
    "lse": {"return_lse": True},
    "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
    "dead-rows": {"attn_mask": torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_reference(name: str) -> None:
    function, leaves = small(**OPTIONS[name])
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "dead-rows"])
def test_gradgradcheck_of_the_reference(name: str) -> None:
    function, leaves = small(**OPTIONS[name])
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("options", [{}, {"window": (3, 3)}, {"is_causal": True}], ids=["full", "window", "causal"])
def test_gradients_of_torch_func(options: dict[str, Any]) -> None:
    """Blocks of queries are kept there and not recomputed: torch.func has no hooks for saved tensors."""
    q, k, v, phi_q, phi_k = inputs()
    table = torch.randn(4, 7)

    def loss(table: Tensor) -> Tensor:
        bias = fb.FactoredBias(phi_q, phi_k, table)
        return fb.attention(q, k, v, bias, impl="sdpa", **options).sin().sum()  # type: ignore[union-attr]

    leaf = table.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(table), wanted, atol=1e-5, rtol=1e-5)
