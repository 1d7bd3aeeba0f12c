"""MPT, patched, against itself."""

from __future__ import annotations

import pytest
import torch
from tests.integrations.transformers.suite import LENGTH, VOCABULARY, DecoderSuite, relative
from transformers import MptConfig, MptForCausalLM

from flashbias.integrations import patch


def mpt(dropout: float = 0.0, **attention: object) -> MptForCausalLM:
    config = MptConfig(
        vocab_size=VOCABULARY, d_model=48, n_layers=2, n_heads=6, initializer_range=0.3, max_seq_len=64,
        attn_config=attention,
    )  # fmt: skip
    model = MptForCausalLM(config).eval()
    for block in model.transformer.blocks:
        block.attn.attn_dropout_p = dropout  # the configuration takes integers only
    return model


class TestMpt(DecoderSuite):
    stack = "MptModel"
    form = "exact factors"
    rank = 1
    softmax_in_float32 = True

    def make(self, dropout: float = 0.0) -> MptForCausalLM:
        torch.manual_seed(self.seed)
        return mpt(dropout)

    @pytest.mark.parametrize("option", [{"clip_qkv": 0.5}, {"softmax_scale": 0.7}], ids=["clip_qkv", "softmax_scale"])
    def test_options(self, option: dict[str, float]) -> None:
        given, model = self.inputs(padded=True), mpt(**option)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_mask_of_four_dimensions(self) -> None:
        """transformers' own MPT reads additive ones only: a boolean one it would turn around."""
        given, model = self.inputs(padded=False), self.make()
        keep = torch.rand(3, 1, LENGTH, LENGTH) < 0.5
        keep[..., 0] = True
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = model(**given, attention_mask=mask)[0]
            patch(model)
            assert relative(model(**given, attention_mask=mask)[0], expected) < 1e-5

    def test_scale_that_is_not_positive_is_not_supported(self) -> None:
        with pytest.raises(NotImplementedError, match=r"softmax_scale=-1.0: must be positive"):
            patch(mpt(softmax_scale=-1.0))

    def test_more_keys_than_the_bias_has(self) -> None:
        model = mpt()
        patch(model)
        with pytest.raises(ValueError, match=r"config.max_seq_len=64 and there are 65 keys"):
            model(torch.ones(1, 65, dtype=torch.long))
        model.transformer.config.max_seq_len = 65
        assert model(torch.ones(1, 65, dtype=torch.long)).logits.isfinite().all()
