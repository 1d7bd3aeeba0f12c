"""Every wrong argument is an error that names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbias as fb


def tensors(**changes: Any) -> dict[str, Any]:
    """Arguments that are right, but for the changes."""
    right: dict[str, Any] = {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 4, 7, 8),
        "value": torch.randn(2, 4, 7, 6),
        "bias": fb.FactoredBias(torch.randn(4, 5, 3), torch.randn(1, 7, 3)),
    }
    return right | changes


def factors(n: int = 5, m: int = 7, heads: int = 4, **options: Any) -> fb.FactoredBias:
    return fb.FactoredBias(torch.randn(heads, n, 3), torch.randn(1, m, 3), **options)


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-tensor": ({"query": [1.0]}, TypeError, r"query must be a tensor.*list"),
    "integers": (
        {"key": torch.ones(2, 4, 7, 8, dtype=torch.int32)},
        TypeError,
        r"key must be float16.*torch\.int32",
    ),
    "bool-value": (
        {"value": torch.ones(2, 4, 7, 8, dtype=torch.bool)},
        TypeError,
        r"value must be float16.*torch\.bool",
    ),
    "two-dimensions": (
        {"query": torch.randn(5, 8)},
        ValueError,
        r"query must be \[\*batch, H, N, head_dim\].*\(5, 8\)",
    ),
    "dtypes-differ": (
        {"key": torch.randn(2, 4, 7, 8).half()},
        (TypeError, ValueError),
        r"key.*float16.*float32|dtype",
    ),
    "devices-differ": (
        {"key": torch.randn(2, 4, 7, 8, device="meta")},
        ValueError,
        r"key is on meta and query on cpu",
    ),
    "head-dims-differ": (
        {"key": torch.randn(2, 4, 7, 9)},
        ValueError,
        r"head_dim of query is 8 and of key 9",
    ),
    "no-head-dim": (
        {"query": torch.randn(2, 4, 5, 0), "key": torch.randn(2, 4, 7, 0)},
        ValueError,
        r"head_dim.*at least 1.*0",
    ),
    "lengths-differ": ({"value": torch.randn(2, 4, 6, 8)}, ValueError, r"key has 7 positions and value 6"),
    "kv-heads-differ": ({"value": torch.randn(2, 2, 7, 8)}, ValueError, r"key has 4 heads and value 2"),
    "no-gqa": (
        {"key": torch.randn(2, 2, 7, 8), "value": torch.randn(2, 2, 7, 8)},
        ValueError,
        r"query has 4 heads and key 2; set enable_gqa=True",
    ),
    "heads-do-not-divide": (
        {"key": torch.randn(2, 3, 7, 8), "value": torch.randn(2, 3, 7, 8), "enable_gqa": True},
        ValueError,
        r"query heads \(4\) must be a multiple of key heads \(3\)",
    ),
    "batches-differ": (
        {"key": torch.randn(3, 4, 7, 8)},
        ValueError,
        r"batch dimensions.*query.*\(2,\).*\(3,\).*equal or 1",
    ),
    "bias-is-a-tensor": ({"bias": torch.randn(4, 5, 7)}, TypeError, r"bias must be a FactoredBias.*Tensor"),
    "bias-too-long": ({"bias": factors(n=6)}, ValueError, r"bias is for 6 queries and 7 keys.*5 and 7"),
    "bias-heads": ({"bias": factors(heads=3)}, ValueError, r"\(3,\) of bias.*\(2, 4\)"),
    "bias-batch": (
        {"bias": fb.FactoredBias(torch.randn(3, 4, 5, 3), torch.randn(1, 7, 3))},
        ValueError,
        r"\(3, 4\) of bias.*\(2, 4\)",
    ),
    "bias-device": ({"bias": factors().to("meta")}, ValueError, r"bias is on meta and query on cpu"),
    "mask-is-additive": (
        {"attn_mask": torch.zeros(5, 7)},
        TypeError,
        r"attn_mask must be a bool.*torch\.float32",
    ),
    "mask-shape": (
        {"attn_mask": torch.ones(5, 6, dtype=torch.bool)},
        ValueError,
        r"\(5, 6\) of attn_mask.*5, 7",
    ),
    "mask-dims": (
        {"attn_mask": torch.ones(7, dtype=torch.bool)},
        ValueError,
        r"attn_mask.*2 dimensions.*\(7,\)",
    ),
    "mask-device": (
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool, device="meta")},
        ValueError,
        r"attn_mask is on meta",
    ),
    "causal-unaligned": (
        {"is_causal": True},
        ValueError,
        r"causal_alignment must be given.*5 queries and 7 keys.*'top_left'.*'bottom_right'",
    ),
    "window-unaligned": ({"window": (2, None)}, ValueError, r"causal_alignment must be given"),
    "alignment": (
        {"causal_alignment": "left"},
        ValueError,
        r"causal_alignment must be 'top_left' or 'bottom_right', got 'left'",
    ),
    "window-list": ({"window": [1, 2]}, TypeError, r"window must be a tuple.*\[1, 2\]"),
    "window-three": ({"window": (1, 2, 3)}, TypeError, r"window must be a tuple.*\(1, 2, 3\)"),
    "window-negative": ({"window": (-1, 2)}, ValueError, r"window's left side.*>= 0.*-1"),
    "window-float": ({"window": (None, 2.5)}, ValueError, r"window's right side.*2\.5"),
    "scale-zero": ({"scale": 0.0}, ValueError, r"scale must be a positive finite number, got 0\.0"),
    "scale-negative": ({"scale": -1.0}, ValueError, r"scale.*-1\.0"),
    "scale-nan": ({"scale": float("nan")}, ValueError, r"scale.*nan"),
    "scale-tensor": ({"scale": torch.tensor(0.5)}, TypeError, r"scale must be an int or a float, got tensor\(0\.5"),
    "dropout-none": ({"dropout_p": None}, TypeError, r"dropout_p must be an int or a float, got None"),
    "float8": (
        {"query": torch.randn(2, 4, 5, 8).to(torch.float8_e4m3fn)},
        TypeError,
        r"query must be float16, bfloat16, float32 or float64, got torch\.float8_e4m3fn",
    ),
    "a-family": ({"bias": fb.Alibi(4)}, TypeError, r"got the module .*Alibi.*call it"),
    "dropout-one": ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1\.0"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p.*-0\.1"),
    "impl": ({"impl": "cuda"}, ValueError, r"impl must be 'auto' or one of.*'triton'.*got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_attention(name: str) -> None:
    changes, error, message = BAD_CALLS[name]
    arguments = tensors(**changes)
    with pytest.raises(error, match=message):
        fb.attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


def test_unknown_keywords_are_not_swallowed() -> None:
    arguments = tensors(attention_mask=None)
    with pytest.raises(TypeError, match="attention_mask"):
        fb.attention(**arguments)
    with pytest.raises(TypeError, match=r"attention_mask.*attn_mask"):
        fb.explain(**arguments)


def phi(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BAD_BIASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no-tensor": (
        lambda: fb.FactoredBias(1.0, phi(1, 7, 3)),
        TypeError,
        r"phi_q must be a floating point tensor.*float",
    ),
    "integers": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3, dtype=torch.int64)),
        TypeError,
        r"phi_k.*torch\.int64",
    ),
    "two-dimensions": (
        lambda: fb.FactoredBias(phi(5, 3), phi(1, 7, 3)),
        ValueError,
        r"phi_q must be.*N, R\], got shape \(5, 3\)",
    ),
    "ranks-differ": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 4)),
        ValueError,
        r"same rank, got 3 and 4",
    ),
    "rank-zero": (
        lambda: fb.FactoredBias(phi(1, 5, 0), phi(1, 7, 0)),
        ValueError,
        r"rank 0 and table is None",
    ),
    "devices": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3, device="meta")),
        ValueError,
        r"phi_q is on cpu and phi_k on meta",
    ),
    "heads": (lambda: fb.FactoredBias(phi(2, 5, 3), phi(4, 7, 3)), ValueError, r"head dimensions.*\(2, 4\)"),
    "table-heads": (
        lambda: fb.FactoredBias(phi(2, 5, 3), phi(2, 7, 3), phi(3, 9)),
        ValueError,
        r"head dimensions.*3",
    ),
    "batches": (
        lambda: fb.FactoredBias(phi(2, 1, 5, 3), phi(3, 1, 7, 3)),
        ValueError,
        r"batch dimensions of phi_q \(2,\) and phi_k \(3,\)",
    ),
    "even-table": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 8)),
        ValueError,
        r"table.*odd.*8",
    ),
    "empty-table": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 0)),
        ValueError,
        r"table.*odd.*0",
    ),
    "table-dims": (lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(9)), ValueError, r"table.*\(9,\)"),
    "table-integers": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 9, dtype=torch.int64)),
        TypeError,
        r"table.*torch\.int64",
    ),
    "table-device": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 9, device="meta")),
        ValueError,
        r"table is on meta",
    ),
    "codes-length": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 9), torch.arange(6), torch.arange(7)),
        ValueError,
        r"code_q must have shape \(5,\), got \(6,\)",
    ),
    "codes-floats": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 9), torch.arange(5), torch.arange(7.0)),
        TypeError,
        r"code_k.*integer.*torch\.float32",
    ),
    "codes-device": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), phi(1, 9), torch.arange(5, device="meta"), torch.arange(7)),
        ValueError,
        r"code_q is on meta",
    ),
    "codes-without-table": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), None, torch.arange(5), torch.arange(7)),
        ValueError,
        r"code_q.*table",
    ),
    "per-head-ranks-count": (
        lambda: fb.FactoredBias(phi(2, 5, 3), phi(2, 7, 3), ranks=(1, 2, 3)),
        ValueError,
        r"ranks.*2 heads, got 3",
    ),
    "per-head-ranks-large": (
        lambda: fb.FactoredBias(phi(2, 5, 3), phi(2, 7, 3), ranks=(1, 4)),
        ValueError,
        r"ranks must lie in 0 … 3.*4",
    ),
    "not-finite": (
        lambda: fb.FactoredBias(phi(1, 5, 3) / 0.0, phi(1, 7, 3)).check_finite(),
        ValueError,
        r"phi_q has 15 non-finite values of 15",
    ),
    "infinite-table": (
        lambda: fb.FactoredBias(phi(1, 5, 3), phi(1, 7, 3), torch.full((1, 3), torch.inf)).check_finite(),
        ValueError,
        r"table has 3 non-finite",
    ),
    "from-table": (
        lambda: fb.FactoredBias.from_table(phi(9), 5, 7),
        ValueError,
        r"table must be a \[H or 1, T\].*\(9,\)",
    ),
    "index": (lambda: factors()[0, 1], TypeError, r"two slices.*\(0, 1\)"),
    "add-lengths": (lambda: factors() + factors(n=6), ValueError, r"5x7 and 6x7"),
}


@pytest.mark.parametrize("name", BAD_BIASES)
def test_factored_bias(name: str) -> None:
    make, error, message = BAD_BIASES[name]
    with pytest.raises(error, match=message):
        make()


def test_finite_check_returns_the_bias() -> None:
    bias = factors()
    assert bias.check_finite() is bias


CU = torch.tensor([0, 2, 5], dtype=torch.int32)

BAD_VARLEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "four-dimensions": (
        {"query": torch.randn(1, 5, 2, 8)},
        ValueError,
        r"query must be \[tokens, heads, head_dim\].*\(1, 5, 2, 8\)",
    ),
    "int64": (
        {"cu_seqlens_q": CU.long()},
        TypeError,
        r"cu_seqlens_q must be an int32 tensor, got torch\.int64",
    ),
    "list": ({"cu_seqlens_k": [0, 2, 5]}, TypeError, r"cu_seqlens_k must be an int32 tensor.*list"),
    "two-dimensions": (
        {"cu_seqlens_q": CU[None]},
        ValueError,
        r"cu_seqlens_q must have shape \[B \+ 1\], got \(1, 3\)",
    ),
    "lengths": ({"cu_seqlens_k": CU[:2]}, ValueError, r"same length, got 3 and 2"),
    "no sequence": (
        {"cu_seqlens_q": CU[:1], "cu_seqlens_k": CU[:1], "max_seqlen_q": 5, "max_seqlen_k": 5},
        ValueError,
        r"cu_seqlens_q names no sequence, and there are 5 tokens",
    ),
    "short": (
        {"cu_seqlens_q": CU - 1},
        ValueError,
        r"cu_seqlens_q must ascend from 0 to the number of tokens, 5",
    ),
    "descending": (
        {"cu_seqlens_k": torch.tensor([0, 6, 5], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens_k must ascend.*\[0, 6, 5\]",
    ),
    "unaligned": (
        {"is_causal": True, "cu_seqlens_k": CU.clone()},
        ValueError,
        r"causal_alignment must be given",
    ),
    "device": ({"cu_seqlens_q": CU.to("meta")}, ValueError, r"cu_seqlens_q is on meta"),
    "bias": ({"bias": factors(heads=2)}, ValueError, r"bias is for 5 queries and 7 keys"),
}


@pytest.mark.parametrize("name", BAD_VARLEN)
def test_varlen(name: str) -> None:
    changes, error, message = BAD_VARLEN[name]
    query, key, value = torch.randn(3, 5, 2, 8)
    arguments = {"query": query, "key": key, "value": value, "cu_seqlens_q": CU, "cu_seqlens_k": CU} | changes
    with pytest.raises(error, match=message):
        fb.varlen_attention(**arguments)
