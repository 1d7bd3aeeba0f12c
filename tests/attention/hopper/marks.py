"""What marks a module of tests that need a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

__all__ = ["IS_HOPPER", "ON_HOPPER"]

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_HOPPER, reason="the GPU is not of compute capability 9.0"),
]
