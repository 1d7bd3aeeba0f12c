"""Swin, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import relative
from tests.integrations.transformers.vision import VisionSuite
from tests.integrations.vision import draw_tables
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification, SwinModel

from flashbias.integrations import patch, supports


def swin(dropout: float = 0.0, **options: Any) -> SwinModel:
    shape: dict[str, Any] = {"image_size": 40, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    shape |= {"window_size": 5, "drop_path_rate": 0.0, "initializer_range": 0.3}
    model = SwinModel(SwinConfig(**(shape | options), attention_probs_dropout_prob=dropout)).eval()
    draw_tables(model)
    return model


class TestSwin(VisionSuite):
    stack = "SwinEncoder"
    length = 25
    size, other_size = (40, 40), (37, 43)

    def make(self, dropout: float = 0.0) -> SwinModel:
        torch.manual_seed(self.seed)
        return swin(dropout)

    @pytest.mark.interpreter
    def test_kernels(self) -> None:
        """Table and factors, shared by images and heads, through the Triton kernels."""
        torch.manual_seed(self.seed)
        model = swin(depths=[2], num_heads=[2], image_size=20, window_size=5)
        pixels = torch.randn(1, 3, 20, 14)
        with torch.no_grad():
            expected = model(pixels)[0]
            patch(model, impl="triton")
            assert relative(model(pixels)[0], expected) < 1e-5

    @pytest.mark.parametrize("cls", [SwinForImageClassification, SwinBackbone])
    def test_models_around_it(self, cls: Any) -> None:
        torch.manual_seed(self.seed)
        model, given = cls(swin().config).eval(), self.inputs(padded=True)
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                torch.nn.init.normal_(parameter)
        with torch.no_grad():
            expected = model(**given, return_dict=True)
            report = patch(model)
            found = model(**given, return_dict=True)
        assert len(report.replaced) == 4
        for mine, theirs in zip(found.to_tuple()[0], expected.to_tuple()[0], strict=True):
            assert relative(mine, theirs) < 1e-5

    def test_one_window_is_the_whole_image(self) -> None:
        """The last stage then has no shift."""
        torch.manual_seed(self.seed)
        model, given = swin(image_size=20), {"pixel_values": torch.randn(3, 3, 20, 20)}
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_attention_called_by_itself_is_refused(self) -> None:
        model = self.make()
        patch(model)
        attention = model.get_submodule("encoder.layers.0.blocks.1.attention")
        with pytest.raises(ValueError, match=r"the mask must be what the patched layer makes, .*\(4, 25, 25\)"):
            attention(torch.randn(4, 25, 32), torch.zeros(4, 25, 25))

    def test_layers_with_other_masks_are_not_supported(self) -> None:
        model = self.make()
        layer: Any = model.get_submodule("encoder.layers.0.blocks.1")
        layer.__class__ = type("OtherLayer", (type(layer),), {"get_attn_mask": lambda self, *args, **options: None})
        assert not supports(model).replaced
        with pytest.raises(NotImplementedError, match="OtherLayer overrides get_attn_mask"):
            patch(model)
