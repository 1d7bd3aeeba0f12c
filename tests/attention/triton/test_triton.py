from __future__ import annotations

import pytest
from tests.attention.suite import AttentionSuite


class TritonSuite(AttentionSuite):
    impl = "triton"
    supports_wide_heads = False


@pytest.mark.interpreter
class TestTritonInterpreted(TritonSuite):
    """Kernels on the CPU. Slow, so a case that is not `core` runs in one dtype, each dtype in its turn."""

    is_slow = True


@pytest.mark.gpu
class TestTritonOnGpu(TritonSuite):
    device = "cuda"
    stretch = 5
