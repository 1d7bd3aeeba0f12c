"""T5 and mT5, patched, against themselves: encoder, encoder with decoder, cross attention, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.integrations.transformers.suite import LENGTH, PADDING, VOCABULARY, DecoderSuite, PatchedModelSuite, relative
from torch import Tensor, nn
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5EncoderModel, T5ForConditionalGeneration

from flashbias.integrations import patch
from flashbias.integrations.transformers import t5

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6,
    "pad_token_id": PADDING, "decoder_start_token_id": PADDING, "attn_implementation": "eager",
}  # fmt: skip


def strengthen(model: nn.Module) -> Any:
    """Make biases and scores as large as trained ones; the random ones are too small to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.mul_(10)
            elif name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(2)
    return model.eval()


class TestT5Encoder(PatchedModelSuite):
    stack = "T5Stack"
    form = "exact table"
    rank = 0
    padding_side = "right"
    hidden_rows_differ = False

    def make(self, dropout: float = 0.0) -> Any:
        torch.manual_seed(self.seed)
        return strengthen(T5EncoderModel(T5Config(**SHAPE, dropout_rate=dropout)))

    def test_beyond_the_largest_distance(self) -> None:
        tokens, model = torch.randint(3, VOCABULARY, (1, 200)), self.make()
        with torch.no_grad():
            expected = model(tokens)[0]
            patch(model)
            assert relative(model(tokens)[0], expected) < 1e-5

    def test_compiles_without_a_break(self) -> None:
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert relative(self.result(compiled, given), expected) < 1e-5

    @pytest.mark.parametrize("buckets", [(8, 20), (31, 100), (4, 2)], ids=str)
    def test_other_buckets(self, buckets: tuple[int, int]) -> None:
        num_buckets, max_distance = buckets
        options = {"relative_attention_num_buckets": num_buckets, "relative_attention_max_distance": max_distance}
        model = strengthen(T5EncoderModel(T5Config(**SHAPE, **options)))
        with torch.no_grad():
            expected = self.result(model, self.inputs(padded=True))
            patch(model)
            assert relative(self.result(model, self.inputs(padded=True)), expected) < 1e-5

    def test_buckets_without_constant_tails_are_not_supported(self) -> None:
        options = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 8}
        with pytest.raises(NotImplementedError, match="relative_attention_max_distance=8: the distance must exceed"):
            patch(T5EncoderModel(T5Config(**SHAPE, **options)))

    def test_a_block_alone_is_refused_when_it_runs(self) -> None:
        model = self.make()
        patch(model)
        with pytest.raises(ValueError, match="call the stack, not one of its blocks"):
            model.encoder.block[1](torch.randn(1, 4, 48))

    def test_the_implementation_by_name_alone_is_refused(self) -> None:
        model = self.make()
        patch(model)
        other = T5EncoderModel(T5Config(**(SHAPE | {"attn_implementation": "factored_bias"})))
        with pytest.raises(RuntimeError, match=r"T5Attention is not patched, .* call flashbias.patch"):
            other(torch.ones(1, 4, dtype=torch.long))


class TestT5(DecoderSuite):
    stack = "T5Stack"
    form = "exact table"
    rank = 0
    hidden_rows_differ = False

    def make(self, dropout: float = 0.0) -> Any:
        torch.manual_seed(self.seed)
        return strengthen(T5ForConditionalGeneration(T5Config(**SHAPE, dropout_rate=dropout)))

    def result(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        decoder = torch.randint(3, VOCABULARY, (3, LENGTH + 1), generator=generator)
        keep = torch.ones_like(decoder)
        if "attention_mask" in inputs:
            keep[1, :5] = 0
            inputs = {**inputs, "decoder_attention_mask": keep}
        out = model(**inputs, decoder_input_ids=decoder)[0]
        return out[keep.bool()]

    def prompt(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without words of its own a random decoder repeats one token, whose keys a bias cannot tell apart."""
        decoder = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
        return {**given, "decoder_input_ids": decoder}

    def test_cross_attention_is_said_to_have_no_bias(self) -> None:
        report = patch(self.make())
        cross = [entry for entry in report if entry.name.endswith("EncDecAttention")]
        assert len(cross) == 2
        assert {(entry.form, entry.note) for entry in cross} == {("no bias", "cross attention")}

    def test_masks_of_four_dimensions(self) -> None:
        """Made by the caller, additive or boolean, for the encoder, the decoder and between them."""
        decoder = torch.randint(3, VOCABULARY, (3, 12))
        given, model = self.inputs(padded=True), self.make()
        keep = given.pop("attention_mask")[:, None, None, :].bool()
        mine = torch.rand(3, 1, 12, 12) < 0.6
        mine[..., 0] = True

        def logits(make: Callable[[Tensor], Tensor]) -> Tensor:
            masks = {"attention_mask": make(keep), "decoder_attention_mask": make(mine)}
            return model(**given, **masks, decoder_input_ids=decoder).logits

        def additive(mask: Tensor) -> Tensor:
            return torch.where(mask, 0.0, torch.finfo(torch.float32).min)

        with torch.no_grad():
            expected = logits(additive)
            patch(model)
            for make in (additive, Tensor.bool):
                assert relative(logits(make), expected) < 1e-5

    def test_chunks_of_a_prompt(self) -> None:
        """Several queries after keys that are in the cache."""
        decoder = torch.randint(3, VOCABULARY, (3, 12))
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = model(**given, decoder_input_ids=decoder).logits
            patch(model)
            first = model(**given, decoder_input_ids=decoder[:, :7], use_cache=True)
            rest = model(**given, decoder_input_ids=decoder[:, 7:], past_key_values=first.past_key_values)
        assert relative(torch.cat([first.logits, rest.logits], dim=1), expected) < 1e-5


class TestMT5(TestT5):
    stack = "MT5Stack"

    def make(self, dropout: float = 0.0) -> Any:
        torch.manual_seed(self.seed)
        return strengthen(MT5ForConditionalGeneration(MT5Config(**SHAPE, dropout_rate=dropout)))


@pytest.mark.parametrize("past", [0, 3, 9])
def test_table_of_a_cache_of_fixed_size(past: int) -> None:
    """Queries in the middle of the keys: the shifted table is the model's own bias."""
    torch.manual_seed(0)
    model = strengthen(T5ForConditionalGeneration(T5Config(**SHAPE)))
    attention = model.decoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        expected = attention.compute_bias(4, 16, past_seen_tokens=past)
        patch(model)
        for count in (past, torch.tensor(past)):
            table = attention.compute_bias(4, 16, past_seen_tokens=count)
            assert torch.equal(t5.table_bias(table, 4, 16).dense(), expected[0])
