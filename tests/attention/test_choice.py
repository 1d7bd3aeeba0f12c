"""Which implementation runs, and how it is told."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.conftest import INTERPRETED

import flashbias as fb
from flashbias.attention import choice, reference
from flashbias.attention.call import Call

KERNELS_RUN_HERE = INTERPRETED or torch.cuda.is_available()


def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 1, 2, 6, 8))


def test_implementations_are_listed_fastest_first() -> None:
    found = fb.implementations()
    assert list(found) == ["hopper", "triton", "sdpa", "reference"]
    assert found["sdpa"] is None
    assert found["reference"] is None
    assert (found["triton"] is None) == KERNELS_RUN_HERE


@pytest.mark.skipif(KERNELS_RUN_HERE, reason="the Triton kernels can run in this process")
class TestWithoutKernels:
    def test_auto_takes_sdpa(self) -> None:
        q, k, v = tensors()
        explanation = fb.explain(q, k, v)
        assert explanation.impl == "sdpa"
        assert "CUDA" in str(explanation.reasons["triton"])

    def test_auto_takes_the_reference_for_what_only_it_can(self) -> None:
        q, k, v = tensors()
        explanation = fb.explain(q, k, v, return_lse=True)
        assert explanation.impl == "reference"
        assert "return_lse" in str(explanation.reasons["sdpa"])

    def test_a_named_implementation_never_falls_back(self) -> None:
        q, k, v = tensors()
        with pytest.raises(NotImplementedError, match=r"impl='triton'.*CUDA.*impl='auto' would take 'sdpa'"):
            fb.attention(q, k, v, impl="triton")
        with pytest.raises(NotImplementedError, match=r"impl='triton'"):
            fb.explain(q, k, v, impl="triton")


def test_float64_is_not_for_kernels() -> None:
    q, k, v = (x.double() for x in tensors())
    with pytest.raises(NotImplementedError, match=r"impl='triton'.*impl='auto' would take 'sdpa'"):
        fb.attention(q, k, v, impl="triton")
    assert fb.explain(q, k, v).impl == "sdpa"


def test_explanation_reads_as_one_line_for_each() -> None:
    q, k, v = tensors()
    lines = str(fb.explain(q, k, v, impl="reference")).splitlines()
    assert len(lines) == 4
    assert [line for line in lines if line.startswith("->")] == ["-> reference: chosen"]
    assert "sdpa: possible" in lines[2]


def test_explain_takes_what_attention_takes() -> None:
    q, k, v = tensors()
    bias = fb.FactoredBias(torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    options = {"is_causal": True, "window": (3, None), "scale": 0.5, "dropout_p": 0.1, "deterministic": True}
    assert fb.explain(q, k, v, bias, **options).impl in fb.implementations()
    with pytest.raises(ValueError, match="scale"):
        fb.explain(q, k, v, bias, scale=-1.0)


def test_choice_is_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = tensors()
    with caplog.at_level(logging.INFO, logger="flashbias"):
        fb.attention(q, k, v)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="flashbias"):
        fb.attention(q, k, v, impl="reference")
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "takes reference" in record.getMessage()
    assert "sdpa" in record.getMessage()


def test_deterministic_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    seen: list[bool] = []
    original = reference.run

    def spy(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen.append(call.deterministic)
        return original(call)

    monkeypatch.setattr(reference, "run", spy)
    fb.attention(q, k, v, impl="reference")
    torch.use_deterministic_algorithms(True)
    try:
        fb.attention(q, k, v, impl="reference")
        fb.attention(q, k, v, impl="reference", deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, False]


# -------------------------------------------------------------------- predicted times


def low_rank(rank: int = 3) -> fb.FactoredBias:
    return fb.FactoredBias(torch.randn(2, 6, rank), torch.randn(1, 6, rank))


def test_explanation_quotes_the_plan() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    explanation = fb.explain(q, k, v, low_rank(), is_causal=True)
    plan = explanation.plan
    assert plan is not None
    assert [p.form for p in plan.predictions] == ["factored", "dense", "bias-free"]
    w = plan.workload
    assert (w.num_heads, w.seqlen_q, w.seqlen_k, w.head_dim, w.batch, w.is_causal) == (2, 6, 6, 8, 1, True)
    assert (w.training, w.dtype, w.factor_dtype) == ("frozen", torch.float32, torch.float32)
    assert str(explanation).endswith(str(plan))
    for prediction in plan.predictions:
        assert f"{prediction.ms:.4g} ms" in str(explanation)


def test_the_plan_is_for_the_form_that_the_bias_has() -> None:
    q, k, v = tensors()
    table = fb.FactoredBias.from_table(torch.randn(2, 5), 6, 6)
    code = torch.tensor([0, 1, 2, 11, 12, 13])
    window = fb.FactoredBias.from_table(torch.randn(2, 27), 6, 6, code, code)
    ragged = fb.FactoredBias(torch.randn(2, 6, 9), torch.randn(2, 6, 9), torch.randn(2, 5), ranks=[9, 1])
    found = [fb.explain(q, k, v, bias).plan for bias in (table, window, ragged)]
    assert [plan.predictions[0].form for plan in found if plan] == ["table", "table", "table+factored"]
    assert [plan.table.local for plan in found if plan and plan.table] == [True, False, True]
    assert [plan.ranks for plan in found if plan] == [None, None, (9, 1)]


def test_the_plan_sees_gradients_and_sharing() -> None:
    q, k, v = (torch.randn(4, 3, 2, 6, 8) for _ in range(3))
    bias = fb.FactoredBias(torch.randn(4, 1, 2, 6, 3, requires_grad=True), torch.randn(2, 6, 3))
    plan = fb.explain(q, k, v, bias).plan
    assert plan is not None
    assert (plan.workload.training, plan.workload.batch, plan.workload.biases) == ("bias", 12, 4)


def test_without_a_bias_there_is_nothing_to_plan() -> None:
    q, k, v = tensors()
    explanation = fb.explain(q, k, v)
    assert (explanation.plan, explanation.no_plan) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (2, 2)}, "a window"),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool), "dropout_p": 0.5}, "a mask and dropout"),
    ],
)
def test_what_the_planner_does_not_count_is_said(options: dict[str, object], message: str) -> None:
    q, k, v = tensors()
    explanation = fb.explain(q, k, v, low_rank(), **options)
    assert explanation.plan is None
    assert f"the planner does not count {message}" in str(explanation)


def test_without_coefficients_the_explanation_says_how_to_make_them() -> None:
    q, k, v = (x.double() for x in tensors())
    explanation = fb.explain(q, k, v, low_rank().to(torch.float64))
    assert explanation.plan is None
    assert "no coefficients" in str(explanation)
    assert "flashbias bench --calibrate" in str(explanation)


def test_attention_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Call) -> None:
        raise AssertionError("attention must not plan")

    monkeypatch.setattr(choice, "plan_call", fail)
    q, k, v = tensors()
    fb.attention(q, k, v, low_rank())
    with pytest.raises(AssertionError, match="must not plan"):
        fb.explain(q, k, v, low_rank())
