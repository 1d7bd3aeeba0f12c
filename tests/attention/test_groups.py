"""Attention with a `MixedBias`: the same as with its dense matrix, in every respect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashbias as fb

N, M, HEADS = 13, 17, 4
GROUPS = ((2, 0), (3,), (1,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def mixed(leaves: dict[str, Tensor]) -> fb.MixedBias:
    """Two factored heads, one with a table, one dense."""
    factored = fb.FactoredBias(leaves["phi_q"], leaves["phi_k"])
    return fb.MixedBias((factored, fb.FactoredBias.from_table(leaves["table"], N, M), leaves["matrix"]), GROUPS)


def tensors(
    kv_heads: int = HEADS, batch: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    return {
        "query": draw(*batch, HEADS, N, 8, seed=1, dtype=dtype),
        "key": draw(*batch, kv_heads, M, 8, seed=2, dtype=dtype),
        "value": draw(*batch, kv_heads, M, 6, seed=3, dtype=dtype),
        "phi_q": draw(2, N, 3, seed=4, dtype=dtype),
        "phi_k": draw(2, M, 3, seed=5, dtype=dtype),
        "table": draw(1, 7, seed=6, dtype=dtype),
        "matrix": draw(1, N, M, seed=7, dtype=dtype),
    }


def truth(leaves: dict[str, Tensor], keep: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, written out; rows without a key give 0 and -inf."""
    q, k, v = leaves["query"], leaves["key"], leaves["value"]
    k, v = (x.repeat_interleave(HEADS // x.shape[-3], dim=-3) for x in (k, v))
    scores = (scale or 8**-0.5) * q @ k.mT + mixed(leaves).dense()
    if keep is None:
        return scores.softmax(-1) @ v, scores.logsumexp(-1)
    alive = keep.any(-1, keepdim=True)
    scores = scores.masked_fill(~keep & alive, -math.inf)
    lse = scores.logsumexp(-1).masked_fill(~alive[..., 0], -math.inf)
    return (scores.softmax(-1) * alive) @ v, lse


def top_left(shift: int = 0) -> Tensor:
    return torch.ones(N, M, dtype=torch.bool).tril(shift)


MASKS: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "none": ({}, None),
    "causal": ({"is_causal": True, "causal_alignment": "top_left"}, top_left()),
    "bottom right": ({"is_causal": True, "causal_alignment": "bottom_right"}, top_left(M - N)),
    "window": ({"window": (3, 2), "causal_alignment": "top_left"}, top_left(2) & ~top_left(-4)),
    "keys": ({"attn_mask": torch.arange(M)[None] < 12}, torch.arange(M).expand(N, M) < 12),
    "heads": ({"attn_mask": draw(HEADS, N, M, seed=8) > 0}, draw(HEADS, N, M, seed=8) > 0),
    "batch": ({"attn_mask": draw(2, 1, 1, M, seed=9) > -0.5}, (draw(2, 1, 1, M, seed=9) > -0.5).expand(2, 1, N, M)),
    "both": (
        {"attn_mask": draw(2, HEADS, N, M, seed=8) > 0, "is_causal": True, "causal_alignment": "top_left"},
        (draw(2, HEADS, N, M, seed=8) > 0) & top_left(),
    ),
    "dead rows": (
        {"attn_mask": (torch.arange(N) % 3 > 0)[:, None].expand(N, M)},
        (torch.arange(N) % 3 > 0)[:, None].expand(N, M),
    ),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_equals_attention_with_the_matrix(name: str, kv_heads: int, impl: str):
    options, keep = MASKS[name]
    leaves = {key: x.requires_grad_() for key, x in tensors(kv_heads).items()}
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    expected, lse = truth(leaves, keep)
    out = fb.attention(q, k, v, mixed(leaves), impl=impl, enable_gqa=True, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    with_lse = fb.attention(q, k, v, mixed(leaves), enable_gqa=True, return_lse=True, **options)
    torch.testing.assert_close(with_lse, (expected, lse), rtol=0, atol=1e-12)
    grads = torch.autograd.grad((expected * draw(*expected.shape)).sum(), list(leaves.values()))
    found = torch.autograd.grad((out * draw(*expected.shape)).sum(), list(leaves.values()))
    for key, grad, right in zip(leaves, found, grads, strict=True):
        assert grad.shape == leaves[key].shape
        torch.testing.assert_close(grad, right, rtol=0, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def test_log_sum_exp_has_gradients():
    leaves = {key: x.requires_grad_() for key, x in tensors().items()}
    weight = draw(2, HEADS, N)
    _, expected = truth(leaves)
    _, lse = fb.attention(*(leaves[k] for k in ("query", "key", "value")), mixed(leaves), return_lse=True)
    inputs = [x for key, x in leaves.items() if key != "value"]
    right, found = (torch.autograd.grad((x * weight).sum(), inputs) for x in (expected, lse))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("batch", "own"),
    [((), ()), ((3,), ()), ((3,), (1,)), ((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3), (2, 3))],
)
def test_batches_of_biases(batch: tuple[int, ...], own: tuple[int, ...]):
    q, k, v = (draw(*batch, 3, N, 8, seed=s) for s in range(3))
    factored = fb.FactoredBias(draw(*own, 2, N, 2, seed=4), draw(1, N, 2, seed=5))
    bias = fb.MixedBias((draw(*own, 1, N, N, seed=6), factored), ((1,), (0, 2)))
    expected = scaled_dot_product_attention(q, k, v, bias.dense().expand(*batch, 3, N, N))
    torch.testing.assert_close(fb.attention(q, k, v, bias), expected, rtol=0, atol=1e-12)


def test_a_matrix_may_serve_its_whole_group():
    q, k, v = (draw(2, 3, N, 8, seed=s) for s in range(3))
    bias = fb.MixedBias((draw(1, N, N, seed=4).requires_grad_(),), ((2, 0, 1),))
    out = fb.attention(q, k, v, bias)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, bias.dense()), rtol=0, atol=1e-12)
    out.sum().backward()
    grad = bias.parts[0].grad
    assert grad is not None and grad.shape == (1, N, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_of_a_dense_head_is_that_of_eager_attention(dtype: torch.dtype):
    leaves = tensors(dtype=dtype)
    leaves["matrix"] = leaves["matrix"].float()  # a finer matrix is rounded to the queries' dtype
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    right, _ = truth({key: x.double() for key, x in leaves.items()})
    out = fb.attention(q, k, v, mixed(leaves))
    assert out.dtype == dtype and out.shape == (2, HEADS, N, 6)
    eager = (8**-0.5 * q @ k.mT + mixed(leaves).dense().to(dtype)).softmax(-1) @ v
    (dense,) = GROUPS[2]
    error, allowed = (float((x.double() - right)[:, dense].norm()) for x in (out, eager))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * float(right[:, dense].norm())
    torch.testing.assert_close(out.double(), right, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_scale_is_passed_on():
    leaves = tensors()
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    out = fb.attention(q, k, v, mixed(leaves), scale=0.3)
    torch.testing.assert_close(out, truth(leaves, scale=0.3)[0], rtol=0, atol=1e-12)


def test_dropout_is_right_on_average():
    leaves = tensors()
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    torch.manual_seed(0)
    rounds = [fb.attention(q, k, v, mixed(leaves), dropout_p=0.3) for _ in range(150)]
    assert not torch.equal(rounds[0], rounds[1])
    expected = fb.attention(q, k, v, mixed(leaves))
    mean, spread = torch.stack(rounds).mean(0), torch.stack(rounds).std(0)
    assert bool(((mean - expected).abs() <= 5 * spread / 150**0.5 + 1e-9).all())


def test_deterministic_is_repeatable():
    leaves = {key: x.requires_grad_() for key, x in tensors(dtype=torch.float32).items()}

    def gradients() -> tuple[Tensor, ...]:
        out = fb.attention(*(leaves[k] for k in ("query", "key", "value")), mixed(leaves), deterministic=True)
        return torch.autograd.grad(out.square().sum(), list(leaves.values()))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(("batch", "n", "m"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_nothing_to_attend_to(batch: int, n: int, m: int):
    q, k, v = (torch.randn(batch, 2, length, 4, requires_grad=True) for length in (n, m, m))
    dense = torch.randn(1, n, m, requires_grad=True)
    bias = fb.MixedBias((dense, fb.FactoredBias(torch.randn(1, n, 2), torch.randn(1, m, 2))), ((0,), (1,)))
    out, lse = fb.attention(q, k, v, bias, return_lse=True)
    assert out.shape == (batch, 2, n, 4) and not out.abs().sum()
    assert lse.shape == (batch, 2, n) and bool((lse == -math.inf).all())
    out.sum().backward()
    assert dense.grad is not None and not dense.grad.abs().sum()


def test_compiles_into_one_graph():
    leaves = {key: x.requires_grad_() for key, x in tensors(dtype=torch.float32).items()}
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    run = torch.compile(lambda q, k, v, bias: fb.attention(q, k, v, bias), backend="aot_eager", fullgraph=True)
    expected = fb.attention(q, k, v, mixed(leaves))
    out = run(q, k, v, mixed(leaves))
    torch.testing.assert_close(out, expected)
    right, found = (torch.autograd.grad(x.square().sum(), list(leaves.values())) for x in (expected, out))
    torch.testing.assert_close(found, right)


def test_autocast_reaches_both_paths():
    leaves = tensors(dtype=torch.float32)
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fb.attention(q, k, v, mixed(leaves))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fb.attention(q, k, v, mixed(leaves)), rtol=0, atol=0.05)


def test_a_named_implementation_is_that_of_the_factored_heads():
    leaves = tensors()
    q, k, v = (leaves[key] for key in ("query", "key", "value"))
    with pytest.raises(NotImplementedError, match="impl='sdpa' cannot do this call"):
        fb.attention(q, k, v, mixed(leaves), impl="sdpa", return_lse=True)
    dense = fb.MixedBias((draw(HEADS, N, M),), (tuple(range(HEADS)),))
    assert len(fb.attention(q, k, v, dense, impl="sdpa", return_lse=True)) == 2


class TestBadInput:
    def setup_method(self) -> None:
        leaves = tensors()
        self.qkv = [leaves[key] for key in ("query", "key", "value")]
        self.bias = mixed(leaves)

    def test_another_number_of_heads(self):
        with pytest.raises(ValueError, match="bias"):
            fb.attention(*(x[:, :2] for x in self.qkv), self.bias)
        one = fb.MixedBias((draw(1, N, M),), ((0,),))
        with pytest.raises(ValueError, match="bias has 1 heads and query 4; must be equal"):
            fb.attention(*self.qkv, one)

    def test_other_lengths(self):
        with pytest.raises(ValueError, match="bias is for 13 queries and 17 keys, query and key have 12 and 17"):
            fb.attention(self.qkv[0][:, :, :12], *self.qkv[1:], self.bias)

    def test_a_batch_that_does_not_fit(self):
        bias = fb.MixedBias((draw(3, HEADS, N, M),), (tuple(range(HEADS)),))
        with pytest.raises(ValueError, match=r"leading dimensions \(3, 4\) of bias"):
            fb.attention(*self.qkv, bias)

    def test_fewer_key_heads_without_asking(self):
        q, k, v = self.qkv
        with pytest.raises(ValueError, match="enable_gqa=True"):
            fb.attention(q, k[:, :2], v[:, :2], self.bias)

    def test_a_mask_that_does_not_fit(self):
        with pytest.raises(ValueError, match="attn_mask"):
            fb.attention(*self.qkv, self.bias, attn_mask=torch.ones(3, N, M, dtype=torch.bool))

    def test_lengths_that_differ_need_an_alignment(self):
        with pytest.raises(ValueError, match="causal_alignment must be given"):
            fb.attention(*self.qkv, self.bias, is_causal=True)

    def test_explain_takes_parts(self):
        with pytest.raises(
            TypeError, match="bias is a MixedBias, which only `attention` takes; ask for one of its `parts`"
        ):
            fb.explain(*self.qkv, self.bias)

    def test_packed_sequences_take_none(self):
        cu = torch.tensor([0, N], dtype=torch.int32)
        q, k, v = (x[0].transpose(0, 1) for x in self.qkv)
        with pytest.raises(TypeError, match="bias is a MixedBias"):
            fb.varlen_attention(q, k[:N], v[:N], cu, cu, self.bias)


@pytest.mark.parametrize("mixed", [False, True], ids=["factored", "mixed"])
def test_bias_and_mask_fit_the_batch_that_keys_bring(mixed: bool) -> None:
    """One query set against several key sets: the batch is the broadcast one, for the bias and the mask too."""
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    bias = fb.FactoredBias(torch.randn(3, 2, 5, 2), torch.randn(3, 2, 7, 2))
    mask = torch.rand(3, 1, 5, 7) > 0.3
    given = fb.MixedBias((bias,), heads=((0, 1),)) if mixed else bias
    out = fb.attention(q, k, v, given, attn_mask=mask)
    torch.testing.assert_close(out, fb.attention(q.expand(3, -1, -1, -1), k, v, bias, attn_mask=mask))


def test_autocast_takes_mixed_dtypes_as_factored_heads_do() -> None:
    q, k, v = draw(2, HEADS, N, 8, dtype=torch.float32), *(draw(2, HEADS, M, 8, dtype=torch.bfloat16) for _ in range(2))
    dense = fb.MixedBias((draw(HEADS, N, M, dtype=torch.float32),), heads=(tuple(range(HEADS)),))
    with torch.autocast("cpu", torch.bfloat16):
        out = fb.attention(q, k, v, dense)
    assert isinstance(out, Tensor) and torch.equal(out, fb.attention(q.bfloat16(), k, v, dense))
