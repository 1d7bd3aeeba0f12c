"""BEiT, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.suite import gradients, relative
from tests.integrations.transformers.vision import VisionSuite
from tests.integrations.vision import compiles_to_one_graph, draw_tables
from transformers import BeitConfig, BeitForImageClassification, BeitModel

from flashbias.integrations import patch, supports

TABLES = {
    "layers": {"use_relative_position_bias": True, "use_shared_relative_position_bias": False},
    "shared": {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    "both": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
}


def beit(dropout: float = 0.0, tables: str = "both", **options: Any) -> BeitModel:
    """5 x 8 patches; `eager`, because beside `sdpa` transformers adds boolean masks to the bias as numbers."""
    shape: dict[str, Any] = {"image_size": [20, 32], "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.3, "drop_path_rate": 0.0}
    shape |= {"hidden_dropout_prob": 0.0, "layer_scale_init_value": 0.5, "attn_implementation": "eager"}
    shape |= TABLES.get(tables, {}) | options
    config = BeitConfig(**shape, attention_probs_dropout_prob=dropout)
    model = BeitModel(config, add_pooling_layer=False).eval()
    draw_tables(model)
    return model


class TestBeit(VisionSuite):
    stack = "BeitModel"
    length = 41
    size, other_size = (20, 32), (16, 40)
    softmax_in_float32 = True
    checkpointing = ("no", "checkpoint")  # of the shared table, reentrant checkpoints free the graph too early

    def make(self, dropout: float = 0.0) -> BeitModel:
        torch.manual_seed(self.seed)
        return beit(dropout)

    def inputs(self, padded: bool, padding_side: str | None = None) -> dict[str, Any]:
        given = super().inputs(padded)
        if padded:
            keep = torch.ones(2, self.length, dtype=torch.long)
            keep[1, 30:] = 0
            given |= {"interpolate_pos_encoding": True, "attention_mask": keep}
        return given

    def test_saved_patched_loads_unpatched(self, tmp_path: Any) -> None:
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            model.save_pretrained(tmp_path)
            loaded = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False, attn_implementation="eager").eval()
            assert relative(self.result(loaded, given), expected) < 1e-5

    @pytest.mark.parametrize("tables", TABLES)
    @pytest.mark.parametrize("size", [(24, 24), (16, 40)], ids=str)
    def test_where_the_tables_are(self, tables: str, size: tuple[int, int]) -> None:
        """In each layer, in one place for all, in both; for a square image and a stretched one."""
        torch.manual_seed(0)
        model, pixels = beit(tables=tables, image_size=24), torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(pixels)[0]
            report = patch(model)
            assert relative(model(pixels)[0], expected) < 1e-5
        assert len(report.replaced) == 2

    def test_images_of_changing_size(self) -> None:
        model, sizes = self.make(), [(20, 32), (16, 40), (20, 32), (40, 16), (8, 8)]
        images = [torch.randn(1, 3, *size) for size in sizes]
        with torch.no_grad():
            expected = [model(image, interpolate_pos_encoding=True)[0] for image in images]
            patch(model)
            for image, out in zip(images, expected, strict=True):
                assert relative(model(image, interpolate_pos_encoding=True)[0], out) < 1e-5

    def test_reentrant_checkpoints_of_layer_tables(self) -> None:
        torch.manual_seed(0)
        model, given = beit(tables="layers").train(), self.inputs(padded=True)
        expected = gradients(model, self.result(model, given))
        patch(model)
        model.activation_checkpointing_enable({"use_reentrant": True})
        found = gradients(model, self.result(model, given))
        for name, gradient in expected.items():
            assert float((found[name] - gradient).abs().max()) < 1e-4 * float(gradient.abs().max() + 1e-3), name

    def test_padding_is_hidden_beside_sdpa_too(self) -> None:
        """Unpatched, transformers 5.23 adds the boolean mask to the bias there: hidden keys get 0, the others 1."""
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            model.set_attn_implementation("sdpa")
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_classifier(self) -> None:
        torch.manual_seed(0)
        model = BeitForImageClassification(beit().config).eval()
        draw_tables(model)
        pixels = self.inputs(padded=False)["pixel_values"]
        with torch.no_grad():
            expected = model(pixels).logits
            patch(model)
            assert relative(model(pixels).logits, expected) < 1e-5

    def test_absolute_positions_alone_are_no_bias(self) -> None:
        model = beit(tables="none")
        assert len(supports(model)) == 0
        with pytest.raises(ValueError, match="no attention with a bias that is known here"):
            patch(model)

    def test_attention_called_by_itself_is_refused(self) -> None:
        model = self.make()
        patch(model)
        with pytest.raises(ValueError, match="attention_mask must come from a patched layer, got NoneType"):
            model.get_submodule("layers.0.attention")(torch.randn(1, 41, 32))

    def test_compiles(self) -> None:
        torch.manual_seed(0)
        compiles_to_one_graph(beit(num_hidden_layers=1), **self.inputs(padded=True))
