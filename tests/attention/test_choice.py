"""Which implementation runs, and how it is told."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.conftest import INTERPRETED

import flashbias as fb
from flashbias.attention import reference
from flashbias.attention.call import Call

KERNELS_RUN_HERE = INTERPRETED or torch.cuda.is_available()


def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 1, 2, 6, 8))


def test_implementations_are_listed_fastest_first() -> None:
    found = fb.implementations()
    assert list(found) == ["triton", "sdpa", "reference"]
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
    assert len(lines) == 3
    assert [line for line in lines if line.startswith("->")] == ["-> reference: chosen"]
    assert "sdpa: possible" in lines[1]


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
