"""Ranks that were called differently all say so, before anything else is sent."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.distributed.ranks import Failure, Place, Ranks

import flashbias as fb
import flashbias.distributed as cp
from flashbias.distributed.agreement import HEADER


def attend(place: Place, odd: int, change: str, strategy: str = "ring") -> dict[str, int]:
    """A call that is changed on one rank; returns what was sent if it should fail."""
    is_odd = place.rank == odd
    head_dim = 8 if is_odd and change == "head_dim" else 4
    dtype = torch.float64 if is_odd and change == "dtype" else torch.float32
    heads, rank = 6, 3 if is_odd and change == "rank" else 2
    q, k, v = torch.randn(3, 1, heads, 5, head_dim, dtype=dtype)
    q.requires_grad_(not (is_odd and change == "gradients"))
    length = 9 if is_odd and change == "table" else 7
    table = None if is_odd and change == "no table" else torch.randn(heads, length)
    bias = fb.FactoredBias(torch.randn(heads, 5, rank), torch.randn(1, 5, rank), table)
    options: dict[str, Any] = {"strategy": strategy, "is_causal": True}
    if is_odd and change == "scale":
        options["scale"] = 0.25
    if is_odd and change == "mask":
        options["is_causal"] = False
    if is_odd and change == "strategy":
        options["strategy"] = "ulysses"
    if is_odd and change == "order":
        options["order"] = "zigzag"
    if is_odd and change == "documents":
        options["cu_seqlens"] = torch.tensor([0, 15], dtype=torch.int32)
    if is_odd and change == "seqlen":
        options["seqlen"] = 15
    if is_odd and change == "refused":
        k = k[..., :3]
    with cp.count_traffic() as traffic:
        try:
            cp.context_parallel_attention(q, k, v, bias, group=place.group, **options)
        except Exception as error:
            error.sent = dict(traffic.sent)  # type: ignore[attr-defined]
            assert set(traffic.sent) <= {"agreement"}, traffic.sent
            raise
    return dict(traffic.sent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("head_dim", r"query: rank 2 has \[1, 6, tokens, 8\] in torch.float32 where rank 0 has \[1, 6, tokens, 4\]"),
        ("dtype", "query: rank 2 has .* in torch.float64 where rank 0 has .* in torch.float32"),
        ("rank", r"phi_q: rank 2 has \[6, tokens, 3\]"),
        ("table", r"table: rank 2 has \[6, 9\]"),
        ("no table", "table: rank 2 has none where"),
        ("gradients", r"which inputs need gradients: rank 2 has \[\] where rank 0 has \['query'\]"),
        ("scale", "scale: rank 2 has 0.25 where rank 0 has 0.5"),
        ("mask", r"window: rank 2 has \(None, None\) where rank 0 has \(None, 0\)"),
        ("strategy", "options: rank 2 has strategy 'ulysses'"),
        ("order", "options: rank 2 has"),
        ("documents", "documents: rank 2"),
        ("seqlen", "seqlen: rank 2 has 15 where rank 0 has none"),
    ],
)
def test_every_rank_names_the_one_that_differs(ranks: Ranks, change: str, message: str) -> None:
    for answer in ranks.call(attend, 2, change, size=3):
        assert isinstance(answer, Failure) and isinstance(answer.error, cp.DisagreementError), answer
        assert re.search(message, str(answer.error)), answer.error
        assert answer.error.ranks == (2,)


def test_rank_zero_may_be_the_odd_one(ranks: Ranks) -> None:
    for answer in ranks.call(attend, 0, "head_dim", size=3):
        assert isinstance(answer, Failure) and isinstance(answer.error, cp.DisagreementError)
        assert answer.error.ranks == (1, 2)


def test_a_rank_that_refuses_its_own_arguments_tells_the_others(ranks: Ranks) -> None:
    answers = ranks.call(attend, 1, "refused", size=3)
    own = answers.pop(1)
    assert isinstance(own, Failure) and "head_dim of query is 4 and of key 3" in str(own.error)
    for answer in answers:
        assert isinstance(answer, Failure) and isinstance(answer.error, cp.DisagreementError)
        assert "rank 1 refused its own arguments" in str(answer.error)


def test_what_agreement_costs(ranks: Ranks) -> None:
    for sent in ranks.results(attend, -1, "nothing", size=3):
        assert sent["agreement"] == 2 * HEADER * 8 < 2 * 1024


def test_ranks_go_on_after_a_disagreement(ranks: Ranks) -> None:
    """Nothing of a refused call is left behind that the next one could receive."""
    ranks.call(attend, 2, "dtype", size=3)
    ranks.results(attend, -1, "nothing", size=3)


def sized(place: Place, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    if "cu_seqlens" in options:
        bounds, dtype = options["cu_seqlens"]
        options = options | {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}
    x = torch.randn(2, sizes[place.rank], 4)
    cp.context_parallel_attention(x, x, x, group=place.group, **options)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((5, 4, 4), {"order": "zigzag"}, r"order='zigzag' cuts 13 tokens into \[4, 6, 3\]|cuts 13 tokens into"),
        ((5, 4, 4), {"seqlen": 12}, "seqlen is 12, but the ranks hold .5, 4, 4., 13 tokens"),
        ((5, 4, 4), {"strategy": "ulysses"}, "number of query heads must be divisible by it, got 2"),
        ((5, 4, 4), {"strategy": "ring+ulysses"}, "needs a two-dimensional mesh"),
        ((5, 4, 4), {"strategy": "star"}, "strategy must be one of"),
        ((5, 4, 4), {"order": "striped"}, "order must be one of"),
        ((5, 4, 4), {"table_grad": "mean"}, "table_grad must be one of"),
        ((5, 4, 4), {"impl": "sdpa"}, "impl must be 'auto', 'hopper', 'triton' or 'reference'"),
        ((5, 4, 4), {"cu_seqlens": ((0, 12), torch.int32)}, "cu_seqlens must ascend from 0 to"),
        ((5, 4, 4), {"cu_seqlens": ((0, 13), torch.int64)}, "cu_seqlens must be an int32 tensor"),
        ((5, 5, 5), {"check": False, "seqlen": 12}, r"must hold \[4, 4, 4\]"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_sizes_and_options_that_do_not_fit(
    ranks: Ranks, sizes: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    answers = ranks.call(sized, sizes, options, size=3)
    for answer in answers:
        assert isinstance(answer, Failure) and isinstance(answer.error, ValueError | TypeError)
        assert re.search(message, str(answer.error)), answer.error
