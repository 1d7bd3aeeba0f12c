"""What the host knows on a device: made once, and never what was made for somebody's trace."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flashbias as fb
from flashbias import constants
from flashbias.constants import made_once, on_device

CPU = torch.device("cpu")


def test_the_same_tensor_each_time() -> None:
    found = on_device((3, 1, 2), CPU)
    assert found.tolist() == [3, 1, 2] and found.dtype == torch.int64
    assert on_device((3, 1, 2), CPU) is found
    assert on_device((3, 1, 2), CPU, torch.int32).dtype == torch.int32
    assert on_device((), CPU).shape == (0,)


def test_what_is_made_under_a_mode_is_not_for_others() -> None:
    values = (17, 4, 23)
    with FakeTensorMode():
        assert isinstance(on_device(values, CPU), FakeTensor)
    assert on_device(values, CPU).tolist() == list(values)
    with FakeTensorMode():
        assert isinstance(on_device(values, CPU), FakeTensor)


def test_what_is_made_in_inference_serves_in_training() -> None:
    with torch.inference_mode():
        index = on_device((5, 0, 2), CPU)
    x = torch.randn(6, requires_grad=True)
    x.index_select(0, index).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("what", ["mixed", "ranks"])
def test_attention_copies_nothing_the_second_time(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host waits for the GPU, and cannot be part of a CUDA graph."""
    phi_q, phi_k = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    if what == "mixed":
        low = fb.FactoredBias(phi_q, phi_k)
        bias: fb.FactoredBias | fb.MixedBias = fb.MixedBias((low, torch.randn(1, 6, 6)), heads=((2, 0), (1,)))
    else:
        bias = fb.FactoredBias(torch.randn(3, 6, 3), torch.randn(3, 6, 3), ranks=(3, 1, 2))
    q = torch.randn(2, 3, 6, 8)
    wanted = fb.attention(q, q, q, bias)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy from the host"))
    found = fb.attention(q, q, q, bias)
    assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor) and torch.equal(found, wanted)


def test_the_cache_does_not_grow_for_ever() -> None:
    calls = []

    @made_once(maxsize=2)
    def made(n: int) -> torch.Tensor:
        calls.append(n)
        return torch.zeros(n)

    for n in (1, 2, 2, 3, 2, 1):
        made(n)
    assert calls == [1, 2, 3, 1]  # the oldest goes first


def test_what_is_made_for_a_cuda_graph_is_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the graph's, and holds numbers only once that has run."""

    @made_once(maxsize=2)
    def made(n: int) -> torch.Tensor:
        return torch.zeros(n)

    before = made(2)
    monkeypatch.setattr(constants.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(constants.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert made(2) is before, "what was there before is found"
    in_graph = made(1)
    monkeypatch.setattr(constants.torch.cuda, "is_current_stream_capturing", lambda: False)
    assert made(1) is not in_graph
    assert made(1) is made(1)


def test_what_is_made_in_a_transform_of_functions_is_not_for_others() -> None:
    """Its tensors are wrapped, and have no address once the transform is over."""
    before = on_device((4, 0, 3), CPU)
    found = []

    def of(x: torch.Tensor) -> torch.Tensor:
        found.append(on_device((4, 0, 3), CPU))
        return x.index_select(0, on_device((1, 0, 3), CPU)).square().sum()

    torch.func.grad(of)(torch.randn(5))
    assert found[0] is before, "what was there before is found"
    assert on_device((1, 0, 3), CPU).data_ptr()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_made_in_a_trace_is_not_for_others() -> None:
    """`torch.jit.trace` traces twice and compares: in the second one it would be a constant."""

    @made_once(maxsize=2)
    def made(n: int) -> torch.Tensor:
        return torch.arange(n)

    traced = torch.jit.trace(lambda x: x * made(3), torch.ones(3))
    assert traced(torch.full((3,), 2.0)).tolist() == [0, 2, 4]
    assert made(3) is made(3)
