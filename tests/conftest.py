"""What holds for every test: one thread, markers that need a machine or a process of their own."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("tests.attention.oracle", "tests.attention.suite", "tests.attention.varlen")

torch.set_num_threads(1)

# The same examples in every run; a first call may load libraries, so time says nothing.
hypothesis.settings.register_profile("flashbias", deadline=None, derandomize=True)
hypothesis.settings.load_profile("flashbias")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_HERE = {
    "gpu": None if torch.cuda.is_available() else "no CUDA device",
    "interpreter": None if INTERPRETED else "TRITON_INTERPRET=1 is not set for this process",
}
"""Why tests with a marker cannot run here, None if they can."""

_left_out = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this process cannot run; `pytest_terminal_summary` says so."""
    left_out = config.stash.setdefault(_left_out, {})
    kept, dropped = [], []
    for item in items:
        marker = next((m for m, reason in NOT_HERE.items() if reason and item.get_closest_marker(m)), None)
        if marker is None:
            kept.append(item)
        else:
            dropped.append(item)
            left_out[marker] = left_out.get(marker, 0) + 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_collection_finish() -> None:
    """What has been imported stays: beside torch, looking at it in each collection takes a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for marker, count in sorted(config.stash.get(_left_out, {}).items()):
        terminalreporter.write_line(f"left out {count} tests marked {marker}: {NOT_HERE[marker]}")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C interrupts: a shell starts what it runs in the background with that signal ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def nan_filled_buffers() -> Iterator[None]:
    """Fill what torch would leave uninitialised with NaN, so that no kernel can rely on what lies there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(7).isnan().all(), "buffers are not filled, so the test would prove nothing"
    assert torch.ones(7).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(7, dtype=torch.bfloat16)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
