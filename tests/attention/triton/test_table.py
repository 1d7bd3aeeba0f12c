"""The bound from which a table's gradient gets its power of two, and the host's share in that gradient."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import Case

pytest.importorskip("triton")

from flashbias.attention.triton import table

NEGATIVE_NAN = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)


def bounds(dout: torch.Tensor, v: torch.Tensor, dlse: torch.Tensor | None = None) -> list[float]:
    """Norm of the largest row of each, and the largest |dlse|."""
    ops: Any = SimpleNamespace(
        q=dout, v=v, num_heads=dout.shape[1], seqlen_q=dout.shape[2], seqlen_k=v.shape[2], head_dim_v=v.shape[3],
        block_dv=max(16, 1 << (v.shape[3] - 1).bit_length()),
    )  # fmt: skip
    found = torch.zeros(4, dtype=torch.int32, device=dout.device)
    table._launch_bound(ops, found, dout, dlse, math.prod(dout.shape[:3]))
    squared = found.view(torch.float32).double()
    assert found[3] == 0
    return [float(squared[0].sqrt()), float(squared[1].sqrt()), float(squared[2])]


class Suite:
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _few_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that programs take more than one block of rows."""
        monkeypatch.setattr(table, "multiprocessors", lambda device: 1)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize(("n", "m", "width"), [(1, 1, 8), (700, 3, 24), (5, 1100, 128)])
    def test_largest_rows(self, n: int, m: int, width: int, dtype: torch.dtype) -> None:
        dout, v = self.draw(2, 4, n, width, dtype=dtype), self.draw(2, 2, m, width, dtype=dtype)
        dlse = self.draw(2, 4, n)
        expected = [float(x.double().norm(dim=-1).max()) for x in (dout, v)]
        assert bounds(dout, v, dlse) == pytest.approx([*expected, float(dlse.abs().max())], rel=1e-6)
        assert bounds(dout, v)[2] == 0.0

    def test_every_row_counts_once_and_nothing_else(self) -> None:
        """In views of larger tensors: of heads, of tokens, of columns."""
        for place in (0, 17, 299):
            wide = torch.full((2, 300, 3, 40), 1e6, device=self.device)
            dout = wide.transpose(1, 2)[..., :24]
            dout.fill_(1.0)
            dout[1, 2, place, 23] = 7.0
            v = self.draw(2, 3, 4, 24) * 0
            v[1, 2, 3, 5] = -3.0
            assert bounds(dout, v)[:2] == pytest.approx([math.sqrt(23 + 49), 3.0])

    @pytest.mark.parametrize("bad", [torch.tensor(torch.nan), NEGATIVE_NAN, torch.tensor(-torch.inf)], ids=str)
    def test_what_is_not_finite_is_infinite(self, bad: torch.Tensor) -> None:
        """Whatever the sign: bits are compared as whole numbers."""
        for name in range(3):
            tensors = [self.draw(1, 2, 9, 16), self.draw(1, 2, 9, 16), self.draw(1, 2, 9)]
            tensors[name].view(-1)[40 if name < 2 else 4] = bad
            assert [x == math.inf for x in bounds(*tensors)] == [place == name for place in range(3)]

    @pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
    def test_gradients_of_any_size(self, size: float) -> None:
        """The power of two follows them, so that sums neither overflow nor lose what they are made of."""
        problem = Case("size", n=40, m=43, rank=2, table=9).build(torch.float32, self.device)
        problem.dout.mul_(size)
        problem.dlse.mul_(size)
        leaves = problem.leaves(("table",))
        out, lse = problem.attend("triton", leaves, return_lse=True)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, True), True)


@pytest.mark.interpreter
class TestInterpreted(Suite):
    pass


@pytest.mark.gpu
class TestOnGpu(Suite):
    device = "cuda"
