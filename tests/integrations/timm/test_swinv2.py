"""timm's Swin V2, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import relative
from tests.integrations.timm.vision import VisionSuite, WindowTests, widened
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from flashbias.integrations import patch


def swinv2(dropout: float = 0.0, **options: Any) -> SwinTransformerV2:
    shape: dict[str, Any] = {"img_size": 40, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
    shape |= {"window_size": 5, "num_classes": 0, "drop_path_rate": 0.0, "attn_drop_rate": dropout}
    return widened(SwinTransformerV2(**(shape | {"strict_img_size": False} | options)))


class TestSwinV2(WindowTests, VisionSuite):
    def make(self, dropout: float = 0.0, **options: Any) -> SwinTransformerV2:
        torch.manual_seed(self.seed)
        return swinv2(dropout, **options)

    def test_scales_beyond_the_largest(self) -> None:
        """Clamped at 100: scores then reach 116 beside a mask of -100, and the mask no longer hides all."""
        model, given = self.make().double(), self.inputs(padded=True)
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                nn.init.constant_(parameter, 6.0)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-12

    @pytest.mark.parametrize("bias", ["none", "apart"])
    def test_biases_of_the_projection(self, bias: str) -> None:
        model, given = self.make(qkv_bias=bias != "none"), self.inputs(padded=False)
        for module in model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = bias == "apart"
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_windows_of_the_training(self) -> None:
        """Offsets are counted in windows of the size that the network was trained with."""
        model, given = self.make(pretrained_window_sizes=(3, 4)), self.inputs(padded=True)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5
