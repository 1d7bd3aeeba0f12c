"""Falcon with ALiBi, patched, against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.transformers.suite import LENGTH, VOCABULARY, DecoderSuite, relative
from transformers import FalconConfig, FalconForCausalLM, FalconModel, StaticCache

from flashbias.integrations import patch, supports


def falcon(dropout: float = 0.0, **options: Any) -> FalconForCausalLM:
    options = {"alibi": True, "multi_query": True, "attn_implementation": "sdpa"} | options
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, initializer_range=0.3,
        attention_dropout=dropout, **options,
    )  # fmt: skip
    return FalconForCausalLM(config).eval()


class TestFalcon(DecoderSuite):
    stack = "FalconModel"
    form = "exact factors"
    rank = 1
    cache = ("dynamic",)  # transformers' own Falcon with ALiBi fails with a static one

    def make(self, dropout: float = 0.0) -> FalconForCausalLM:
        torch.manual_seed(self.seed)
        return falcon(dropout)

    @pytest.mark.parametrize(
        "options",
        [{"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}],
        ids=["heads", "groups"],
    )
    def test_layouts_of_keys(self, options: dict[str, Any]) -> None:
        given, model = self.inputs(padded=True), falcon(**options)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5

    def test_cache_of_fixed_size(self) -> None:
        """It works when the padding mask has the size of the cache."""
        given, model = self.inputs(padded=True), self.make()
        given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 9))

        def prefill() -> torch.Tensor:
            cache = StaticCache(config=model.config, max_cache_len=LENGTH + 9)
            return model(**given, past_key_values=cache).logits[given["attention_mask"][:, :LENGTH].bool()]

        with torch.no_grad():
            expected = prefill()
            patch(model)
            assert relative(prefill(), expected) < 1e-5

    def test_eager_is_not_supported(self) -> None:
        """transformers adds ALiBi twice there: the patched model would be another one."""
        with pytest.raises(NotImplementedError, match="'eager' adds ALiBi twice"):
            patch(falcon(attn_implementation="eager"))

    def test_eager_does_add_it_twice(self) -> None:
        """Should this fail one day, the refusal above has no reason any more."""
        given, (eager, sdpa) = self.inputs(padded=False), (falcon(attn_implementation=n) for n in ("eager", "sdpa"))
        sdpa.load_state_dict(eager.state_dict())
        with torch.no_grad():
            assert relative(self.result(eager, given), self.result(sdpa, given)) > 1e-2

    def test_rotary_falcon_has_no_bias(self) -> None:
        model = FalconModel(FalconConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        assert len(supports(model)) == 0
        with pytest.raises(ValueError, match="no attention with a bias that is known here, got FalconModel; known are"):
            patch(model)
