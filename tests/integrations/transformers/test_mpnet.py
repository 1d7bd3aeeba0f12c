"""MPNet, patched, against itself."""

from __future__ import annotations

import pytest
import torch
from tests.integrations.transformers.suite import LENGTH, PADDING, VOCABULARY, PatchedModelSuite, relative
from transformers import MPNetConfig, MPNetModel

from flashbias.integrations import patch


def mpnet(dropout: float = 0.0, **options: int) -> MPNetModel:
    config = MPNetConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64,
        initializer_range=0.3, max_position_embeddings=256, pad_token_id=PADDING, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=dropout, **options,
    )  # fmt: skip
    return MPNetModel(config).eval()


class TestMPNet(PatchedModelSuite):
    stack = "MPNetEncoder"
    form = "exact table"
    rank = 0
    checkpointing = ("no",)  # transformers' own MPNet has none
    padding_side = "right"
    hidden_rows_differ = False

    def make(self, dropout: float = 0.0) -> MPNetModel:
        torch.manual_seed(self.seed)
        return mpnet(dropout)

    def test_beyond_the_largest_distance(self) -> None:
        tokens, model = torch.randint(3, VOCABULARY, (1, 200)), self.make()
        with torch.no_grad():
            expected = model(tokens)[0]
            patch(model)
            assert relative(model(tokens)[0], expected) < 1e-5

    def test_the_encoder_alone_takes_masks_of_four_dimensions(self) -> None:
        """Its model goes on to make them, as it does not know of the patch."""
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model.encoder)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_mask_of_each_pair(self) -> None:
        given, model = self.inputs(padded=False), self.make()
        keep = torch.rand(3, 1, LENGTH, LENGTH) < 0.5
        keep[..., 0] = True
        additive = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = model(**given, attention_mask=additive)[0]
            patch(model)
            for mask in (additive, keep):
                assert relative(model(**given, attention_mask=mask)[0], expected) < 1e-5

    def test_a_bias_in_the_mask_is_refused(self) -> None:
        model = self.make()
        patch(model)
        with pytest.raises(ValueError, match="a bias cannot travel in the mask"):
            model(**self.inputs(padded=False), attention_mask=torch.randn(3, 1, LENGTH, LENGTH))
        with pytest.raises(TypeError, match=r"must be bool .* got torch.int64"):
            model(**self.inputs(padded=False), attention_mask=torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.long))

    def test_an_embedding_of_too_few_buckets_is_not_supported(self) -> None:
        with pytest.raises(NotImplementedError, match="relative_attention_num_buckets=16: the model reads 32"):
            patch(mpnet(relative_attention_num_buckets=16))
