"""Factors as the Hopper kernels read them: one product of bfloat16 columns is the bias over the scale."""

from __future__ import annotations

import pytest
import torch

from flashbias.attention import packing
from flashbias.attention.call import HALF
from flashbias.attention.hopper.configs import NARROWEST, columns_of

pytest.importorskip("triton")

from flashbias.attention.hopper.pack import ReadyFactors
from flashbias.attention.triton import pack
from flashbias.attention.triton.pack import Factors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POWER_OF_TWO, OTHER = 0.25, 0.3

ROUNDOFF = 2.0**-8
"""What rounding to bfloat16 leaves of a number at most; each further part leaves as much of that."""


class TestReadyProducts:
    @pytest.mark.parametrize(("scale", "count"), [(POWER_OF_TWO, 1), (1.0, 1), (OTHER, 2)])
    def test_bfloat16_needs_a_second_part_for_the_scale_alone(self, scale: float, count: int) -> None:
        terms = packing.ready_products(7, torch.bfloat16, torch.bfloat16, scale, torch.bfloat16)
        assert terms == ((0, 0), (1, 0))[:count]

    @pytest.mark.parametrize("scale", [POWER_OF_TWO, OTHER])
    @pytest.mark.parametrize("rank", [1, 96])
    def test_float16_is_two_parts_each(self, rank: int, scale: float) -> None:
        terms = packing.ready_products(rank, torch.float16, torch.float16, scale, torch.float16)
        assert set(terms) == {(0, 0), (0, 1), (1, 0)}

    @pytest.mark.parametrize("rank", [1, 5, 6, 96])
    def test_float32_takes_what_the_other_kernels_take(self, rank: int) -> None:
        for dtype in HALF:
            terms = packing.ready_products(rank, torch.float32, torch.float32, OTHER, dtype)
            assert terms == packing.products(rank, dtype)

    def test_factors_of_two_dtypes_are_as_float32(self) -> None:
        terms = packing.ready_products(7, torch.bfloat16, torch.float16, OTHER, torch.float16)
        assert terms == packing.products(7, torch.float16)


@pytest.mark.parametrize("columns", range(1, 257))
def test_columns_are_the_next_power_of_two(columns: int) -> None:
    held = columns_of(columns)
    assert held >= max(columns, NARROWEST)
    assert held & (held - 1) == 0
    assert held == NARROWEST or held < 2 * columns


def accuracy(rank: int, factors: torch.dtype, scale: float) -> float:
    """Largest error of a product, relative to |phi_q| |phi_k| / scale.

    bfloat16: what two parts leave of phi_q / scale, or nothing. float16: the same, and the product of the second
    parts. float32: the three products of parts that are left out, or two of smaller ones and two float32 roundings.
    """
    if factors == torch.bfloat16:
        return 0.0 if packing.is_power_of_two(scale) else ROUNDOFF**2
    if factors == torch.float16:
        return 2 * ROUNDOFF**2
    return 4 * ROUNDOFF**3 if rank <= packing.SIX_UP_TO_RANK else 3 * ROUNDOFF**2


