"""Swin V2, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import relative
from tests.integrations.transformers.vision import VisionSuite
from tests.integrations.vision import compiles_to_one_graph
from torch import nn
from transformers import Swinv2Backbone, Swinv2Config, Swinv2ForImageClassification, Swinv2Model

from flashbias.integrations import patch, supports


def swinv2(dropout: float = 0.0, **options: Any) -> Swinv2Model:
    shape: dict[str, Any] = {"image_size": 40, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    shape |= {"window_size": 5, "drop_path_rate": 0.0, "initializer_range": 0.3}
    model = Swinv2Model(Swinv2Config(**(shape | options), attention_probs_dropout_prob=dropout)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            nn.init.uniform_(parameter, 0, 3)
    return model


class TestSwinV2(VisionSuite):
    stack = "Swinv2Encoder"
    length = 25
    size, other_size = (40, 40), (37, 43)

    def make(self, dropout: float = 0.0) -> Swinv2Model:
        torch.manual_seed(self.seed)
        return swinv2(dropout)

    def test_compiles(self) -> None:
        torch.manual_seed(self.seed)
        compiles_to_one_graph(swinv2(depths=[2], num_heads=[2]), **self.inputs(padded=True))

    @pytest.mark.parametrize("cls", [Swinv2ForImageClassification, Swinv2Backbone])
    def test_models_around_it(self, cls: Any) -> None:
        torch.manual_seed(self.seed)
        model, given = cls(swinv2().config).eval(), self.inputs(padded=True)
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
        model, given = swinv2(image_size=20), {"pixel_values": torch.randn(3, 3, 20, 20)}
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_attention_called_by_itself_is_refused(self) -> None:
        model = self.make()
        patch(model)
        attention = model.get_submodule("encoder.layers.0.blocks.1.attention.self")
        with pytest.raises(ValueError, match=r"the mask must be what the patched layer makes, .*\(4, 25, 25\)"):
            attention(torch.randn(4, 25, 32), torch.zeros(4, 25, 25))

    def test_layers_with_other_masks_are_not_supported(self) -> None:
        model = self.make()
        layer: Any = model.get_submodule("encoder.layers.0.blocks.1")
        layer.__class__ = type("OtherLayer", (type(layer),), {"get_attn_mask": lambda self, *args, **options: None})
        assert not supports(model).replaced
        with pytest.raises(NotImplementedError, match="OtherLayer overrides get_attn_mask"):
            patch(model)

    def test_scales_beyond_the_largest(self) -> None:
        """Clamped at 100: scores then reach 216 beside a mask of -200, and the mask no longer hides all."""
        model, given = self.make().double(), self.inputs(padded=True)
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                nn.init.constant_(parameter, 6.0)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-12
