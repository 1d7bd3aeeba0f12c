"""What holds for every attention with a bias of its pairs; the families say how to make and call one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashbias.integrations import call, patch, supports, unpatch
from flashbias.integrations.protein import pair_bias_calls, pairs

LENGTH, CHANNELS, HEADS, WIDTH = 128, 16, 4, 8
TOL = 1e-3


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: output layers of these packages start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        around, size = (1.0, 0.1) if "norm" in name and parameter.dim() == 1 else (0.0, 2 / CHANNELS**0.5)
        parameter.data = around + size * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def smooth_pairs(*batch: int, channels: int = CHANNELS) -> Tensor:
    """`[*batch, N, N, C]`, each channel a slow function of two places: its projections have a low rank."""
    generator = torch.Generator().manual_seed(1)
    x = torch.linspace(-1, 1, LENGTH)
    a, b, c = torch.randn(3, *batch, 1, 1, channels, generator=generator)
    return c + a * x[:, None, None] + b * x[:, None] + 0.5 * a * b * x[:, None, None] * x[:, None]


def rough_pairs(*batch: int, channels: int = CHANNELS) -> Tensor:
    """Pairs without any structure."""
    return torch.randn(*batch, LENGTH, LENGTH, channels, generator=torch.Generator().manual_seed(2))


def tokens(batch: int) -> Tensor:
    """`[B, N, C]`."""
    return torch.randn(batch, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(3))


def valid(*batch: int) -> Tensor:
    """`[*batch, N]`, the last tokens are padding, more of them in each batch element."""
    padding = 5 * torch.arange(1, 1 + int(torch.tensor(batch).prod())).reshape(*batch, 1)
    return (torch.arange(LENGTH) < LENGTH - padding).float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class PairSuite(ABC):
    """Subclasses name `family` and say how to make an attention, its input and its output."""

    family: str
    is_masked = True

    @abstractmethod
    def make(self) -> nn.Module:
        """One attention with random weights."""

    @abstractmethod
    def inputs(self, pairs: Any) -> dict[str, Any]:
        """Arguments of its forward, from a function that draws pairs `[*batch, N, N, C]`."""

    @abstractmethod
    def bias_parameters(self, model: Any) -> list[nn.Parameter]:
        """What the bias is made of."""

    def seen(self, out: Tensor) -> Tensor:
        """The part of the output whose queries are no padding."""
        return out

    # ------------------------------------------------------------ with factors

    def only_calls(self, model: nn.Module) -> pairs.PairCalls:
        (calls,) = pair_bias_calls(model).values()
        return calls

    @pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
    @pytest.mark.parametrize("tol", [1e-2, 1e-4])
    def test_outputs(self, impl: str, tol: float) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = self.seen(model(**given))
            (entry,) = patch(model, tol=tol, impl=impl).replaced
            found = self.seen(model(**given))
        assert (entry.family, entry.form, entry.rank, entry.certificate) == (self.family, "factors per call", None, tol)
        calls = self.only_calls(model)
        assert (calls.factored, calls.dense) == (1, 0), calls.reason
        assert 0 < calls.certificate <= tol
        assert 0 < calls.rank < LENGTH // 2
        # The bound is on the attention relative to its values; gates and projections come after it.
        assert 0 < relative(found, expected) < 2 * tol

    @pytest.mark.parametrize("without", ["bias", "mask"])
    def test_tests_would_see_it(self, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if without == "mask" and not self.is_masked:
            pytest.skip("this attention has no mask")
        model, given, original = self.make(), self.inputs(smooth_pairs), call.attention

        def crippled(q: Tensor, k: Tensor, v: Tensor, bias: Any, **options: Any) -> Any:
            lost = {"attn_mask": None} if without == "mask" else {}
            return original(q, k, v, None if without == "bias" else bias, **{**options, **lost})

        monkeypatch.setattr(call, "attention", crippled)
        with torch.no_grad():
            expected = self.seen(model(**given))
            patch(model)
            assert relative(self.seen(model(**given)), expected) > 2e-2

    def test_inference_mode(self) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.inference_mode():
            expected = self.seen(model(**given))
            patch(model, tol=TOL)
            for _ in range(2):
                assert relative(self.seen(model(**given)), expected) < 2 * TOL

    def test_autocast(self) -> None:
        """No further from float32 than the model's own code under the same autocast and the tolerance together."""
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            truth = self.seen(model(**given))
            with torch.autocast("cpu", torch.bfloat16):
                own = relative(self.seen(model(**given)).float(), truth)
                patch(model, tol=1e-2)
                ours = relative(self.seen(model(**given)).float(), truth)
        assert ours < own + 2e-2
        calls = self.only_calls(model)
        assert calls.factored == 1, calls.reason
        assert 0 < calls.certificate <= 1e-2, "the bound would be void if the compression ran in bfloat16"

    def test_a_frozen_bias_leaves_all_other_gradients(self) -> None:
        model, given = self.make().train(), self.inputs(smooth_pairs)
        for parameter in self.bias_parameters(model):
            parameter.requires_grad_(False)
        expected = self.gradients(model, given)
        patch(model, tol=1e-4)
        found = self.gradients(model, given)
        assert self.only_calls(model).factored == 1
        assert found.keys() == expected.keys() and found
        largest = max(float(x.abs().max()) for x in expected.values())
        assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 2e-3 * largest

    def gradients(self, model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
        model.zero_grad()
        out = self.seen(model(**given))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (out * weights).sum().backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    # ------------------------------------------------------------ the model's own code

    def test_pairs_without_low_rank_are_left_to_the_model(self) -> None:
        model, given = self.make(), self.inputs(rough_pairs)
        with torch.no_grad():
            expected = model(**given)
            patch(model, tol=TOL)
            assert torch.equal(model(**given), expected)
        calls = self.only_calls(model)
        assert (calls.factored, calls.dense) == (0, 1)
        assert "no factors keep 0.001" in calls.reason or "not even one column" in calls.reason

    def test_training_is_left_to_the_model(self) -> None:
        model, given = self.make().train(), self.inputs(smooth_pairs)
        if not self.bias_parameters(model):  # it is given, and its gradient flows to whoever has made it
            given["z"].requires_grad_()
        expected = self.gradients(model, given)
        patch(model, tol=TOL)
        found = self.gradients(model, given)
        assert self.only_calls(model).reason == "the bias needs a gradient"
        assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(bool(p.grad.abs().max() > 0) for p in self.bias_parameters(model) if p.grad is not None)

    def test_pairs_that_are_not_finite_are_refused(self) -> None:
        model, given = self.make(), self.inputs(lambda *batch: smooth_pairs(*batch).fill_(torch.nan))
        patch(model)
        with torch.no_grad(), pytest.raises(ValueError, match="finite"):
            model(**given)

    # ------------------------------------------------------------ patch and its way back

    def test_unpatched_to_the_bit(self) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        before = [dict(module.__dict__) for module in model.modules()]
        with torch.no_grad():
            expected = model(**given)
            patch(model)
            keys = list(model.state_dict())
            assert not torch.equal(model(**given), expected)
            unpatch(model)
            assert torch.equal(model(**given), expected)
        assert list(model.state_dict()) == keys
        assert [module.__dict__.keys() for module in model.modules()] == [x.keys() for x in before]
        with pytest.raises(ValueError, match="no patched attention"):
            pair_bias_calls(model)

    def test_supports_changes_nothing(self) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = model(**given)
            report = supports(model, tol=0.01)
            assert torch.equal(model(**given), expected)
        assert str(report) == str(patch(model, tol=0.01))
        assert "the model's own code where no factors keep tol" in str(report)

    def test_a_copy_has_counts_of_its_own(self) -> None:
        model, given = nn.ModuleDict({"block": self.make()}), self.inputs(smooth_pairs)
        patch(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin["block"](**given)
        assert pair_bias_calls(model)["block"].factored == 0
        assert pair_bias_calls(twin)["block"].factored == 1
        unpatch(twin)

    def test_other_forwards_are_refused(self) -> None:
        model = self.make()
        model.__class__ = type("Changed", (type(model),), {"forward": lambda self, *args, **options: None})
        with pytest.raises(NotImplementedError, match="Changed overrides the forward of "):
            patch(model)
        assert len(supports(model).unsupported) == 1


class InnerSuite(PairSuite):
    """For attentions that have what attends as a submodule."""

    inner = "mha"

    def test_another_inner_attention_is_refused(self) -> None:
        model = self.make()
        setattr(model, self.inner, nn.Identity())
        with pytest.raises(NotImplementedError, match=f"its '{self.inner}' is a Identity, not one of .*Attention"):
            patch(model)

    def test_a_wrapped_inner_attention_is_refused(self) -> None:
        model = self.make()
        model.get_submodule(self.inner).forward = lambda *args, **options: None
        with pytest.raises(NotImplementedError, match="already replaced on the instance"):
            patch(model)

    def test_an_overridden_inner_attention_is_refused(self) -> None:
        model = self.make()
        inner = model.get_submodule(self.inner)
        inner.__class__ = type("Changed", (type(inner),), {"forward": lambda self, *args, **options: None})
        with pytest.raises(NotImplementedError, match="is a Changed, which overrides the forward of Attention"):
            patch(model)


class TriangleSuite(InnerSuite):
    """For triangle attention."""

    def inputs(self, pairs: Any) -> dict[str, Any]:
        keep = valid(1)
        return {"x": pairs(1), "mask": keep[:, :, None] * keep[:, None]}

    def seen(self, out: Tensor) -> Tensor:
        """Rows of which every key is padding give 0, in place of some average."""
        length = int(valid(1).sum())
        return out[:, :length, :length]

    def bias_parameters(self, model: Any) -> list[nn.Parameter]:
        return [*model.layer_norm.parameters(), *self.projection(model).parameters()]

    def projection(self, model: Any) -> nn.Module:
        return model.linear

    def test_without_a_mask(self) -> None:
        model, pairs = self.make(), smooth_pairs(2)
        with torch.no_grad():
            expected = model(pairs)
            patch(model, tol=1e-4)
            assert 0 < relative(model(pairs), expected) < 2e-4
        assert self.only_calls(model).factored == 1

    def test_chunks(self) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = self.seen(model(**given, chunk_size=16))
            patch(model, tol=1e-4)
            found = self.seen(model(**given, chunk_size=16))
            assert 0 < relative(found, expected) < 2e-4
        assert self.only_calls(model).factored == 1, "the bias is compressed once, not in each chunk"

    def test_chunks_of_the_model_itself(self) -> None:
        model, given = self.make(), self.inputs(rough_pairs)
        with torch.no_grad():
            expected = model(**given, chunk_size=16)
            patch(model, tol=1e-4)
            assert torch.equal(model(**given, chunk_size=16), expected)


class ReusedSuite(PairSuite):
    """For attentions that read one bias many times."""

    def test_one_compression_for_all_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compressions, original = [], pairs.compressed

        def counted(*args: Any, **options: Any) -> Any:
            compressions.append(args)
            return original(*args, **options)

        monkeypatch.setattr(pairs, "compressed", counted)
        model, given = self.make(), self.inputs(smooth_pairs)
        patch(model, tol=TOL)
        with torch.inference_mode():
            first = model(**given)
            assert torch.equal(model(**given), first)
            assert (len(compressions), self.only_calls(model).factored) == (1, 2)
            # Written in place: a new bias, even though it is the same tensor.
            given["z"].mul_(1.25)
            unlike = model(**given)
            assert (len(compressions), self.only_calls(model).factored) == (2, 3)
            unpatch(model)
            assert relative(self.seen(unlike), self.seen(model(**given))) < 2 * TOL

    def test_a_refusal_is_remembered_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compressions, original = [], pairs.compressed

        def counted(*args: Any, **options: Any) -> Any:
            compressions.append(args)
            return original(*args, **options)

        monkeypatch.setattr(pairs, "compressed", counted)
        model, given = self.make(), self.inputs(rough_pairs)
        patch(model, tol=TOL)
        with torch.no_grad():
            model(**given)
            model(**given)
        assert (len(compressions), self.only_calls(model).dense) == (1, 2)


def check_block(model: nn.Module, given: dict[str, Any], families: list[str], length: int, tol: float = 1e-4) -> None:
    """A whole block: its attentions are found, called as the package calls them, and the output stays."""
    with torch.no_grad():
        expected = model(**copy.deepcopy(given))
        report = patch(model, tol=tol)
        found = model(**copy.deepcopy(given))
    assert sorted(entry.family for entry in report.replaced) == sorted(families)
    assert not report.left
    calls = pair_bias_calls(model)
    assert list(calls) == [entry.name for entry in report.replaced]
    assert all((x.factored, x.dense) == (1, 0) for x in calls.values()), calls
    for x, y in zip(found, expected, strict=True):
        whole = (slice(None), *[slice(length)] * (x.dim() - 2))
        assert 0 < relative(x[whole], y[whole]) < 20 * tol, "errors of all layers together"
