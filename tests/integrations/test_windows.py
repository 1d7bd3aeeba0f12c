"""What is made once for windows: codes, regions of a shift, and their factors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashbias as fb
from flashbias.biases.regions import shifted_window_regions
from flashbias.integrations.windows import LatestShift, Window, shifted_regions

CPU = torch.device("cpu")
SIZES = ((8, 12), (4, 4), (2, 2))


def test_regions_of_all_images_of_a_size_are_one_tensor() -> None:
    regions = shifted_regions(*SIZES, CPU)
    assert shifted_regions(*SIZES, CPU) is regions
    assert torch.equal(regions, shifted_window_regions(*SIZES))
    assert not torch.equal(regions, shifted_regions((12, 8), *SIZES[1:], CPU))


def mask_of(bias: fb.FactoredBias) -> torch.Tensor:
    """What it takes off, up to what softmax takes off each row."""
    dense = bias.dense().float()
    return dense - dense.diagonal(dim1=-2, dim2=-1)[..., None]


def test_factors_follow_regions_and_penalty() -> None:
    """Kept for the same tensor, made anew for another one, whatever stands in it."""
    latest, regions = LatestShift(), shifted_regions(*SIZES, CPU)
    first = latest.of(regions, 100.0)
    assert latest.of(regions, 100.0) is first
    expected = -100.0 * (regions[:, None, :, None] != regions[:, None, None, :])
    assert torch.equal(mask_of(first), expected)
    assert torch.equal(mask_of(latest.of(regions, 200.0)), 2 * expected)
    others = regions.clone().zero_()
    assert not mask_of(latest.of(others, 200.0)).any()
    assert torch.equal(mask_of(latest.of(regions, 200.0)), 2 * expected)


def test_nothing_of_a_trace_is_kept() -> None:
    latest = LatestShift()
    with FakeTensorMode():
        latest.of(torch.zeros(2, 9, dtype=torch.int64), 100.0)
    assert latest.bias is None


@pytest.mark.parametrize("class_token", [False, True])
def test_a_window_is_read_as_the_family_reads_it(class_token: bool) -> None:
    """Another way to the same bias: the family with the model's own weights; gradients too."""
    family = fb.WindowBias(3, (3, 5), class_token)
    weight = family.weight.detach().clone().requires_grad_()
    bias, expected = Window((3, 5), class_token).bias(weight), family()
    assert bias.table is not None and expected.table is not None
    assert torch.equal(bias.table, expected.table)
    for code, other in zip(bias.codes(), expected.codes(), strict=True):
        assert torch.equal(code, other)
    matrix = torch.randn_like(bias.dense())
    (bias.dense() * matrix).sum().backward()
    (expected.dense() * matrix).sum().backward()
    assert torch.equal(weight.grad, family.weight.grad)  # type: ignore[arg-type]
