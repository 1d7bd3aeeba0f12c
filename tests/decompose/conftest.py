"""Choices that are tested must not depend on what was measured where."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
from tests.decompose.fixed_prices import FixedPrices


@pytest.fixture
def set_prices(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[FixedPrices]], None]:
    """Have `compress` ask another class for its prices."""
    module = importlib.import_module("flashbias.decompose.compress")
    return lambda prices: monkeypatch.setattr(module, "HeadCosts", prices)


@pytest.fixture
def fixed_prices(set_prices: Callable[[type[FixedPrices]], None]) -> None:
    set_prices(FixedPrices)