class ReadyFactorsSuite:
    device = "cpu"
    slack = 4.0  # Triton's interpreter cuts a number off where a GPU rounds it to bfloat16

    @pytest.mark.parametrize("scale", [POWER_OF_TWO, OTHER])
    @pytest.mark.parametrize("rank", [1, 2, 5, 6, 16, 33, 96])
    @pytest.mark.parametrize("factors", DTYPES.values(), ids=DTYPES)
    def test_product_is_the_bias_over_scale(self, factors: torch.dtype, rank: int, scale: float) -> None:
        """Of float32 factors up to a constant in each row; of others exactly that."""
        generator = torch.Generator().manual_seed(rank)
        raw_q, raw_k = (torch.randn(2, n, rank, generator=generator).to(factors) for n in (70, 90))
        queries = factors if factors in HALF else torch.bfloat16
        found = ReadyFactors.of(raw_q.to(self.device), raw_k.to(self.device), scale, queries, True)

        terms = packing.ready_products(rank, factors, factors, scale, queries)
        assert (found.rank, found.terms) == (rank, len(terms))
        assert found.columns == found.block_r == columns_of(rank * len(terms))
        a, b = found.phi_q, found.phi_k
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.shape[-1] == b.shape[-1] == found.columns
        assert a.is_contiguous() and b.is_contiguous()
        assert (a[..., rank * len(terms) :] == 0).all()
        assert (b[..., rank * len(terms) :] == 0).all()

        product, wanted = a.double().cpu() @ b.double().cpu().mT, raw_q.double() @ raw_k.double().mT / scale
        error = product - wanted
        if factors == torch.float32:
            error = error - error[..., :1]
        size = raw_q.double().abs() @ (raw_k.double().abs() + 3.0).mT / scale  # a centre is one of the keys
        assert (error.abs() <= self.slack * accuracy(rank, factors, scale) * size).all()

    @pytest.mark.parametrize("factors", DTYPES.values(), ids=DTYPES)
    def test_leading_columns_serve_the_gradients(self, factors: torch.dtype) -> None:
        """The first R columns are phi_q / scale and phi_k, rounded once; the latter centred where it is float32."""
        raw_q, raw_k = torch.randn(1, 40, 7).to(factors), torch.randn(1, 30, 7).to(factors)
        found = ReadyFactors.of(raw_q.to(self.device), raw_k.to(self.device), OTHER, torch.bfloat16, True)
        key = raw_k.float()
        if factors == torch.float32:
            key = key - packing.centre_of(key, torch.zeros(1, dtype=torch.int64), 30)
        for packed, right in ((found.phi_q, raw_q.float() / OTHER), (found.phi_k, key)):
            error = (packed[..., :7].double().cpu() - right.double()).abs()
            assert (error <= self.slack**0.5 * 1.001 * ROUNDOFF * right.double().abs()).all()

    def test_float32_factors_far_from_the_origin(self) -> None:
        """Positions near 2^20 have the product of positions near 0, row constants apart."""
        slopes, near = torch.full((1, 60, 1), 0.7071067), torch.arange(60.0)[None, :, None]
        far = near + 2.0**20

        def product(phi_k: torch.Tensor) -> torch.Tensor:
            found = ReadyFactors.of(slopes.to(self.device), phi_k.to(self.device), OTHER, torch.bfloat16, True)
            return found.phi_q.double() @ found.phi_k.double().mT

        assert torch.equal(product(near), product(far))

    @pytest.mark.parametrize("factors", DTYPES.values(), ids=DTYPES)
    def test_one_row_for_all_queries(self, factors: torch.dtype) -> None:
        """ALiBi's query side stands in memory row by row: the copy engine knows no stride of 0."""
        slopes, phi_k = torch.rand(4, 1, 1).to(factors), torch.arange(100.0)[None, :, None].to(factors)
        found = ReadyFactors.of(
            slopes.to(self.device).expand(4, 90, 1), phi_k.to(self.device), 1.0, torch.bfloat16, True
        )
        assert found.phi_q.shape == (4, 90, found.columns)
        assert found.phi_q.is_contiguous()
        assert (found.phi_q == found.phi_q[:, :1]).all()

    @pytest.mark.parametrize("rank", [1, 5, 16, 33, 42])
    def test_either_backward_pass_reads_what_is_handed_over(self, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside float32 factors of up to 128 columns both sets of kernels have one form."""
        raw = [torch.randn(*shape, rank, device=self.device) for shape in ((4, 90), (1, 70))]
        form = packing.form_of(rank, torch.bfloat16)
        buffer = torch.empty((4 * 90 + 70) * form.width, dtype=form.dtype, device=self.device)
        kinds = (ReadyFactors, Factors)
        alone = [kind.of(*raw, OTHER, torch.bfloat16, True) for kind in kinds]
        ReadyFactors.of(*raw, OTHER, torch.bfloat16, True, packing.Handed(buffer, is_filled=False))
        monkeypatch.setattr(pack, "_pack_kernel", None)
        handed = packing.Handed(buffer, is_filled=True)
        for kind, right in zip(kinds, alone, strict=True):
            found = kind.of(*raw, OTHER, torch.bfloat16, True, handed)
            assert torch.equal(found.phi_q, right.phi_q)
            assert torch.equal(found.phi_k, right.phi_k)

    def test_half_precision_factors_are_not_handed_over(self) -> None:
        """Portable kernels take them as they are, and either may run the backward pass."""
        raw = [torch.randn(1, 40, 16, device=self.device).bfloat16() for _ in range(2)]
        filled = packing.Handed(torch.zeros(80 * 16, dtype=torch.bfloat16, device=self.device), is_filled=True)
        found = ReadyFactors.of(*raw, POWER_OF_TWO, torch.bfloat16, True, filled)
        assert found.phi_k.any()


@pytest.mark.interpreter
class TestReadyFactorsInterpreted(ReadyFactorsSuite):
    pass


@pytest.mark.gpu
class TestReadyFactorsOnGpu(ReadyFactorsSuite):
    device = "cuda"
    slack = 1.0
