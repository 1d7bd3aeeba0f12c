"""Heads spread over ranks: biases follow the global index of a head."""

from __future__ import annotations

import pytest
import torch
from tests.distributed.problem import grid
from tests.distributed.ranks import Place, Ranks
from torch import Tensor

import flashbias as fb
import flashbias.distributed as cp

HEADS, N = 12, 9


def test_slopes_follow_the_global_head() -> None:
    """Twelve heads, four on a rank: neither the first four slopes nor those of a model with four heads."""
    whole = fb.Alibi(HEADS)(N, N)
    part = cp.bias_of_heads(whole, range(4, 8))
    assert torch.equal(part.dense(), whole.dense()[4:8])
    assert torch.equal(part.dense(), fb.Alibi(HEADS, heads=range(4, 8))(N, N).dense())
    assert not torch.equal(part.dense(), fb.Alibi(4)(N, N).dense())


def test_tables_ranks_and_gradients_follow_too() -> None:
    torch.manual_seed(0)
    table, phi_q = torch.randn(HEADS, 5, requires_grad=True), torch.randn(2, HEADS, N, 3, requires_grad=True)
    bias = fb.FactoredBias(phi_q, torch.randn(1, N, 3), table, ranks=[n % 4 for n in range(HEADS)])
    part = cp.bias_of_heads(bias, range(9, 12))
    assert part.ranks == (1, 2, 3)
    torch.testing.assert_close(part.dense(), bias.dense()[:, 9:])
    part.dense().sum().backward()
    assert table.grad is not None and phi_q.grad is not None
    assert bool((table.grad[:9] == 0).all()) and bool((table.grad[9:] != 0).any())
    assert bool((phi_q.grad[:, :9] == 0).all()) and bool((phi_q.grad[:, 11] != 0).all())


def test_what_all_heads_share_stays() -> None:
    shared = fb.FactoredBias(torch.randn(1, N, 2), torch.randn(1, N, 2))
    assert cp.bias_of_heads(shared, range(4, 8)) is shared


@pytest.mark.parametrize("heads", [[], [1, 3], [11, 12], [-1, 0]], ids=str)
def test_bad_heads(heads: list[int]) -> None:
    with pytest.raises(ValueError, match="heads must be"):
        cp.bias_of_heads(fb.Alibi(HEADS)(N, N), heads)


def held(place: Place) -> tuple[range, str]:
    try:
        cp.local_heads(2, group=place.group)
    except ValueError as error:
        return cp.local_heads(10, group=place.group), str(error)
    raise AssertionError("two heads for three ranks")


def test_local_heads_are_cut_as_dtensor_cuts(ranks: Ranks) -> None:
    answers = ranks.results(held, size=3)
    assert [heads for heads, _ in answers] == [range(4), range(4, 8), range(8, 10)]
    assert all("leave every one of 3 ranks a head, got 2" in message for _, message in answers)


def by_heads(place: Place, shape: tuple[int, ...], kv_heads: int) -> tuple[list[Tensor], Tensor]:
    """Attention of DTensors cut by heads: output and gradients, gathered; and this rank's part of the table's."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    mesh = grid(place, shape)
    placements = [Shard(1)] * len(shape)
    inputs = [torch.randn(2, heads, N, 8) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (distribute_tensor(x, mesh, placements).requires_grad_() for x in inputs)
    table = torch.randn(HEADS, 7, requires_grad=True)
    bias = fb.Alibi(HEADS)(N, N) + fb.FactoredBias.from_table(table, N, N)
    out = cp.head_parallel_attention(q, k, v, bias, is_causal=True, enable_gqa=True)
    assert out.placements == q.placements and out.shape == (2, HEADS, N, 8)
    out.backward(torch.ones_like(out))
    assert table.grad is not None
    return [x.full_tensor().detach() for x in (out, q.grad, k.grad, v.grad)], table.grad


@pytest.mark.parametrize(("shape", "kv_heads"), [((4,), 12), ((2, 2), 4)], ids=["row", "grid"])
def test_dtensors(ranks: Ranks, shape: tuple[int, ...], kv_heads: int) -> None:
    answers = ranks.results(by_heads, shape, kv_heads, size=4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, N, 8).requires_grad_() for heads in (HEADS, kv_heads, kv_heads))
    table = torch.randn(HEADS, 7, requires_grad=True)
    bias = fb.Alibi(HEADS)(N, N) + fb.FactoredBias.from_table(table, N, N)
    out = fb.attention(q, k, v, bias, is_causal=True, enable_gqa=True)
    assert isinstance(out, Tensor)
    out.sum().backward()
    for found, _ in answers:
        for x, right in zip(found, (out, q.grad, k.grad, v.grad), strict=True):
            torch.testing.assert_close(x, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(part for _, part in answers), table.grad, rtol=1e-5, atol=1e-5)


def refusals(place: Place) -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, messages = grid(place, (4,)), []
    x = torch.randn(2, HEADS, N, 8)
    heads, tokens = (distribute_tensor(x, mesh, [Shard(dim)]) for dim in (1, 2))
    odd = distribute_tensor(x[:, :6], mesh, [Shard(1)])
    for call in (
        lambda: cp.head_parallel_attention(x, heads, heads),
        lambda: cp.head_parallel_attention(heads, tokens, tokens),
        lambda: cp.head_parallel_attention(tokens, tokens, tokens),
        lambda: cp.head_parallel_attention(odd, odd, odd),
        lambda: cp.head_parallel_attention(heads, heads, heads, return_lse=True),
    ):
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            messages.append(str(error))
    return messages


def test_what_dtensors_must_be(ranks: Ranks) -> None:
    for messages in ranks.results(refusals, size=4):
        for message, part in zip(
            messages,
            [
                "query must be a DTensor",
                "key is placed (Shard(dim=2),) and query (Shard(dim=1),); must be equal",
                "query must be cut by heads, Shard(1), or replicated, got Shard(dim=2)",
                "heads must divide by the 4 ranks that share them, got 6 of query",
                "return_lse cannot be used with DTensors",
            ],
            strict=True,
        ):
            assert part in message
