"""timm's BEiT, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import relative
from tests.integrations.timm.vision import VisionSuite, widened
from tests.integrations.vision import compiles_to_one_graph
from timm.models.beit import Beit, RelativePositionBias
from torch import Tensor

from flashbias.integrations import patch, supports

TABLES = {
    "blocks": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False},
    "shared": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "both": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
    "none": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": False},
}


def beit(dropout: float = 0.0, tables: str = "both", **options: Any) -> Beit:
    """5 x 8 patches."""
    shape: dict[str, Any] = {"img_size": (20, 32), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    shape |= {"mlp_ratio": 2, "num_classes": 0, "init_values": 0.5, "attn_drop_rate": dropout, "global_pool": "token"}
    return widened(Beit(**(shape | TABLES[tables] | options)))


class TestBeit(VisionSuite):
    """The model takes images of the size that it is made for; another one it must be told of."""

    length = 41
    size = other_size = (20, 32)
    new_size = (16, 40)
    parts = ("bias",)

    def make(self, dropout: float = 0.0, **options: Any) -> Beit:
        torch.manual_seed(self.seed)
        return beit(dropout, **options)

    @pytest.mark.parametrize("tables", ["blocks", "shared", "both"])
    def test_where_the_tables_are(self, tables: str) -> None:
        model, given = self.make(tables=tables), self.inputs(padded=False)
        with torch.no_grad():
            expected = self.result(model, given)
            report = patch(model)
            assert relative(self.result(model, given), expected) < 1e-5
        assert [entry.name for entry in report.replaced] == ["blocks.0.attn", "blocks.1.attn"]

    @pytest.mark.parametrize("bias", ["none", "apart"])
    def test_biases_of_the_projection(self, bias: str) -> None:
        model, given = self.make(qkv_bias=bias != "none"), self.inputs(padded=False)
        for block in model.blocks:
            block.attn.qkv_bias_separate = bias == "apart"
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_absolute_positions_alone_are_no_bias(self) -> None:
        model = self.make(tables="none")
        assert len(supports(model)) == 0
        with pytest.raises(ValueError, match="no attention with a bias that is known here"):
            patch(model)

    def test_part_of_a_model_is_refused(self) -> None:
        """Only what the part lacks: a block with its own table can be patched, and then takes no other bias."""
        model, x = self.make(), torch.randn(2, 41, 32)
        block = model.blocks[0]
        with torch.no_grad():
            expected = block(x)
            assert len(patch(block).replaced) == 1
            assert relative(block(x), expected) < 1e-5
            message = "shared_rel_pos_bias must come from a patched model, got Tensor; call the model, not one of its"
            with pytest.raises(ValueError, match=message):
                model(self.inputs(padded=False)["pixel_values"])
        with pytest.raises(ValueError, match="no attention with a bias that is known here"):
            patch(self.make(tables="shared").blocks)

    def test_another_bias_is_not_supported(self) -> None:
        class OtherBias(RelativePositionBias):
            def forward(self) -> Tensor:
                return 2 * super().forward()

        model = self.make()
        model.rel_pos_bias.__class__ = OtherBias
        assert not supports(model).replaced
        message = r"BEiT \(timm\) attention 'blocks.0.attn' .* OtherBias overrides the forward of RelativePositionBias"
        with pytest.raises(NotImplementedError, match=message):
            patch(model)

    def test_compiles(self) -> None:
        compiles_to_one_graph(self.make(depth=1), x=self.inputs(padded=False)["pixel_values"])
