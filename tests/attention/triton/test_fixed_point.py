"""Sums as whole numbers: what decides the power of two, and that it fits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import Case
from torch import Tensor

pytest.importorskip("triton")

from flashbias.attention.triton import fixed_point
from flashbias.attention.triton.fixed_point import FixedPoint

NEGATIVE_NAN = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)


def power_and_failure(
    dout: Tensor, v: Tensor, dlse: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[float, bool]:
    """What a call gets."""
    ops: Any = SimpleNamespace(
        q=dout, v=v, batch=dout.shape[0], num_heads=dout.shape[1], seqlen_q=dout.shape[2], seqlen_k=v.shape[2],
        head_dim_v=v.shape[3], block_dv=max(16, 1 << (v.shape[3] - 1).bit_length()), dropout_p=dropout_p,
    )  # fmt: skip
    made = FixedPoint.of(ops, 5, dout, dlse)
    assert made.sums.shape == (5,) and not made.sums.any()
    return float(made.power[0]), bool(made.failed[0])


def expected(dout: Tensor, v: Tensor, dlse: Tensor | None = None, dropout_p: float = 0.0) -> float:
    """The largest power of two that keeps a sum below 2^61."""
    largest = [float(x.double().norm(dim=-1).max()) for x in (dout, v)]
    bound = 2 * math.prod(largest) / (1 - dropout_p) + (0.0 if dlse is None else float(dlse.abs().max()))
    return 2.0 ** (61 - math.frexp(bound * math.prod(dout.shape[:3]))[1])


class Suite:
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _few_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that programs take more than one block of rows."""
        monkeypatch.setattr(fixed_point, "multiprocessors", lambda device: 1)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize(("n", "m", "width"), [(1, 1, 8), (700, 3, 24), (5, 1100, 128)])
    def test_power(self, n: int, m: int, width: int, dtype: torch.dtype) -> None:
        for size in (1e-15, 3.0, 1e12):
            dout, v = size * self.draw(2, 4, n, width, dtype=dtype), self.draw(2, 2, m, width, dtype=dtype)
            dlse = size * self.draw(2, 4, n)
            assert power_and_failure(dout, v, dlse, 0.25) == (expected(dout, v, dlse, 0.25), False)
            assert power_and_failure(dout, v) == (expected(dout, v), False)

    @pytest.mark.parametrize("place", [0, 17, 299])
    def test_every_row_counts_and_nothing_else(self, place: int) -> None:
        """In views of larger tensors: of heads, of tokens, of columns."""
        wide = torch.full((2, 300, 3, 40), 1e6, device=self.device)
        dout, v = wide.transpose(1, 2)[..., :24], torch.zeros(2, 3, 300, 24, device=self.device)
        dout.fill_(1.0)
        v[1, 2, place, 5] = -1.0
        before = power_and_failure(dout, v)
        assert before == (expected(dout, v), False)
        dout[1, 2, place, 23] = 300.0
        after = power_and_failure(dout, v)
        assert after == (expected(dout, v), False) and after[0] < before[0] / 16
        dlse = torch.zeros(2, 3, 300, device=self.device)
        dlse[1, 2, place] = -1e7
        assert power_and_failure(dout, v, dlse) == (expected(dout, v, dlse), False) < after

    @pytest.mark.parametrize("bad", [torch.tensor(torch.nan), NEGATIVE_NAN, torch.tensor(-torch.inf)], ids=str)
    def test_what_is_not_finite_is_noted(self, bad: Tensor) -> None:
        """Whatever its sign: bits are compared as whole numbers."""
        for name in range(3):
            dout, v, dlse = self.draw(1, 2, 9, 16), self.draw(1, 2, 9, 16), self.draw(1, 2, 9)
            assert not power_and_failure(dout, v, dlse)[1]
            (dout, v, dlse)[name].view(-1)[4] = bad
            assert power_and_failure(dout, v, dlse)[1]

    @pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
    def test_gradients_of_any_size(self, size: float) -> None:
        """The power of two follows them, so that sums neither overflow nor lose what they are made of."""
        problem = Case("size", n=40, m=43, rank=2, table=9).build(torch.float32, self.device)
        problem.dout.mul_(size)
        problem.dlse.mul_(size)
        leaves = problem.leaves(("table",))
        out, lse = problem.attend("triton", leaves, return_lse=True)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, True), True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
    def test_every_dtype_of_a_gradient(self, dtype: torch.dtype) -> None:
        sums, power, failed = torch.tensor([1, -3, 0, 1000, 2**50]), torch.tensor([2.0**40]), torch.tensor([0, 1])
        for n in range(2):
            grad = torch.empty(5, dtype=dtype, device=self.device)
            made = (sums, power, failed[n:].to(torch.int32))
            FixedPoint(*(x.to(self.device) for x in made)).write(grad)
            wanted = (sums.double() / power).to(dtype) if n == 0 else torch.full((5,), torch.nan, dtype=dtype)
            torch.testing.assert_close(grad.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpreter
class TestInterpreted(Suite):
    pass


@pytest.mark.gpu
class TestOnGpu(Suite):
    device = "cuda"
