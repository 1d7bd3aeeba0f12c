"""Attention through torch SDPA: right everywhere, by the flash kernel, in linear memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import Case
from tests.attention.suite import AttentionSuite
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flashbias as fb
from flashbias.attention import packing, sdpa


class TestSdpa(AttentionSuite):
    impl = "sdpa"
    supports_lse = False
    supports_float64 = True
    supports_double_backward = True


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def operators(problem_case: Case, dtype: torch.dtype) -> set[str]:
    """Names of the torch operators that a forward and backward pass run."""
    problem = problem_case.build(dtype)
    leaves = problem.leaves()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        problem.attend("sdpa", leaves).sum().backward()
    return {event.key for event in prof.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("plain", head_dim=16, rank=8),
        Case("odd-width", head_dim=24, rank=5),
        Case("head-dim-v", head_dim=24, head_dim_v=40, rank=3),
        Case("wide-v", head_dim=16, head_dim_v=64, rank=1),
        Case("causal", head_dim=13, rank=2, options={"is_causal": True}),
        Case("gqa", heads=4, kv_heads=2, phi_q=(4,), phi_k=(1,)),
        Case("padding", mask="padding"),
        Case("windows", batch=(2, 3), n=16, phi_q=(1, 3, 2), phi_k=(1, 3, 2)),
    ],
    ids=str,
)
def test_takes_the_flash_kernel(case: Case, dtype: torch.dtype) -> None:
    """Values are padded to the width of [q | phi_q], else torch would fall back to its dense path."""
    found = operators(case, dtype)
    assert FLASH in found
    assert f"{FLASH}_backward" in found
    assert "aten::_scaled_dot_product_attention_math" not in found


def test_a_table_takes_the_flash_kernel_forward() -> None:
    problem = Case("table", table=9).build(torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        problem.attend("sdpa", problem.tensors)
    assert FLASH in {event.key for event in prof.key_averages()}


def peak_bytes(prof: profile) -> int:
    """Most memory held at once by what was allocated during a profile."""
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (64, 64)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("with_table", [False, True], ids=["factors", "table"])
def test_memory_is_linear(options: dict[str, object], with_table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing near the size of the N×M matrix, forward or backward, tables and windows included."""
    n = 4096 if with_table else 8192
    monkeypatch.setattr(sdpa, "BLOCK_ENTRIES", 64 * n)  # the part of a table or mask that may be there at once
    query, key, value = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    table = torch.randn(1, 65, requires_grad=True) if with_table else None
    bias = fb.FactoredBias(torch.randn(1, n, 2, requires_grad=True), torch.randn(1, n, 2), table)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fb.attention(query, key, value, bias, impl="sdpa", **options).sum().backward()  # type: ignore[union-attr]
    assert 0 < peak_bytes(prof) < n * n * 4 // 4


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr(sdpa, "BLOCK_QUERIES", 64)


BLOCKED = [
    Case("table", n=150, m=130, table=9, batch=(1,)),
    Case("table-causal", n=150, table=9, batch=(1,), options={"is_causal": True}),
    Case("window", n=150, batch=(1,), options={"window": (20, 3)}),
    Case("window-table-mask", n=150, batch=(2,), table=9, mask="padding", options={"window": (20, 3)}),
    Case(
        "bottom-right",
        n=90,
        m=150,
        batch=(1,),
        options={"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    Case(
        "blocks-without-keys",
        n=200,
        m=40,
        batch=(1,),
        options={"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    Case("full-mask", n=150, m=130, mask="full", table=9),
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", BLOCKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_queries_make_one_result(case: Case, dtype: torch.dtype) -> None:
    problem = case.build(dtype)
    leaves = problem.leaves()
    results = differentiate(problem, leaves, problem.attend("sdpa", leaves), None, False)
    assert_close_to_oracle(problem, results)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("causal", [False, True])
def test_a_centre_for_each_block_of_queries(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Long key ranges: as exact near the diagonal as a short range is."""
    monkeypatch.setattr(packing, "TILE_CENTRE_FROM", 100)
    case = Case("alibi", n=300, batch=(1,), heads=1, rank=1, options={"is_causal": causal})
    problem = case.build(torch.bfloat16)
    problem.tensors["phi_q"] = torch.full((1, 300, 1), 0.7)
    problem.tensors["phi_k"] = torch.arange(300.0)[None, :, None]
    leaves = problem.leaves()
    results = differentiate(problem, leaves, problem.attend("sdpa", leaves), None, False)
    assert_close_to_oracle(problem, results)


def test_a_bias_that_needs_a_gradient_costs_no_mask() -> None:
    """No tensor of N×M entries is among the operators' outputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n = 512
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    leaves = [torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3)]
    phi_q, phi_k = (torch.randn(1, n, 3, requires_grad=True) for _ in range(2))
    with Watch():
        out = fb.attention(*leaves, fb.FactoredBias(phi_q, phi_k), impl="sdpa")
        torch.autograd.grad(out.sum(), (phi_q, phi_k))  # type: ignore[union-attr]
    assert 0 < largest < n * n // 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_a_half_precision_table_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Thousands of pairs read one entry: a sum in the table's own precision would soon stand still."""
    problem = Case("table", n=130, heads=1, batch=(4,), rank=0, table=3).build(torch.float32)
    exact = problem.leaves()
    half = exact | {"table": exact["table"].detach().to(dtype).requires_grad_()}
    exact["table"] = half["table"].detach().float().requires_grad_()
    found, right = (
        differentiate(problem, leaves, problem.attend("sdpa", leaves), None, False)["dtable"]
        for leaves in (half, exact)
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found, right.to(dtype), atol=0.0, rtol=torch.finfo(dtype).eps)
