"""What every patched model of timm owes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from tests.integrations.suite import relative
from tests.integrations.vision import ImageTests
from torch import Tensor, nn

from flashbias.integrations import patch, supports, unpatch


class VisionSuite(ImageTests):
    """Tests of one family. timm recomputes with checkpoints that are not reentrant."""

    checkpointing = ("no", "checkpoint")
    new_size: ClassVar[tuple[int, int] | None] = None
    """What the model is told that its images have from now on; None if it cannot be told."""

    def result(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model.forward_features(inputs["pixel_values"].to(next(model.parameters()).dtype)).flatten(0, -2)

    def enable_checkpointing(self, model: Any, reentrant: bool) -> None:
        assert not reentrant
        model.set_grad_checkpointing(True)

    def test_set_input_size(self) -> None:
        """Another size while patched; taken back afterwards, the model is one that never was patched."""
        if self.new_size is None:
            pytest.skip("the model's size is fixed")
        model, pixels = self.make(), torch.randn(2, 3, *self.new_size)
        other = copy.deepcopy(model)
        with torch.no_grad():
            patch(model)
            for each in (model, other):
                each.set_input_size(self.new_size)
            expected = other(pixels)
            assert relative(model(pixels), expected) < 1e-5
            unpatch(model)
            assert torch.equal(model(pixels), expected)
        assert {name: tuple(x.shape) for name, x in model.named_buffers()} == {
            name: tuple(x.shape) for name, x in other.named_buffers()
        }

    def test_without_fused_attention(self) -> None:
        """Nothing changes with the way in which the model itself would attend."""
        given, results = self.inputs(padded=False), []
        for fused in (False, True):
            model = self.make()
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            with torch.no_grad():
                expected = self.result(model, given)
                patch(model)
                results.append(self.result(model, given))
                assert relative(results[-1], expected) < 1e-5
        assert torch.equal(*results)

    def test_intermediate_features(self) -> None:
        model, given = self.make(), self.inputs(padded=False)
        with torch.no_grad():
            expected = model.forward_intermediates(given["pixel_values"], intermediates_only=True)
            patch(model)
            found = model.forward_intermediates(given["pixel_values"], intermediates_only=True)
        assert len(found) == len(expected) > 1
        for mine, theirs in zip(found, expected, strict=True):
            assert relative(mine, theirs) < 1e-5


def widened(model: Any) -> Any:
    """Draw all weights wide, so that attention is far from uniform and a wrong bias or mask shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            nn.init.uniform_(parameter, 0, 3)
        elif name.endswith("weight") and parameter.dim() == 1:  # of norms, which are zero behind Swin V2's attentions
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() >= 2 or name.endswith("bias"):
            is_table = name.endswith(("relative_position_bias_table", "attention_biases"))
            nn.init.normal_(parameter, std=2.0 if is_table else parameter[0].numel() ** -0.5)
    return model.eval()


class WindowTests(ImageTests):
    """Tests of a family that shifts its windows."""

    length = 25
    size, other_size, new_size = (40, 40), (36, 44), (36, 44)

    @pytest.mark.parametrize("always_partition", [False, True])
    @pytest.mark.parametrize("size", [(40, 40), (36, 20), (16, 40)], ids=str)
    def test_masks_made_beforehand(self, size: tuple[int, int], always_partition: bool) -> None:
        """Images of one size: the blocks keep their masks, also where one side has no shift, and where padding is."""
        model = self.make(img_size=size, strict_img_size=True, always_partition=always_partition)
        pixels = torch.randn(3, 3, *size)
        masks = {name: mask for name, mask in model.named_buffers() if name.endswith("attn_mask")}
        assert masks
        with torch.no_grad():
            expected = model(pixels)
            patch(model)
            assert relative(model(pixels), expected) < 1e-5
            unpatch(model)
            assert torch.equal(model(pixels), expected)
        assert all(model.get_buffer(name) is mask for name, mask in masks.items())

    @pytest.mark.parametrize("window", [(4, 5), 3, 16], ids=str)
    def test_windows(self, window: int | tuple[int, int]) -> None:
        """Oblong ones, an odd number of windows, and one window that is the whole image."""
        model, given = self.make(window_size=window), self.inputs(padded=True)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_masks_made_beforehand_follow_the_size(self) -> None:
        """A size that is set while patched; unpatched, the blocks have the masks of that size."""
        model, other = (self.make(strict_img_size=True) for _ in range(2))
        pixels = torch.randn(2, 3, 56, 40)
        with torch.no_grad():
            patch(model)
            for each in (model, other):
                each.set_input_size((56, 40), window_size=(7, 5))
            expected = other(pixels)
            assert relative(model(pixels), expected) < 1e-5
            unpatch(model)
            assert torch.equal(model(pixels), expected)
        masks = {name: mask for name, mask in other.named_buffers() if name.endswith("attn_mask")}
        assert masks
        assert all(torch.equal(model.get_buffer(name), mask) for name, mask in masks.items())

    def test_attention_called_by_itself_is_refused(self) -> None:
        model = self.make()
        patch(model)
        attention = model.get_submodule("layers.0.blocks.1.attn")
        with pytest.raises(ValueError, match=r"the mask must be what the patched layer makes, .*\(4, 25, 25\)"):
            attention(torch.randn(4, 25, 32), torch.zeros(4, 25, 25))

    def test_part_of_a_model_is_refused(self) -> None:
        entry = supports(self.make()).entries[0]
        part = self.make().get_submodule(entry.name)
        with pytest.raises(NotImplementedError, match="is a part of a model; patch a model with its"):
            patch(part)

    def test_blocks_with_other_masks_are_not_supported(self) -> None:
        model = self.make()
        block: Any = model.get_submodule("layers.0.blocks.1")
        block.__class__ = type("OtherBlock", (type(block),), {"get_attn_mask": lambda self, *args, **options: None})
        assert len(supports(model).unsupported) == 1
        with pytest.raises(NotImplementedError, match="OtherBlock overrides get_attn_mask"):
            patch(model)

    def test_blocks_with_another_attention_keep_their_masks(self) -> None:
        """An attention of the user's own in one of the blocks gets what it always got."""
        seen: list[Any] = []

        class Mine(nn.Module):
            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
                seen.append(mask)
                return x

        model, given = self.make(), self.inputs(padded=False)
        model.get_submodule("layers.0.blocks.1").attn = Mine()
        with torch.no_grad():
            expected = self.result(model, given)
            assert len(patch(model).replaced) == 3
            assert relative(self.result(model, given), expected) < 1e-5
        assert torch.equal(*seen)
        assert seen[0].shape == (16, 25, 25)
