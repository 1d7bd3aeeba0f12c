"""timm's TinyViT, patched, against itself."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from tests.integrations.timm.vision import VisionSuite, widened
from timm.models.tiny_vit import TinyVit


class TestTinyViT(VisionSuite):
    """Windows of 5 and 3 tokens; images of other sizes are padded."""

    seed = 2
    length = 25
    size, other_size = (80, 80), (72, 96)
    parts = ("bias",)
    drops = False
    small = 1e-2  # in front of batch norms, gradients are zero but for rounding

    def make(self, dropout: float = 0.0) -> TinyVit:
        torch.manual_seed(self.seed)
        shape: dict[str, Any] = {"embed_dims": (8, 16, 16), "depths": (1, 2, 1), "num_heads": (1, 4, 4)}
        shape |= {"window_sizes": (5, 5, 3), "drop_path_rate": 0.0, "num_classes": 0}
        return widened(TinyVit(**shape))

    def test_half_precision_is_as_good(self, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[override]
        """On average: in half precision, models of this size differ by an eighth from draw to draw, and by the CPU."""
        errors = []
        for seed in range(24):
            monkeypatch.setattr(type(self), "seed", seed)
            errors.append(self.half_precision_error())
        assert min(errors) > 0
        assert fmean(errors) < 1.05 + 2 * stdev(errors) / len(errors) ** 0.5
