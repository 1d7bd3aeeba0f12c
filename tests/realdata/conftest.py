"""Published weights as fixtures. A test is skipped only when the package cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.realdata import fetch


def fetched(get: Callable[[], Path]) -> Path:
    try:
        return get()
    except fetch.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def flash_abb_folder() -> Path:
    return fetched(fetch.flash_abb)


@pytest.fixture(scope="session")
def rxnmap_folder() -> Path:
    return fetched(fetch.chytorch_rxnmap)


@pytest.fixture(scope="session")
def mpnet_folder() -> Path:
    return fetched(fetch.all_mpnet_base_v2)
