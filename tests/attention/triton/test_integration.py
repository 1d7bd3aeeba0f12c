"""The kernels' operators in torch: opcheck, compile, autocast, checkpointing, and no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashbias as fb
from flashbias.attention import registration

pytest.importorskip("triton")

from flashbias.attention.triton import pack


class IntegrationSuite:
    device = "cpu"

    def tensors(self, dtype: torch.dtype = torch.float32, n: int = 9, requires_grad: bool = True) -> list[Tensor]:
        """query, key, value, phi_q, phi_k, table."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 2, n, 8)] * 3 + [(1, 2, n, 3), (2, 1, n, 3), (2, 5)]
        made = [torch.randn(shape, generator=generator).to(self.device) for shape in shapes]
        made = [x.to(dtype) if index < 3 else x for index, x in enumerate(made)]
        return [x.requires_grad_(requires_grad) for x in made]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, table: Tensor, **options: Any) -> Tensor:
        return fb.attention(q, k, v, fb.FactoredBias(phi_q, phi_k, table), impl="triton", **options)  # type: ignore[return-value]

    def operator_arguments(self, leaves: list[Tensor], dropout_p: float = 0.0) -> tuple[Any, ...]:
        """Arguments of the forward operator, in the order of its schema."""
        n = leaves[0].shape[-2]
        seed = torch.tensor(5, device=self.device) if dropout_p else None
        return (*leaves, None, None, None, None, None, seed, n, n, [], 0.3, -1, 0, False, dropout_p, "triton")

    @pytest.mark.parametrize(
        ("frozen", "dropout_p"),
        [((), 0.2), ((0, 1, 2), 0.0), ((3, 4, 5), 0.0)],
        ids=["all-dropout", "bias-only", "queries-only"],
    )
    def test_opcheck_of_the_forward_operator(self, dropout_p: float, frozen: tuple[int, ...]) -> None:
        leaves = [x.detach() if i in frozen else x for i, x in enumerate(self.tensors())]
        torch.library.opcheck(registration.attention_forward, self.operator_arguments(leaves, dropout_p))

    def test_opcheck_of_the_backward_operator(self) -> None:
        leaves = self.tensors(requires_grad=False)
        arguments = self.operator_arguments(leaves)
        out, lse, _ = registration.attention_forward(*arguments)
        for needs in (
            [True] * 6,
            [False, False, False, True, True, True],
        ):
            torch.library.opcheck(
                registration.attention_backward,
                (torch.randn_like(out), torch.randn_like(lse), out, lse, needs, *arguments),
            )

    def test_nothing_is_returned_for_what_needs_no_gradient(self) -> None:
        leaves = self.tensors(requires_grad=False)
        arguments = self.operator_arguments(leaves)
        out, lse, _ = registration.attention_forward(*arguments)
        for needed in range(6):
            needs = [index == needed for index in range(6)]
            grads = registration.attention_backward(torch.ones_like(out), None, out, lse, needs, *arguments)
            assert [bool(g.numel()) for g in grads] == needs

    def packing_launches(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """One entry for each launch of the kernel that packs."""
        launches: list[Any] = []

        class Counted:
            def __getitem__(self, grid: Any) -> Any:
                launches.append(grid)
                return kernel[grid]

        kernel = pack._pack_kernel
        monkeypatch.setattr(pack, "_pack_kernel", Counted())
        return launches

    def factored(self, dtype: torch.dtype, rank: int = 2, constant: bool = False) -> list[Tensor]:
        """query, key, value, and factors that are small beside them at rank 2."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 2, 40, 32)] * 3 + [(2, 1 if constant else 40, rank), (1, 40, rank)]
        made = [torch.randn(shape, generator=generator).to(self.device) for shape in shapes]
        leaves = [x.to(dtype) if i < 3 else x for i, x in enumerate(made)]
        return [x.requires_grad_() for x in leaves]

    @staticmethod
    def attend_factored(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
        bias = fb.FactoredBias(phi_q.expand(-1, q.shape[-2], -1), phi_k)
        return fb.attention(q, k, v, bias, impl="triton")  # type: ignore[return-value]

    @pytest.mark.parametrize("constant", [False, True], ids=["rows", "one-row"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_factors_are_packed_once(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, constant: bool) -> None:
        """By one launch for both passes, again with the graph kept; the bits are those of packing in each pass."""
        leaves = self.factored(dtype, constant=constant)
        launches = self.packing_launches(monkeypatch)
        out = self.attend_factored(*leaves)
        assert len(launches) == 1
        once = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        twice = torch.autograd.grad(out.sum(), leaves)
        assert len(launches) == 1
        monkeypatch.setattr(registration, "_hands_over", lambda *_: False)
        apart = self.attend_factored(*leaves)
        found = torch.autograd.grad(apart.sum(), leaves)
        assert len(launches) == 3
        assert torch.equal(out, apart)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, twice, found, strict=True))

    def test_what_is_handed_over_is_no_larger_than_the_queries(self) -> None:
        """Larger factors are packed by each pass, and nothing is kept where no gradient is asked for."""
        sizes: list[int] = []

        def keep(x: Tensor) -> Tensor:
            sizes.append(x.numel() * x.element_size() if x.dim() == 1 else 0)
            return x

        q = self.factored(torch.bfloat16)[0]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self.attend_factored(*self.factored(torch.bfloat16))
            small = sum(sizes)
            self.attend_factored(*self.factored(torch.bfloat16, rank=33))
        assert 0 < small <= q.numel() * q.element_size()
        assert sum(sizes) == small
        arguments = (*self.factored(torch.bfloat16), *[None] * 7, 40, 40, [], 0.3, -1, 0, False, 0.0, "triton")
        with torch.no_grad():
            *_, packed = registration.attention_forward(*arguments)
        assert packed.numel() == 0

    @pytest.mark.parametrize("index", [3, 4], ids=["phi_q", "phi_k"])
    def test_modified_factors_are_noticed(self, index: int) -> None:
        leaves = self.factored(torch.bfloat16)
        out = self.attend_factored(*leaves)
        with torch.no_grad():
            leaves[index] += 1.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_checkpoints_and_compiled_regions_hand_over(self) -> None:
        torch.compiler.reset()
        leaves = self.factored(torch.bfloat16)
        wanted = torch.autograd.grad(self.attend_factored(*leaves).sum(), leaves)
        compiled = torch.compile(self.attend_factored, fullgraph=True, backend="aot_eager", dynamic=True)
        for out in (checkpoint(self.attend_factored, *leaves, use_reentrant=False), compiled(*leaves)):
            found = torch.autograd.grad(out.sum(), leaves)  # type: ignore[union-attr]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_opcheck_of_what_is_handed_over(self) -> None:
        leaves = self.factored(torch.bfloat16)
        arguments = (*leaves, *[None] * 7, 40, 40, [], 0.3, -1, 0, False, 0.0, "triton")
        torch.library.opcheck(registration.attention_forward, arguments)
        torch.library.opcheck(registration.attention_forward, (*(x.detach() for x in leaves), *arguments[5:], True))

    def test_sizes_that_only_data_tell_compile(self) -> None:
        """There nothing is known to be small."""
        torch.compiler.reset()

        def model(keep: Tensor, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor) -> Tensor:
            rows = keep.nonzero().squeeze(-1)
            torch._check(rows.shape[0] > 1)
            return self.attend_factored(q[rows], k[rows], v[rows], phi_q, phi_k)

        leaves, keep = self.factored(torch.bfloat16), torch.tensor([True, False, True], device=self.device)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            out = torch.compile(model, fullgraph=True, backend="aot_eager")(keep, *leaves)
        found, wanted = (torch.autograd.grad(x.sum(), leaves) for x in (out, model(keep, *leaves)))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_modes_see_both_operators(self) -> None:
        """Below autograd too the call is one operator, whose kernels nobody looks into."""
        seen: set[str] = set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.add(func.name())
                return func(*args, **(kwargs or {}))

        leaves = self.tensors()
        with Watch():
            found = torch.autograd.grad(self.attend(*leaves).sum(), leaves)
        assert {name for name in seen if "flashbias" in name} == {
            "flashbias::attention_forward",
            "flashbias::attention_backward",
        }
        wanted = torch.autograd.grad(self.attend(*leaves).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_without_gradients_there_is_no_graph(self) -> None:
        leaves = self.tensors()
        with torch.no_grad():
            assert self.attend(*leaves).grad_fn is None
        with torch.inference_mode():
            assert self.attend(*leaves).is_inference()
        assert self.attend(*(x.detach() for x in leaves)).grad_fn is None

    def test_a_compiled_region_may_hold_the_backward_pass(self) -> None:
        """There the graph ends, and both operators are called while the compiler looks at every frame."""
        torch.compiler.reset()

        def step(*leaves: Tensor) -> list[Tensor | None]:
            torch._dynamo.graph_break()
            self.attend(*leaves).sum().backward()
            return [x.grad for x in leaves]

        found = torch.compile(step, backend="eager")(*self.tensors())
        wanted = step(*self.tensors())
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))  # type: ignore[arg-type]

    def test_no_second_derivative(self) -> None:
        leaves = self.tensors()
        (grad,) = torch.autograd.grad(self.attend(*leaves).pow(2).sum(), leaves[3], create_graph=True)
        with pytest.raises(NotImplementedError, match="impl='reference'"):
            grad.sum().backward()

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiles_without_graph_breaks(self, backend: str) -> None:
        if backend == "inductor" and self.device == "cpu":
            backend = "aot_eager_decomp_partition"  # inductor's own kernels do not run in the interpreter's process
        torch.compiler.reset()

        def model(*leaves: Tensor) -> Tensor:
            q, *rest = leaves
            return self.attend(q * 2.0, *rest, is_causal=True)

        leaves = self.tensors()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        found, wanted = compiled(*leaves), model(*leaves)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        pairs = zip(
            torch.autograd.grad(found.sin().sum(), leaves),
            torch.autograd.grad(wanted.sin().sum(), leaves),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_autocast_casts_queries_and_leaves_factors(self) -> None:
        q, k, v, phi_q, phi_k, table = self.tensors(requires_grad=False)
        phi_k = phi_k + 1000.0
        with torch.autocast(self.device, torch.bfloat16):
            found = self.attend(q, k, v, phi_q, phi_k, table)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, self.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), phi_q, phi_k, table))

    def test_checkpointing(self) -> None:
        leaves = self.tensors()
        found = checkpoint(self.attend, *leaves, use_reentrant=False, dropout_p=0.0)
        wanted = self.attend(*leaves)
        assert torch.equal(found, wanted)  # type: ignore[arg-type]
        for a, b in zip(
            torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):  # type: ignore[union-attr]
            assert torch.equal(a, b)

    def test_checkpointing_drops_the_same_weights_again(self) -> None:
        leaves = self.tensors()
        torch.manual_seed(1)
        found = torch.autograd.grad(checkpoint(self.attend, *leaves, use_reentrant=False, dropout_p=0.3).sum(), leaves)  # type: ignore[union-attr]
        torch.manual_seed(1)
        wanted = torch.autograd.grad(self.attend(*leaves, dropout_p=0.3).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_forward_exports(self) -> None:
        class Layer(torch.nn.Module):
            def forward(self, *leaves: Tensor) -> Tensor:
                return IntegrationSuite.attend(*leaves)

        leaves = tuple(self.tensors(requires_grad=False))
        program = torch.export.export(Layer(), leaves)
        assert any("flashbias.attention_forward" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(*leaves), Layer()(*leaves))

    def test_auto_takes_the_kernels_on_a_gpu_alone(self) -> None:
        """On CPU tensors kernels run through the interpreter, which nobody wants unasked."""
        q, k, v, *_ = self.tensors()
        explanation = fb.explain(q, k, v)
        assert explanation.reasons["triton"] is None
        assert explanation.impl == ("triton" if self.device == "cuda" else "sdpa")


@pytest.mark.interpreter
class TestIntegrationInterpreted(IntegrationSuite):
    pass


@pytest.mark.gpu
class TestIntegrationOnGpu(IntegrationSuite):
    device = "cuda"
