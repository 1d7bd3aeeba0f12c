"""timm's LeViT, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import gradients, relative
from tests.integrations.timm.vision import VisionSuite, widened
from timm.models.levit import Levit

from flashbias.integrations import patch


class TestLeViT(VisionSuite):
    """5 x 6 patches, then 3 x 3: images of one size."""

    length = 30
    size = other_size = (80, 96)
    parts = ("bias",)
    drops = False
    small = 1e-2  # in front of batch norms, gradients are zero but for rounding

    def make(self, dropout: float = 0.0, **options: Any) -> Levit:
        torch.manual_seed(self.seed)
        shape: dict[str, Any] = {"embed_dim": (24, 48), "key_dim": 8, "depth": (1, 1), "num_heads": (3, 6)}
        return widened(Levit(self.size, num_classes=0, **(shape | options)))

    @pytest.mark.parametrize("options", [{"use_conv": True}, {"down_op": "pool", "attn_ratio": 1.5}], ids=str)
    def test_ways_to_project(self, options: dict[str, Any]) -> None:
        """Convolutions on images; queries of pooled tokens, and values of another width than keys."""
        model, given = self.make(**options).double().train(), self.inputs(padded=False)
        expected = self.result(model, given)
        expected_gradients = gradients(model, expected)
        assert [entry.family for entry in patch(model)].count("LeViT downsampling (timm)") == 1
        found = self.result(model, given)
        assert relative(found, expected) < 1e-12
        tables = [name for name in expected_gradients if name.endswith("attention_biases")]
        assert len(tables) == 3
        for name, gradient in gradients(model, found).items():
            if name in tables:
                assert relative(gradient, expected_gradients[name]) < 1e-10
