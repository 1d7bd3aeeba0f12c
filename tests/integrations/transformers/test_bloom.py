"""BLOOM, patched, against itself."""

from __future__ import annotations

import pytest
import torch
from tests.integrations.transformers.suite import PADDING, VOCABULARY, DecoderSuite, relative
from transformers import BloomConfig, BloomForCausalLM, BloomModel

from flashbias.integrations import patch


class TestBloom(DecoderSuite):
    stack = "BloomModel"
    form = "exact factors"
    rank = 1
    softmax_in_float32 = True

    def make(self, dropout: float = 0.0) -> BloomForCausalLM:
        torch.manual_seed(self.seed)
        config = BloomConfig(
            vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6, initializer_range=0.3, pad_token_id=PADDING,
            attention_dropout=dropout,
        )  # fmt: skip
        return BloomForCausalLM(config).eval()

    def test_padding_in_the_middle_moves_positions(self) -> None:
        """The model counts positions without padding, so a hole brings what is around it together."""
        given = self.inputs(padded=True)
        given["attention_mask"][0, 5:15] = 0
        model = self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_projection_in_slices_is_not_supported(self) -> None:
        model = BloomModel(BloomConfig(hidden_size=16, n_head=2, pretraining_tp=2, slow_but_exact=True))
        with pytest.raises(NotImplementedError, match=r"slow_but_exact=True with config.pretraining_tp=2"):
            patch(model)
