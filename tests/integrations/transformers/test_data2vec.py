"""data2vec's vision model, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import relative
from tests.integrations.transformers.vision import VisionSuite
from tests.integrations.vision import draw_tables
from transformers import Data2VecVisionConfig, Data2VecVisionModel

from flashbias.integrations import patch


def data2vec(dropout: float = 0.0, **options: Any) -> Data2VecVisionModel:
    shape: dict[str, Any] = {"image_size": [20, 32], "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.3, "drop_path_rate": 0.0}
    shape |= {"hidden_dropout_prob": 0.0, "layer_scale_init_value": 0.5, "use_relative_position_bias": True}
    config = Data2VecVisionConfig(**(shape | options), attention_probs_dropout_prob=dropout)
    model = Data2VecVisionModel(config).eval()
    draw_tables(model)
    return model


class TestData2VecVision(VisionSuite):
    stack = "Data2VecVisionEncoder"
    length = 41
    size, other_size = (20, 32), (16, 40)
    parts = ("bias",)

    def make(self, dropout: float = 0.0) -> Data2VecVisionModel:
        torch.manual_seed(self.seed)
        return data2vec(dropout)

    @pytest.mark.parametrize("own", [False, True], ids=["", "own"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_shared_table(self, own: bool, implementation: str) -> None:
        torch.manual_seed(0)
        model = data2vec(
            attn_implementation=implementation,
            use_relative_position_bias=own,
            use_shared_relative_position_bias=True,
        )
        given = self.inputs(padded=True) | {"interpolate_pos_encoding": True}
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5
