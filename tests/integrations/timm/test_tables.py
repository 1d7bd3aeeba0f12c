"""Learned tables of timm as factors: the promise, and that nothing goes stale."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.integrations.tables import keeps_its_certificates, notices_changes, smooth
from tests.integrations.timm.test_beit import beit
from tests.integrations.timm.test_relpos import maxvit
from tests.integrations.timm.test_swin import swin
from tests.integrations.timm.vision import widened
from timm.models.levit import Levit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from flashbias.integrations import patch


def levit() -> Levit:
    return widened(Levit((80, 96), num_classes=0, embed_dim=(24, 48), key_dim=8, depth=(1, 1), num_heads=(3, 6)))


def swinv2() -> SwinTransformerV2:
    shape: dict[str, Any] = {"img_size": 40, "patch_size": 2, "embed_dim": 32, "depths": (2,), "num_heads": (2,)}
    model = SwinTransformerV2(**shape, window_size=5, num_classes=0, strict_img_size=False).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm1.weight"):  # zero in a new model: nothing of an attention would be seen
            torch.nn.init.ones_(parameter)
    return model


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "Swin": (swin, (36, 44)),
    "SwinV2": (swinv2, (36, 44)),
    "BEiT": (beit, (20, 32)),
    "MaxViT": (maxvit, (64, 80)),
    "LeViT": (levit, (80, 96)),
}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    return smooth(make()), torch.randn(2, 3, *size)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_keeps_its_certificate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps_its_certificates(*made(name), monkeypatch)


class Pair(nn.Module):
    """A student and its teacher, say."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward_features(self, images: Tensor) -> Tensor:
        return self.first.forward_features(images) + self.second.forward_features(images)


def shared_vit() -> VisionTransformerRelPos:
    shape: dict[str, Any] = {"img_size": (20, 32), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return widened(
        VisionTransformerRelPos(**shape, num_classes=0, init_values=0.5, class_token=True, shared_rel_pos=True)
    )


@pytest.mark.parametrize("make", [partial(beit, tables="shared"), beit, shared_vit])
def test_two_models_in_one_read_their_own_shared_tables(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pair = Pair(smooth(make()), smooth(make()))
    for name, table in pair.second.named_parameters():
        if name.endswith("relative_position_bias_table"):
            table.data.mul_(-3.0)
    keeps_its_certificates(pair, torch.randn(2, 3, 20, 32), monkeypatch)


def test_a_model_without_tables_takes_none_from_its_neighbour() -> None:
    torch.manual_seed(0)
    pair, images = Pair(smooth(beit(tables="none")), smooth(beit(tables="shared"))), torch.randn(2, 3, 20, 32)
    with torch.no_grad():
        expected = pair.first.forward_features(images)
        report = patch(pair, tol=0.1, tables="factors")
        assert torch.equal(pair.first.forward_features(images), expected)
    assert [entry.name for entry in report] == ["second.blocks.0.attn", "second.blocks.1.attn"]


@pytest.mark.parametrize("name", ["Swin", "BEiT"])
def test_a_table_that_changes_is_noticed(name: str) -> None:
    notices_changes(*made(name), "in place")
