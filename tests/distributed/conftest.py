"""Four ranks for all tests of this folder, and ranks of one's own for tests that break them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def breakable_ranks() -> Iterator[Callable[..., Ranks]]:
    """Makes ranks whose groups are given up soon."""
    pools: list[Ranks] = []

    def make(count: int, timeout: float) -> Ranks:
        pools.append(Ranks(count, timeout))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
