"""What every patched model of transformers owes, beyond the suite of all models: its calls, its configurations."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tests.integrations.suite import ModelSuite, gradients, relative, snapshot
from torch import Tensor, nn

from flashbias.integrations import patch, supports
from flashbias.integrations.transformers.masks import MASKS_ONLY

__all__ = ["LENGTH", "DecoderSuite", "PatchedModelSuite", "gradients", "relative", "snapshot"]

VOCABULARY, PADDING = 64, 0
LENGTH, NEW_TOKENS = 41, 6


class PatchedModelSuite(ModelSuite):
    """Tests of one family; a subclass says which model, and what is special about it."""

    stack: ClassVar[str]
    """Class of the module that the attentions take their mask from; the decoder's, where there are two."""
    padding_side: ClassVar[str] = "left"
    length = LENGTH
    hidden_rows_differ: ClassVar[bool] = True
    """Rows of padding that see no key: zero when patched, some average when not. Nothing reads them."""

    def inputs(self, padded: bool, padding_side: str | None = None) -> dict[str, Tensor]:
        side = padding_side or self.padding_side
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
        if not padded:
            return {"input_ids": tokens}
        keep = torch.ones_like(tokens)
        for row, missing in enumerate((0, 7, 30)):
            keep[row, slice(0, missing) if side == "left" else slice(LENGTH - missing, LENGTH)] = 0
        return {"input_ids": tokens.where(keep.bool(), PADDING), "attention_mask": keep}

    def result(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states or logits, without rows that nothing reads."""
        out = model(**inputs)[0]
        if "attention_mask" not in inputs or not self.hidden_rows_differ:
            return out.flatten(0, 1)
        return out[inputs["attention_mask"].bool()]

    def config_of(self, model: nn.Module) -> Any:
        """The configuration that the attentions follow."""
        return [module for module in model.modules() if type(module).__name__ == self.stack][-1].config

    def enable_checkpointing(self, model: Any, reentrant: bool) -> None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})

    def test_another_model_of_the_same_configuration_is_left_alone(self) -> None:
        given, model = self.inputs(padded=True), self.make()
        sibling = type(model)(model.config).eval()
        with torch.no_grad():
            expected = self.result(sibling, given)
            patch(model)
            assert torch.equal(self.result(sibling, given), expected)

    def test_saved_patched_loads_unpatched(self, tmp_path: Any) -> None:
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            model.save_pretrained(tmp_path)
            loaded = type(model).from_pretrained(tmp_path).eval()
            assert relative(self.result(loaded, given), expected) < 1e-5
        assert loaded.config._attn_implementation in ("eager", "sdpa")

    def test_probabilities_are_refused(self) -> None:
        given, model = self.inputs(padded=False), self.make()
        patch(model)
        with pytest.raises(NotImplementedError, match=r"output_attentions=True asks .*unpatch"):
            model(**given, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions"):
            self.config_of(model).output_attentions = True

    def test_probabilities_in_the_configuration_are_refused(self) -> None:
        # The public name is checked against the attention implementation.
        self.refuses_option("_output_attentions", True)

    def refuses_option(self, option: str, value: bool) -> None:
        model = self.make()
        setattr(self.config_of(model), option, value)
        before, message = snapshot(model), f"config.{option.removeprefix('_')}={value}"
        report = supports(model)
        assert report.unsupported and not report.replaced
        assert message in str(report)
        with pytest.raises(NotImplementedError, match=f"attention '.*' .*is not supported: {message}"):
            patch(model)
        assert snapshot(model) == before

    def test_another_attention_implementation_changes_nothing_or_is_refused(self) -> None:
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            ours = self.config_of(model)._attn_implementation
            model.set_attn_implementation("sdpa")
            if ours == MASKS_ONLY:
                assert relative(self.result(model, given), expected) < 1e-5
            else:
                with pytest.raises(RuntimeError, match=r"was set to 'sdpa', which cannot read its bias; .*unpatch"):
                    self.result(model, given)

    def test_part_of_a_model_is_refused(self) -> None:
        entry = supports(self.make()).entries[0]
        part = self.make().get_submodule(entry.name)
        with pytest.raises(NotImplementedError, match="is a part of a model; patch a model with its"):
            patch(part)


class DecoderSuite(PatchedModelSuite):
    """Tests of a family that generates."""

    cache: ClassVar[tuple[str, ...]] = ("dynamic", "static")

    def prompt(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What generation starts from."""
        return given

    def test_generates_the_same_tokens(self, given: dict[str, Tensor], cache: str) -> None:
        model, given = self.make(), self.prompt(given)
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PADDING}
        options |= {"eos_token_id": -1, "output_logits": True, "return_dict_in_generate": True}
        options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        expected = model.generate(**given, **options)
        patch(model)
        found = model.generate(**given, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert len(found.logits) == NEW_TOKENS
        for mine, theirs in zip(found.logits, expected.logits, strict=True):
            assert relative(mine, theirs) < 1e-5

    def test_attending_to_later_tokens_is_refused(self) -> None:
        self.refuses_option("is_causal", False)
