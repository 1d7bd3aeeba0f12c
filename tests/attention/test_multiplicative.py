"""Attention whose scores are multiplied by a factored matrix, against the formula."""

from __future__ import annotations

import pytest
import torch

import flashbias as fb


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    scores = scale * (q @ k.mT) * b
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("lead", [((4,), (4,)), ((1,), (4,)), ((2, 1), (1, 1)), ((2, 4), (2, 1))], ids=str)
def test_equals_the_formula_with_gradients(impl: str, rank: int, lead: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 4, 11, 8), (2, 4, 11, 6), (*lead[0], 9, rank), (*lead[1], 11, rank)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    q, k, v, phi_q, phi_k = leaves
    out = fb.multiplicative_attention(q, k, v, fb.FactoredBias(phi_q, phi_k), scale=0.7, impl=impl)
    wanted = formula(q, k, v, phi_q @ phi_k.mT, 0.7)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
    dout = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(wanted, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_default_scale_is_that_of_the_head_dim_given() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    b = fb.FactoredBias(torch.rand(2, 5, 3), torch.rand(2, 5, 3))
    torch.testing.assert_close(fb.multiplicative_attention(q, k, v, b), formula(q, k, v, b.dense(), 0.5))


def test_masks() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    b = fb.FactoredBias(torch.rand(2, 6, 2), torch.rand(2, 6, 2))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    keep = torch.rand(6, 6) > 0.3
    keep.fill_diagonal_(True)
    window = causal & ~torch.ones(6, 6, dtype=torch.bool).tril(-3)
    dense = b.dense()
    for options, visible in (
        ({"is_causal": True}, causal),
        ({"attn_mask": keep}, keep),
        ({"window": (2, 0)}, window),
    ):
        out = fb.multiplicative_attention(q, k, v, b, **options)
        torch.testing.assert_close(out, formula(q, k, v, dense, 0.5, visible))


def test_grouped_queries_share_phi_k() -> None:
    q, k, v = torch.randn(1, 4, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    b = fb.FactoredBias(torch.rand(4, 5, 2), torch.rand(1, 5, 2))
    out = fb.multiplicative_attention(q, k, v, b, enable_gqa=True)
    wide = (x.repeat_interleave(2, dim=1) for x in (k, v))
    torch.testing.assert_close(out, formula(q, *wide, b.dense(), 0.5))


def test_lse_is_that_of_the_products() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    b = fb.FactoredBias(torch.rand(2, 5, 2), torch.rand(2, 5, 2))
    _, lse = fb.multiplicative_attention(q, k, v, b, return_lse=True)
    torch.testing.assert_close(lse, (q @ k.mT / 2 * b.dense()).logsumexp(-1))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.ones(2, 5, 5), TypeError, "bias must be a FactoredBias.*Tensor"),
        (
            fb.FactoredBias(torch.ones(2, 5, 2), torch.ones(2, 5, 2), torch.ones(1, 3)),
            ValueError,
            "without a table",
        ),
        (
            fb.FactoredBias(torch.ones(2, 5, 2), torch.ones(2, 5, 2), ranks=(1, 2)),
            ValueError,
            "per-head ranks",
        ),
        (
            fb.FactoredBias(torch.ones(2, 6, 2), torch.ones(2, 5, 2)),
            ValueError,
            "6 queries and 5 keys.*5 and 5",
        ),
        (
            fb.FactoredBias(torch.ones(3, 5, 2), torch.ones(3, 5, 2)),
            ValueError,
            "phi_q has 3 heads, query has 2",
        ),
        (
            fb.FactoredBias(torch.ones(1, 5, 2), torch.ones(3, 5, 2)),
            ValueError,
            "phi_k has 3 heads, key has 2",
        ),
    ],
    ids=["tensor", "table", "ranks", "length", "heads", "heads of keys"],
)
def test_bad_input(bias: object, error: type[Exception], message: str) -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(error, match=message):
        fb.multiplicative_attention(q, q, q, bias)  # type: ignore[arg-type]
