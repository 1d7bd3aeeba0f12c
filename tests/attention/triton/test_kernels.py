"""What the kernels alone do: split key ranges, split walks, centres tile by tile, passes left out."""

from __future__ import annotations

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import Case, Problem

import flashbias as fb
from flashbias.attention import packing

pytest.importorskip("triton")

from flashbias.attention.triton import backward, configs, operands, table, window


class KernelSuite:
    device = "cpu"
    stretch = 1

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer, that of partial sums included."""

    def check(self, problem: Problem, with_lse: bool = True) -> None:
        leaves = problem.leaves()
        result = problem.attend("triton", leaves, return_lse=with_lse)
        out, lse = result if with_lse else (result, None)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, with_lse), with_lse)

    @pytest.mark.parametrize(
        "case",
        [
            Case("one-query", n=1, m=277, batch=(1,), heads=2, kv_heads=1, phi_k=(1, 1)),
            Case("few-queries", n=3, m=277, batch=(1,), heads=1, options=BOTTOM_RIGHT),
            Case(
                "window",
                n=4,
                m=277,
                batch=(1,),
                heads=1,
                options={"window": (100, 0), "causal_alignment": "bottom_right"},
            ),
            Case("mask", n=2, m=277, batch=(2,), heads=1, mask="padding"),
            Case("table", n=2, m=277, batch=(1,), heads=1, rank=0, table=9),
        ],
        ids=str,
    )
    def test_split_key_range(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few queries, many keys: parts of the key range are joined by their log-sum-exp."""
        monkeypatch.setattr(operands, "multiprocessors", lambda device: 16)
        splits = []
        original = operands.Operands.key_splits

        def spy(self, *arguments):
            splits.append(original(self, *arguments)[0])
            return splits[-1], original(self, *arguments)[1]

        monkeypatch.setattr(operands.Operands, "key_splits", spy)
        problem = case.stretched(self.stretch).build(torch.bfloat16, self.device)
        with torch.no_grad():
            problem.attend("triton", problem.tensors)
        assert max(splits) > 1
        self.check(problem)

    @pytest.mark.parametrize("processors", [1, 64], ids=["one-part", "many-parts"])
    def test_shared_factors_are_summed_in_parts(self, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (operands, backward, table, window):
            if hasattr(module, "multiprocessors"):
                monkeypatch.setattr(module, "multiprocessors", lambda device: processors)
        self.check(
            Case("shared", batch=(3,), n=19, phi_q=(1, 1), phi_k=(1, 2), rank=7, table=9).build(
                torch.float32, self.device
            )
        )
        self.check(
            Case("windows", batch=(3, 2), heads=1, n=16, phi_q=(1, 2, 1), phi_k=(1, 2, 1)).build(
                torch.float32, self.device
            )
        )

    @pytest.mark.parametrize(
        ("dtype", "options"),
        [(torch.bfloat16, {"is_causal": True}), (torch.float32, {})],
        ids=["bfloat16-causal", "float32-full"],
    )
    def test_centres_tile_by_tile(
        self, dtype: torch.dtype, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What long sequences do, on short ones: outputs, log-sum-exp and all gradients."""
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", 128)
        case = Case("alibi", n=137, batch=(1,), heads=1, rank=2, options=options)
        problem = case.build(dtype, self.device)
        i = torch.arange(137.0, device=self.device)[None, :, None]
        problem.tensors["phi_q"] = torch.cat([torch.full_like(i, 0.7), -0.7 * i], -1)
        problem.tensors["phi_k"] = torch.cat([i, torch.ones_like(i)], -1)
        self.check(problem)

    @pytest.mark.parametrize("n", [33, 70], ids=["window", "long"])
    @pytest.mark.parametrize(
        ("wanted", "launched"),
        [
            (("query",), {"_bwd_dq_kernel"}),
            (("phi_q",), {"_bwd_dq_kernel"}),
            (("key", "value"), {"_bwd_dkdv_kernel"}),
            (("phi_k",), {"_bwd_dkdv_kernel"}),
            (("table",), {"_bwd_dtable_kernel"}),
        ],
        ids=lambda x: "-".join(sorted(x)),
    )
    def test_only_what_is_needed_is_launched(
        self, n: int, wanted: tuple[str, ...], launched: set[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = set()

        class Spy:
            def __init__(self, name: str, kernel: object) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: object) -> object:
                seen.add(self.name)
                return self.kernel[grid]  # type: ignore[index]

        for module, name in (
            (backward, "_bwd_dq_kernel"),
            (backward, "_bwd_dkdv_kernel"),
            (table, "_bwd_dtable_kernel"),
            (window, "_bwd_window_kernel"),
        ):
            monkeypatch.setattr(module, name, Spy(name, getattr(module, name)))
        problem = Case("some", n=n, batch=(1,), heads=1, table=9).build(torch.float32, self.device)
        leaves = problem.leaves(wanted)
        problem.attend("triton", leaves).sum().backward()
        if n > configs.SHORT:
            assert seen == launched
        else:  # one kernel makes all gradients of a window; the table's is its own
            assert seen == ({"_bwd_dtable_kernel"} if wanted == ("table",) else {"_bwd_window_kernel"})

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("name", ["query", "key", "value", "phi_q", "dout"])
    def test_what_is_not_finite_shows_in_the_gradient_of_a_table(self, name: str, bad: float) -> None:
        """Sums of whole numbers cannot hold it; whoever scales losses looks for it, and skips that step."""
        problem = Case("bad", n=40, m=43, batch=(2,), heads=1, rank=2, table=9).build(torch.float32, self.device)
        leaves = problem.leaves(("table",))
        dout = torch.ones(2, 1, 40, problem.tensors["value"].shape[-1], device=self.device)
        spoilt = dout if name == "dout" else leaves[name].detach().clone()
        (leaves if name != "dout" else {})[name] = spoilt
        spoilt.view(-1)[spoilt.numel() // 2] = bad
        (grad,) = torch.autograd.grad(problem.attend("triton", leaves), leaves["table"], dout)
        assert grad.isnan().all()

    def test_padding_columns_are_never_read(self) -> None:
        """Columns at and beyond a head's rank may hold anything."""
        case = Case("ranks", heads=2, batch=(1,), rank=7, ranks=(2, 7), same_dtype=True, n=19)
        problem = case.build(torch.bfloat16, self.device)
        clean = problem.attend("triton", problem.tensors)
        problem.tensors["phi_q"][:, 0, :, 2:] = torch.nan
        problem.tensors["phi_k"][:, 0, :, 2:] = torch.inf
        assert torch.equal(problem.attend("triton", problem.tensors), clean)

    def test_varlen_outputs_do_not_depend_on_the_longest_given(self) -> None:
        q, k, v = (torch.randn(40, 2, 16, device=self.device) for _ in range(3))
        cu = torch.tensor([0, 7, 40], dtype=torch.int32, device=self.device)
        exact = fb.varlen_attention(q, k, v, cu, cu, impl="triton")
        loose = fb.varlen_attention(q, k, v, cu, cu, max_seqlen_q=64, max_seqlen_k=80, impl="triton")
        assert torch.equal(exact, loose)  # type: ignore[arg-type]

    def test_varlen_starts_may_be_strided(self) -> None:
        q, k, v = (torch.randn(40, 2, 16, device=self.device) for _ in range(3))
        wide = torch.tensor([[0, 5], [7, 5], [40, 5]], dtype=torch.int32, device=self.device)
        strided, packed = wide[:, 0], wide[:, 0].contiguous()
        made = fb.varlen_attention(q, k, v, strided, strided, impl="triton")
        assert torch.equal(made, fb.varlen_attention(q, k, v, packed, packed, impl="triton"))  # type: ignore[arg-type]


@pytest.mark.interpreter
class TestKernelsInterpreted(KernelSuite):
    pass


@pytest.mark.gpu
class TestKernelsOnGpu(KernelSuite):
    device = "cuda"
    stretch = 9  # tiles are larger
