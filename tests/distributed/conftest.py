"""Four ranks for all tests of this folder, two with a GPU each, and ranks of one's own for tests that break them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def gpus(two_gpus: None) -> Iterator[Ranks]:
    # Ranks are daemons, which may have no processes of their own to compile in.
    pool = Ranks(2, timeout=60.0, backend="nccl", variables={"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    yield pool
    pool.close()


@pytest.fixture
def breakable_ranks() -> Iterator[Callable[..., Ranks]]:
    """Makes ranks whose groups are given up soon."""
    pools: list[Ranks] = []

    def make(count: int, timeout: float, **where: Any) -> Ranks:
        pools.append(Ranks(count, timeout, **where))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
