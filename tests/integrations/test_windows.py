"""What is made once for windows: codes, regions of a shift, and their factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import flashbias as fb
from flashbias.biases.regions import shifted_window_regions
from flashbias.integrations.windows import LatestShift, OffsetTable, shifted_regions

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
    assert latest.kept is None


@pytest.mark.parametrize("class_token", [False, True])
def test_a_window_is_read_as_the_family_reads_it(class_token: bool) -> None:
    """Another way to the same bias: the family with the model's own weights; gradients too."""
    family = fb.WindowBias(3, (3, 5), class_token)
    weight = family.weight.detach().clone().requires_grad_()
    bias, expected = OffsetTable(weight, (3, 5), class_token).bias(), family()
    assert bias.table is not None and expected.table is not None
    assert torch.equal(bias.table, expected.table)
    for code, other in zip(bias.codes(), expected.codes(), strict=True):
        assert torch.equal(code, other)
    matrix = torch.randn_like(bias.dense())
    (bias.dense() * matrix).sum().backward()
    (expected.dense() * matrix).sum().backward()
    assert torch.equal(weight.grad, family.weight.grad)  # type: ignore[arg-type]


class Shifted(nn.Module):
    """Windows of 4 × 4 tokens, shifted by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 98).view(49, 2))
        self.shift = LatestShift()

    def bias(self) -> fb.FactoredBias:
        return OffsetTable(self.weight, (4, 4)).bias() + self.shift.of(
            shifted_regions((8, 8), (4, 4), (2, 2), CPU), 9.0
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias().dense()


def fields(bias: fb.FactoredBias) -> dict[str, Tensor]:
    return {name: x for name, x in vars(bias).items() if isinstance(x, Tensor)}


def test_what_an_evaluation_leaves_can_be_trained_with() -> None:
    """Kernels keep all that a bias consists of for the backward pass."""
    model = Shifted()
    with torch.inference_mode():
        model.bias()
    assert not [name for name, x in fields(model.bias()).items() if x.is_inference()]


def test_a_gradient_by_a_function_leaves_plain_tensors() -> None:
    """Tensors of a finished transform have no address."""
    model = Shifted()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, torch.zeros(())).square().sum()

    torch.func.grad(loss)(dict(model.named_parameters()))
    assert [x.data_ptr() for x in fields(model.bias()).values()]


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_leaves_the_model_as_it_was(strict: bool) -> None:
    model, x = Shifted(), torch.randn(16, 16)
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert type(model(x)) is Tensor
    assert torch.equal(model(x), exported(x))


def test_what_another_thread_asks_for_is_not_returned() -> None:
    """Replicas of `DataParallel` share what a patched attention keeps, each on a GPU of its own."""
    latest, regions = LatestShift(), shifted_regions(*SIZES, CPU)

    class Interrupted(float):
        """A penalty during whose comparison another thread has its turn."""

        def __eq__(self, other: Any) -> bool:
            latest.of(torch.zeros_like(regions), 100.0)
            return float(self) == other

        __hash__ = float.__hash__

    first = latest.of(regions, 100.0)
    assert torch.equal(mask_of(latest.of(regions, Interrupted(100.0))), mask_of(first))


def test_what_is_kept_compiles_nothing_anew() -> None:
    model, x = Shifted(), torch.randn(16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    assert torch.equal(model(x), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), expected)
