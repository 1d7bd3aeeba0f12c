"""What tests of the fused backward pass share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def fused_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """All gradients come from the fused kernel, also where others are faster; what it cannot make is an error."""
    from flashbias.attention.hopper import backward

    def elsewhere(*_: Any) -> None:
        raise AssertionError("the portable kernels were asked for gradients")

    monkeypatch.setattr(backward, "is_slower", lambda *_: False)
    monkeypatch.setattr(backward, "portable", SimpleNamespace(rows_of=backward.portable.rows_of, launch_as=elsewhere))
