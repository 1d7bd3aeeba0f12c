"""Both forms of a bias in a patched model, through the Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.transformers.suite import PADDING, VOCABULARY, relative
from transformers import BloomConfig, BloomModel, T5Config, T5EncoderModel

from flashbias.integrations import patch

pytestmark = pytest.mark.interpreter


def bloom() -> BloomModel:
    return BloomModel(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.3))


def t5() -> T5EncoderModel:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": PADDING}
    model = T5EncoderModel(T5Config(vocab_size=VOCABULARY, **shape))
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(10)
    return model


@pytest.mark.parametrize("make", [bloom, t5])
def test_outputs(make: Any) -> None:
    torch.manual_seed(0)
    model, tokens = make().eval(), torch.randint(3, VOCABULARY, (2, 40))
    keep = torch.ones_like(tokens)
    keep[1, :9] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=keep)[0]
        patch(model, impl="triton")
        found = model(tokens, attention_mask=keep)[0]
    assert relative(found[keep.bool()], expected[keep.bool()]) < 1e-5
