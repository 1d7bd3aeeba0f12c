"""The oracle of the library against one written without it."""

from __future__ import annotations

from tests.attention.suite import AttentionSuite


class TestReference(AttentionSuite):
    impl = "reference"
    supports_float64 = True
    supports_double_backward = True
    centres_factors = False
