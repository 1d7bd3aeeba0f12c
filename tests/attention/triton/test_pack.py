"""The packing kernel applies what `attention/packing.py` says."""

from __future__ import annotations

import pytest
import torch

from flashbias.attention import packing

pytest.importorskip("triton")

from flashbias.attention.triton.pack import Factors


class PackSuite:
    device = "cpu"
    slack = 4.0  # Triton's interpreter cuts a number off where a GPU rounds it to bfloat16

    def factors(self, phi_q: torch.Tensor, phi_k: torch.Tensor, scale: float, dtype: torch.dtype) -> Factors:
        return Factors.of(phi_q.to(self.device), phi_k.to(self.device), scale, dtype, True)

    @pytest.mark.parametrize("rank", [1, 2, 5, 6, 16, 33])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_packed_product_is_that_of_packing(self, rank: int, dtype: torch.dtype) -> None:
        """Same columns in the same order; their product is the same up to a constant in each row."""
        torch.manual_seed(0)
        phi_q, phi_k, scale = torch.randn(2, 70, rank), torch.randn(1, 90, rank), 0.3
        found = self.factors(phi_q, phi_k, scale, dtype)
        terms = len(packing.products(rank, dtype))
        assert found.terms == terms
        assert found.columns >= rank * terms
        a, b = (x.double().cpu() for x in (found.phi_q, found.phi_k))
        assert (a[..., rank * terms :] == 0).all()
        assert (b[..., rank * terms :] == 0).all()
        operand = torch.float32 if dtype == torch.float32 else torch.bfloat16
        right_q, right_k = (x.double() for x in packing.pack(phi_q, phi_k, scale, operand))
        if self.device == "cuda":
            assert (a[..., : rank * terms] - right_q).abs().max() <= 2.0**-22 * right_q.abs().max()
        product, wanted = a @ b.mT, right_q @ right_k.mT
        error = product - wanted
        error = error - error[..., :1]
        size = (phi_q.abs() @ (phi_k.abs() + 3.0).mT).max().item() / scale
        assert error.abs().max().item() <= self.slack * (2.0**-23 if terms != 3 else 2.0**-16) * size

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_factors_are_taken_as_they_are(self, dtype: torch.dtype) -> None:
        phi_q, phi_k = torch.randn(2, 40, 7).to(dtype), torch.randn(1, 30, 7).to(dtype)
        found = self.factors(phi_q, phi_k, 0.3, dtype)
        assert found.terms == 1
        assert torch.equal(found.phi_q.cpu()[..., :7], phi_q)
        assert torch.equal(found.phi_k.cpu()[..., :7], phi_k)

    def test_strided_and_transposed_factors(self) -> None:
        phi_q, phi_k = torch.randn(5, 2, 70).permute(1, 2, 0), torch.randn(2, 180, 5)[:, ::2]
        found = self.factors(phi_q, phi_k, 0.5, torch.bfloat16)
        plain = self.factors(phi_q.contiguous(), phi_k.contiguous(), 0.5, torch.bfloat16)
        assert torch.equal(found.phi_q, plain.phi_q)
        assert torch.equal(found.phi_k, plain.phi_k)

    def test_one_row_for_all_queries_is_packed_once(self) -> None:
        """ALiBi's query side, a slope for each head, does not grow with N."""
        slopes, phi_k = torch.rand(4, 1, 1, device=self.device), torch.arange(1000.0)[None, :, None]
        found = Factors.of(slopes.expand(4, 1000, 1), phi_k.to(self.device), 1.0, torch.bfloat16, True)
        assert found.phi_q.shape[1] == 1000
        assert found.phi_q.stride(1) == 0


@pytest.mark.interpreter
class TestPackInterpreted(PackSuite):
    pass


@pytest.mark.gpu
class TestPackOnGpu(PackSuite):
    device = "cuda"
    slack = 1.0
