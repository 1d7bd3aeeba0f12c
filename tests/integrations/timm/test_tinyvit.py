"""timm's TinyViT, patched, against itself."""

from __future__ import annotations

from typing import Any

import torch
from tests.integrations.timm.vision import VisionSuite, widened
from timm.models.tiny_vit import TinyVit


class TestTinyViT(VisionSuite):
    """Windows of 5 and 3 tokens; images of other sizes are padded."""

    seed = 2  # in half precision, models of this size differ by a tenth from draw to draw
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
