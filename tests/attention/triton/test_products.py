"""Parts of a float32 number in which the matrix unit multiplies it."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import INTERPRETED

pytest.importorskip("triton")

import triton
import triton.language as tl

from flashbias.attention.triton.products import two_parts


@triton.jit
def _parts_kernel(x_ptr, first_ptr, second_ptr, COUNT: tl.constexpr):
    """Both parts of COUNT numbers."""
    at = tl.arange(0, COUNT)
    first, second = two_parts(tl.load(x_ptr + at))
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


class PartsSuite:
    device = "cpu"

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.to(self.device)
        first, second = torch.empty_like(x), torch.empty_like(x)
        _parts_kernel[(1,)](x, first, second, COUNT=x.numel())
        return first, second

    @pytest.mark.filterwarnings("ignore:invalid value")
    def test_what_is_not_a_number_stays_so(self) -> None:
        """Arithmetic of a GPU makes NaN of all ones, which rounding by an addition to the bits turned into zero."""
        bits = [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7FFFF000, 0xFFFFF000, 0x7F800001, 0x7FFFE000]
        first, second = self.parts(torch.tensor(bits).to(torch.int32).view(torch.float32))
        assert (first + second).isnan().all()

    @pytest.mark.filterwarnings("ignore:invalid value")
    def test_infinities_are_in_the_first(self) -> None:
        first, second = self.parts(torch.tensor([torch.inf, -torch.inf]))
        assert first.tolist() == [torch.inf, -torch.inf]
        assert second.tolist() == [0.0, 0.0]

    def test_the_sum_is_the_number(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(4096) * 2.0 ** torch.randint(-60, 60, (4096,))
        first, second = (part.cpu() for part in self.parts(x))
        assert ((first.double() + second.double() - x).abs() <= 2.0**-23 * x.abs()).all()
        assert not (first.view(torch.int32) & 0x1FFF).any()


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
class TestParts(PartsSuite):
    pass


@pytest.mark.gpu
class TestPartsOnGpu(PartsSuite):
    device = "cuda"
