"""Assertions of the shared suite explain themselves like those of a test file."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.integrations.transformers.suite")
pytest.register_assert_rewrite("tests.integrations.transformers.vision")
