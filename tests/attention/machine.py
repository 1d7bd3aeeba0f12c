"""A GPU that is not there: what tests of the host's side of kernels need of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashbias.attention import hopper
from flashbias.attention.call import Call

__all__ = ["allow_hopper", "on_this_machine", "tiers_for_every_width"]


def on_this_machine(unsupported: Any) -> Any:
    """As the function, asked of the same call on a GPU."""

    def asked(call: Call) -> str | None:
        with FakeTensorMode():
            query = torch.empty(call.query.shape, dtype=call.query.dtype, device="cuda")
        return unsupported(replace(call, query=query))

    return asked


def allow_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls on the CPU take Hopper's kernels, as far as the host can tell."""
    monkeypatch.setattr(hopper, "unavailable", lambda *_: None)
    monkeypatch.setattr(hopper, "unsupported", on_this_machine(hopper.unsupported))


def tiers_for_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every width of packed columns be a tier of its own: launches and copies cost nothing."""
    from flashbias.attention.hopper import tiers

    monkeypatch.setattr(tiers, "LAUNCH_MS", 0.0)
    monkeypatch.setattr(tiers, "COPIED_PER_MS", float("inf"))
    # What was decided with the real costs is kept for later.
    monkeypatch.setattr(tiers, "decided", tiers.decided.__wrapped__)
