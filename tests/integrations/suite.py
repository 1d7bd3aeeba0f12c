"""What every patched model owes: one class, subclassed with a model and its inputs.

The models are small and random, of their libraries' own classes. Their weights are drawn wide, so that attention is far
from uniform and a wrong bias or mask shows.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashbias.factored import FactoredBias
from flashbias.integrations import call, patch, supports, unpatch


class ModelSuite:
    """Tests of one family; a subclass says which model, and what is special about it."""

    seed: ClassVar[int] = 0
    form: ClassVar[str]
    rank: ClassVar[int]
    checkpointing: ClassVar[tuple[str, ...]] = ("no", "checkpoint", "reentrant")
    softmax_in_float32: ClassVar[bool] = False
    """Whether the model takes the softmax in float32 even in float64, where a row without keys then is NaN."""
    drops: ClassVar[bool] = True
    """Whether the model has dropout of attention weights, in `make`."""
    small: ClassVar[float] = 1e-4
    """Gradients are measured against this part of the largest of all at least."""
    length: ClassVar[int]
    """Number of queries and keys."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name in {"checkpointing", "cache"} & set(metafunc.fixturenames):
            metafunc.parametrize(name, getattr(self, name))

    def make(self, dropout: float = 0.0) -> Any:
        """A new model in evaluation, the same weights each time."""
        raise NotImplementedError

    def inputs(self, padded: bool, padding_side: str | None = None) -> dict[str, Tensor]:
        """What the model is given, the same each time."""
        raise NotImplementedError

    def result(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states or logits, without rows that nothing reads."""
        raise NotImplementedError

    def enable_checkpointing(self, model: Any, reentrant: bool) -> None:
        """Recompute layers in the backward pass."""
        raise NotImplementedError

    @pytest.fixture(params=[False, True], ids=["full", "padded"])
    def given(self, request: pytest.FixtureRequest) -> dict[str, Tensor]:
        return self.inputs(request.param)

    # ------------------------------------------------------------ the same model

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_outputs(self, given: dict[str, Tensor], impl: str) -> None:
        model = self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model, impl=impl)
            assert relative(self.result(model, given), expected) < 1e-5

    @pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
    def test_outputs_in_float64(self, padded: bool) -> None:
        given = self.inputs(padded, padding_side="right")
        model = self.make().double()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < (1e-6 if self.softmax_in_float32 else 1e-13)

    @pytest.mark.parametrize("without", ["bias", "mask"])
    def test_tests_would_see_it(self, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bias or a mask that is lost is far outside of the tolerance of the other tests."""
        model, given = self.make(), self.inputs(padded=True)
        original = call.attention

        def crippled(query: Tensor, key: Tensor, value: Tensor, bias: FactoredBias | None, **options: Any) -> Any:
            if without == "bias":
                return original(query, key, value, None, **options)
            options = {name: option for name, option in options.items() if name != "attn_mask"}
            return original(query, key, value, bias, **options)

        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            monkeypatch.setattr(call, "attention", crippled)
            assert relative(self.result(model, given), expected) > 1e-3

    def test_half_precision_is_as_good(self) -> None:
        """bfloat16 weights: no further from the same weights in float32 than the model's own attention is."""
        assert 0 < self.half_precision_error() < 1.05

    def half_precision_error(self) -> float:
        """Squared error of a patched model in bfloat16 over that of its own attention."""
        given = self.inputs(padded=True)
        model = self.make().to(torch.bfloat16)
        with torch.no_grad():
            truth = self.result(copy.deepcopy(model).float(), given)
            own = (self.result(model, given) - truth).square().mean()
            patch(model)
            ours = (self.result(model, given) - truth).square().mean()
        return float(ours / own)

    def test_nothing_square_is_formed(self, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        """Outside of the attention kernel, no tensor of queries × keys exists: no bias, no mask, no scores."""

        def no_attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
            return query.new_ones(*query.shape[:-1], value.shape[-1])

        model = self.make()
        with torch.no_grad():
            with Squares(self.length) as before:
                self.result(model, given)
            patch(model)
            monkeypatch.setattr(call, "attention", no_attention)
            with Squares(self.length) as after:
                self.result(model, given)
        assert before.found, "the model without the patch forms none either, so this shows nothing"
        assert after.found == []

    # ------------------------------------------------------------ training

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_gradients(self, checkpointing: str, dtype: torch.dtype) -> None:
        given = self.inputs(padded=True, padding_side="right" if dtype == torch.float64 else None)
        model = self.make().to(dtype).train()
        expected = gradients(model, self.result(model, given))
        patch(model)
        if checkpointing != "no":
            self.enable_checkpointing(model, checkpointing == "reentrant")
        found = gradients(model, self.result(model, given))
        assert found.keys() == expected.keys()
        # Some gradients are zero but for rounding, such as that of a key's offset: what counts is the largest of all.
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        allowed = 1e-4 if dtype == torch.float32 else 1e-6 if self.softmax_in_float32 else 1e-12
        for name, gradient in expected.items():
            size = max(float(gradient.abs().max()), self.small * largest)
            assert float((found[name] - gradient).abs().max()) < allowed * size, name

    def test_dropout_acts_in_training(self) -> None:
        if not self.drops:
            pytest.skip("the model drops no attention weights")
        given = self.inputs(padded=False)
        model = self.make(dropout=0.3)
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            assert relative(self.result(model, given), expected) < 1e-5
            model.train()
            runs = []
            for seed in (0, 0, 1):
                torch.manual_seed(seed)
                runs.append(self.result(model, given))
        assert torch.equal(runs[0], runs[1])
        assert relative(runs[0], runs[2]) > 1e-3
        assert relative(runs[0], expected) > 1e-3

    def test_attention_drops_with_the_models_probability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not self.drops:
            pytest.skip("the model drops no attention weights")
        given, seen = self.inputs(padded=False), []
        original = call.attention

        def watch(*args: Any, **options: Any) -> Any:
            seen.append(options["dropout_p"])
            return original(*args, **options)

        model = self.make(dropout=0.3)
        patch(model)
        monkeypatch.setattr(call, "attention", watch)
        with torch.no_grad():
            self.result(model, given)
            in_evaluation, seen[:] = set(seen), []
            self.result(model.train(), given)
        assert in_evaluation == {0.0}
        assert set(seen) == {0.3}

    # ------------------------------------------------------------ taken back

    def test_unpatch_restores_every_attribute(self) -> None:
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            before = snapshot(model)
            patch(model)
            assert snapshot(model) != before
            self.result(model, given)
            unpatch(model)
            assert snapshot(model) == before
            assert torch.equal(self.result(model, given), expected)

    def test_state_dict_has_the_same_keys_and_tensors(self) -> None:
        model = self.make()
        before = dict(model.state_dict(keep_vars=True))
        patch(model)
        after = dict(model.state_dict(keep_vars=True))
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        fresh = self.make()
        fresh.load_state_dict(model.state_dict())
        model.load_state_dict(fresh.state_dict())

    def test_what_was_trained_stays_trained(self) -> None:
        given, model = self.inputs(padded=False), self.make()
        patch(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
            patched = self.result(model, given)
            unpatch(model)
            assert relative(self.result(model, given), patched) < 1e-5

    @pytest.mark.parametrize("how", ["copy", "pickle"])
    def test_copies_are_patched_and_separate(self, how: str) -> None:
        given, model = self.inputs(padded=True), self.make()
        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            patched = self.result(model, given)
            other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
            assert torch.equal(self.result(other, given), patched)
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(self.result(other, given), patched), "the copy reads weights of the original"
            unpatch(other)
            assert torch.equal(self.result(other, given), expected)

    # ------------------------------------------------------------ report and refusal

    def test_report_names_every_attention(self) -> None:
        model = self.make()
        expected = supports(model)
        report = patch(model)
        assert report == expected
        assert len(report) == len(report.replaced) > 0
        modules = dict(model.named_modules())
        for entry in report:
            assert "attention" in type(modules[entry.name]).__name__.lower()
            assert entry.name in str(report)
            assert entry.certificate == 0.0
        biased = [entry for entry in report if entry.form != "no bias"]
        assert {(entry.form, entry.rank) for entry in biased} == {(self.form, self.rank)}
        assert str(report).startswith(f"{type(model).__name__}: {len(report)} attentions replaced, 0 left")

    def test_supports_changes_nothing(self) -> None:
        model = self.make()
        before = snapshot(model)
        assert supports(model).replaced
        assert snapshot(model) == before

    def test_twice(self) -> None:
        model = self.make()
        patch(model)
        for again in (patch, supports):
            with pytest.raises(ValueError, match=r"model is patched already, got .*; unpatch it first"):
                again(model)


# -------------------------------------------------------------------- what the tests share


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert torch.isfinite(found).all()
    largest = expected.abs().max()
    return float((found - expected).abs().max() / largest) if largest > 0 else float(found.abs().max())


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss in which every entry counts differently."""
    model.zero_grad()
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    (out * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) >= 0.9 * len(list(model.parameters()))
    return found


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module, by identity; containers of hooks by what they contain."""

    def seen(value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, dict) else id(value)

    return {
        name: {attribute: seen(value) for attribute, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


class Squares(TorchDispatchMode):
    """Notes every tensor whose last two dimensions are queries × keys."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            square = tensor.dim() >= 2 and min(tensor.shape[-2:]) >= self.length - 1
            if square and tensor.shape[-1] <= self.length + 1:
                self.found.append(f"{func}: {tuple(tensor.shape)}")
        return out


def tensors_in(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for part in out:
            yield from tensors_in(part)
