"""A rank that fails, stays away or falls behind ends in an error that names it and the step, and never in a hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tests.distributed.ranks import Failure, Place, Ranks

import flashbias as fb
import flashbias.distributed as cp
from flashbias.distributed.exchange import Hop
from flashbias.distributed.topology import Circle

TIMEOUT = 2.5
"""Of the process groups here, in seconds; a dead rank is noticed at once."""


def attend(place: Place, culprit: int, what: str, check: bool) -> None:
    is_culprit = place.rank == culprit
    if is_culprit and what == "stays away":
        return
    if is_culprit and what == "dies":
        os._exit(1)
    torch.manual_seed(place.rank)
    q, k, v = torch.randn(3, 2, 6, 4, device=place.device).unbind(0)
    q.requires_grad_()
    k.requires_grad_()
    bias = fb.FactoredBias(*(torch.randn(heads, 6, 2, device=place.device) for heads in (2, 1)))
    out = cp.context_parallel_attention(q, k, v, bias, group=place.group, strategy="ring", check=check)
    assert isinstance(out, torch.Tensor)
    if is_culprit and what == "skips the backward pass":
        return
    out.sum().backward()


def failures(
    make: Callable[..., Ranks],
    what: str,
    check: bool = True,
    culprit: int = 2,
    size: int = 3,
    timeout: float = TIMEOUT,
    **where: Any,
) -> dict[int, cp.RankError]:
    """What the other ranks raise, and that they raise it in time."""
    ranks = make(size, timeout, **where)
    ranks.results(meet, size=size)
    # Once without a culprit: what has to be compiled is so before time counts.
    assert ranks.call(attend, size, what, check, size=size) == [None] * size
    start = time.monotonic()
    answers = ranks.call(attend, culprit, what, check, size=size)
    assert time.monotonic() - start < 10 * timeout
    found = {}
    for rank, answer in enumerate(answers):
        if rank != culprit:
            assert isinstance(answer, Failure) and isinstance(answer.error, cp.RankError), answer
            assert answer.error.cp_rank == rank
            assert f"rank {rank} of {size} got no answer from rank" in str(answer.error)
            found[rank] = answer.error
    return found


def meet(place: Place) -> int:
    """Make the connections."""
    dist.all_reduce(count := torch.ones(1, device=place.device), group=place.group)
    return int(count)


def test_a_missing_rank_is_named_by_all(breakable_ranks: Callable[..., Ranks]) -> None:
    errors = failures(breakable_ranks, "stays away")
    assert all(error.peers == (2,) and error.step == "agreement" for error in errors.values())


def test_a_rank_that_dies_in_the_ring_is_named_by_its_neighbour(breakable_ranks: Callable[..., Ranks]) -> None:
    errors = failures(breakable_ranks, "dies", check=False)
    assert errors[0].peers == (2,)  # rank 0 receives from rank 2
    for error in errors.values():
        assert error.step.startswith("keys and values, step") and error.step.endswith("forward")


def test_a_rank_without_a_backward_pass(breakable_ranks: Callable[..., Ranks]) -> None:
    errors = failures(breakable_ranks, "skips the backward pass")
    assert errors[0].peers == (2,)
    assert all("backward" in error.step or "gradients" in error.step for error in errors.values())


def one_handle_for_both(place: Place) -> tuple[int, ...]:
    """As NCCL does: one handle answers for what is sent and what is received."""
    circle = Circle.of(place.group)
    message = torch.zeros(16, dtype=torch.uint8)
    hop = Hop(circle, message, torch.empty_like(message), "test", "a test")
    hop.wait()
    hop.works = [Broken()]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        hop.wait()
    except cp.RankError as error:
        return error.peers
    return ()


class Broken:
    def wait(self) -> None:
        raise RuntimeError("timed out")


def test_two_neighbours_that_are_one_are_named_once(ranks: Ranks) -> None:
    assert ranks.results(one_handle_for_both, size=2) == [(1,), (0,)]
    assert ranks.results(one_handle_for_both, size=3)[0] == (1, 2)
