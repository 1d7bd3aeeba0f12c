"""timm's MaxViT, CoAtNet and ViT with relative positions, patched, against themselves."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from tests.integrations.suite import relative
from tests.integrations.timm.vision import VisionSuite, widened
from timm.layers.pos_embed_rel import RelPosBias
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from flashbias.integrations import patch, supports


def maxvit(dropout: float = 0.0, block: str = "M", **options: Any) -> MaxxVit:
    """Windows of 4 x 5 tokens and grids of as many, or all tokens where the block is that of CoAtNet."""
    transformer = MaxxVitTransformerCfg(**({"dim_head": 8, "window_size": (4, 5), "attn_drop": dropout} | options))
    config = MaxxVitCfg((16, 32), (1, 1), (block, block), stem_width=8, transformer_cfg=transformer)
    return widened(MaxxVit(config, img_size=(64, 80), num_classes=0))


class TestMaxViT(VisionSuite):
    length = 20
    size = other_size = (64, 80)
    new_size = (48, 56)
    parts = ("bias",)
    small = 1e-2  # in front of batch norms, gradients are zero but for rounding

    def make(self, dropout: float = 0.0, **options: Any) -> MaxxVit:
        torch.manual_seed(self.seed)
        return maxvit(dropout, **options)

    @pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf", "mlp"])
    @pytest.mark.parametrize("layout", ["heads", "parts", "channels first", "coatnet"])
    def test_kinds_and_layouts(self, rel_pos_type: str, layout: str) -> None:
        options: dict[str, Any] = {"head_first": layout != "parts", "use_nchw_attn": layout == "channels first"}
        model, given = self.make(rel_pos_type=rel_pos_type, **options), self.inputs(padded=False)
        if layout == "coatnet":
            model = self.make(rel_pos_type=rel_pos_type, block="T", window_size=None)
        with torch.no_grad():
            expected = self.result(model, given)
            report = patch(model)
            assert relative(self.result(model, given), expected) < 1e-5
        assert len(report.replaced) == (2 if layout == "coatnet" else 4)

    def test_a_bias_of_the_users_own_is_not_supported(self) -> None:
        class Steeper(RelPosBias):
            def get_bias(self) -> torch.Tensor:
                return 2 * super().get_bias()

        kinds = {Steeper: "Steeper overrides what makes the bias of RelPosBias", torch.nn.Identity: "are a Identity"}
        for other, message in kinds.items():
            model = self.make()
            model.get_submodule("stages.0.blocks.0.attn_block.attn.rel_pos").__class__ = other
            assert len(supports(model).unsupported) == 1
            with pytest.raises(NotImplementedError, match=message):
                patch(model)

    def test_without_relative_positions(self) -> None:
        with pytest.raises(ValueError, match="no attention with a bias that is known here"):
            patch(self.make(rel_pos_type=""))


class TestRelPosViT(VisionSuite):
    length = 40
    size = other_size = (20, 32)
    new_size = (16, 40)
    parts = ("bias",)

    def make(self, dropout: float = 0.0, **options: Any) -> VisionTransformerRelPos:
        torch.manual_seed(self.seed)
        shape: dict[str, Any] = {"img_size": self.size, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
        shape |= {"rel_pos_type": "bias", "num_classes": 0, "init_values": 0.5, "attn_drop_rate": dropout}
        return widened(VisionTransformerRelPos(**(shape | options)))

    @pytest.mark.parametrize("shared_rel_pos", [False, True])
    @pytest.mark.parametrize("class_token", [False, True])
    @pytest.mark.parametrize("rel_pos_type", ["bias", "mlp", "mlp-swin"])
    def test_kinds(self, rel_pos_type: str, class_token: bool, shared_rel_pos: bool) -> None:
        options = {"rel_pos_type": rel_pos_type, "class_token": class_token, "shared_rel_pos": shared_rel_pos}
        model, given = self.make(**options, qk_norm=True).double(), self.inputs(padded=False)
        with torch.no_grad():
            expected = self.result(model, given)
            report = patch(model)
            assert relative(self.result(model, given), expected) < 1e-13
        assert [entry.name for entry in report.replaced] == ["blocks.0.attn", "blocks.1.attn"]

    def test_dropout_in_the_network_of_offsets(self) -> None:
        """The network drops hidden units in training, once for each offset: the same ones as in the model."""
        model, given, outputs = self.make(rel_pos_type="mlp").double().train(), self.inputs(padded=False), []
        with torch.no_grad():
            for patched in (False, True):
                if patched:
                    patch(model)
                torch.manual_seed(0)
                outputs.append(self.result(model, given))
            assert relative(outputs[1], outputs[0]) < 1e-13
            assert relative(self.result(model, given), outputs[0]) > 1e-3

    def test_part_of_a_model_is_refused(self) -> None:
        """Only what the part lacks: blocks without the bias that the model hands out to all."""
        model, x = self.make(shared_rel_pos=True), torch.randn(2, 40, 32)
        with pytest.raises(ValueError, match="no attention with a bias that is known here"):
            patch(model.blocks)
        patch(model)
        with pytest.raises(ValueError, match="shared_rel_pos must come from a patched model, got Tensor"):
            model.blocks[0](x, shared_rel_pos=torch.zeros(1, 4, 40, 40))


@pytest.mark.parametrize("name", ["maxxvitv2_nano_rw_256", "coatnet_pico_rw_224", "vit_relpos_small_patch16_224"])
def test_registered_models(name: str) -> None:
    """All of their attentions are known."""
    with torch.device("meta"):
        model = timm.create_model(name)
    report = supports(model)
    attentions = [name for name, module in model.named_modules() if hasattr(module, "qkv")]
    assert [entry.name for entry in report.replaced] == attentions != []
