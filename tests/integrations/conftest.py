"""Assertions of the shared suites explain themselves like those of a test file."""

from __future__ import annotations

import pytest

SUITES = (
    "suite", "tables", "learned", "vision", "transformers.suite", "transformers.vision", "timm.vision", "protein.suite",
)  # fmt: skip

for suite in SUITES:
    pytest.register_assert_rewrite(f"tests.integrations.{suite}")
