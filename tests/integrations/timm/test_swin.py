"""timm's Swin, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from tests.integrations.suite import relative
from tests.integrations.timm.vision import VisionSuite, WindowTests, widened
from tests.integrations.vision import compiles_to_one_graph
from timm.models.swin_transformer import SwinTransformer

from flashbias.integrations import patch, supports


def swin(dropout: float = 0.0, **options: Any) -> SwinTransformer:
    shape: dict[str, Any] = {"img_size": 40, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
    shape |= {"window_size": 5, "num_classes": 0, "drop_path_rate": 0.0, "attn_drop_rate": dropout}
    return widened(SwinTransformer(**(shape | {"strict_img_size": False} | options)))


class TestSwin(WindowTests, VisionSuite):
    def make(self, dropout: float = 0.0, **options: Any) -> SwinTransformer:
        torch.manual_seed(self.seed)
        return swin(dropout, **options)

    def test_compiles(self) -> None:
        model = self.make(depths=(2,), num_heads=(2,))
        compiles_to_one_graph(model, x=self.inputs(padded=True)["pixel_values"])

    @pytest.mark.interpreter
    def test_kernels(self) -> None:
        """Table and factors, shared by images and heads, through the Triton kernels."""
        model = self.make(depths=(2,), num_heads=(2,), img_size=20)
        pixels = torch.randn(1, 3, 20, 14)
        with torch.no_grad():
            expected = model(pixels)
            patch(model, impl="triton")
            assert relative(model(pixels), expected) < 1e-5

    def test_heads_of_their_own_width(self) -> None:
        """S3 and the like: the heads together are wider than the model."""
        model, given = self.make(head_dim=24), self.inputs(padded=False)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_a_registered_model(self) -> None:
        """Every attention of a model as it is published, twelve of them, whose last stage has no shift."""
        torch.manual_seed(self.seed)
        model = widened(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, img_size=112)).double()
        pixels = torch.randn(1, 3, 112, 112, dtype=torch.float64)
        with torch.no_grad():
            expected = model(pixels)
            assert len(supports(model).replaced) == len(patch(model).replaced) == 12
            assert relative(model(pixels), expected) < 1e-11
