"""Calls of the attention go to a target while one is set, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.attention import redirect


class Recorder:
    """Answers every call with its own arguments."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Any, **options: Any) -> Any:
        return "attention", query, bias, options

    def varlen_attention(self, *arguments: Any, **options: Any) -> Any:
        return "varlen_attention", arguments, options


def test_a_target_gets_all_arguments() -> None:
    x = torch.randn(2, 5, 4)
    cu, bias = torch.tensor([0, 2], dtype=torch.int32), fb.Alibi(2)(5, 5)
    with redirect.to(Recorder()):
        name, query, given, options = fb.attention(x, x, x, bias, is_causal=True, scale=2.0)
        assert name == "attention" and query is x and given is bias
        assert options == {
            "attn_mask": None, "is_causal": True, "causal_alignment": None, "window": None, "scale": 2.0,
            "enable_gqa": False, "dropout_p": 0.0, "impl": "auto", "deterministic": None, "return_lse": False,
        }  # fmt: skip
        name, arguments, options = fb.varlen_attention(x, x, x, cu, cu, bias, window=(3, 0), max_seqlen_q=5)
        assert name == "varlen_attention" and arguments[3] is cu and arguments[5] is bias
        assert options["window"] == (3, 0) and options["max_seqlen_q"] == 5
    assert isinstance(fb.attention(x, x, x), Tensor)


def test_an_error_ends_it_too() -> None:
    with pytest.raises(KeyError), redirect.to(Recorder()):
        raise KeyError
    assert redirect.target is None


def test_one_target_at_a_time() -> None:
    first = Recorder()
    with redirect.to(first):
        with pytest.raises(RuntimeError, match="go to Recorder already"), redirect.to(Recorder()):
            pass
        assert redirect.target is first
