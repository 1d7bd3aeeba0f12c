import gc
import time
import weakref

import pytest
import torch

from flashbias.bench.measure import _quantile, let_go, measure

CPU = torch.device("cpu")


def test_times_what_it_is_given():
    found = measure(lambda: time.sleep(0.005), CPU, budget_s=0.1)
    assert 5 <= found.p10_ms <= found.median_ms <= found.p90_ms
    assert found.peak_mib is None


def test_budget_and_minimum_decide_the_repetitions():
    calls = []
    assert measure(lambda: calls.append(time.sleep(0.002)), CPU, budget_s=1e-9, min_repetitions=7).repetitions == 7
    assert len(calls) == 8  # and one to estimate
    assert measure(lambda: time.sleep(0.001), CPU, budget_s=0.5, min_repetitions=1).repetitions > 7


def test_what_only_cycles_hold_is_let_go():
    class Node:
        def __init__(self):
            self.me = self

    first, second = Node(), Node()
    gone, kept = weakref.ref(first), weakref.ref(second)
    del first
    let_go()
    assert gone() is None and kept() is second
    del second
    let_go()
    assert kept() is not None  # it was there the last time, and is not looked at
    gc.unfreeze()
    let_go()
    assert kept() is None


def test_quantiles_interpolate():
    assert _quantile([1.0], 0.9) == 1
    assert _quantile([1.0, 2.0, 4.0], 0.5) == 2
    assert _quantile([0.0, 10.0], 0.1) == pytest.approx(1)


@pytest.mark.gpu
def test_gpu_time_is_the_devices_and_not_the_interpreters():
    x = torch.randn(4096, 4096, device="cuda")

    def slow_to_enqueue():
        time.sleep(0.002)
        return x @ x

    slow_to_enqueue()  # allocates what cuBLAS works in
    quick = measure(lambda: x @ x, torch.device("cuda"), budget_s=0.1)
    slow = measure(slow_to_enqueue, torch.device("cuda"), budget_s=0.2)
    assert slow.median_ms < 1.5 * quick.median_ms
    assert quick.peak_mib == pytest.approx(4 * 4096**2 / 2**20, abs=16)
