"""Addresses of broadcast factors, against the broadcasting of torch."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.attention.layout import Sharing, flatten_heads, share, storable


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading sizes of queries, and of a factor that broadcasts to them."""
    full = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)))
    own = tuple(draw(st.sampled_from([1, size])) for size in full)
    return full, own[draw(st.integers(0, len(own) - 1)) :]


def brute_force(full: tuple[int, ...], own: tuple[int, ...]) -> list[int]:
    """Own index of every flat (batch, head) index."""
    return torch.arange(math.prod(own)).reshape(own).expand(full).flatten().tolist()


def group_of(bh: int, sharing: Sharing) -> int:
    s1, v2, s2 = sharing.sizes
    return bh // (s1 * v2 * s2) * v2 + bh // s2 % v2


def member_of(f: int, m: int, sharing: Sharing) -> int:
    s1, v2, s2 = sharing.sizes
    return ((f // v2 * s1 + m // s2) * v2 + f % v2) * s2 + m % s2


def levels(full: tuple[int, ...], own: tuple[int, ...]) -> int:
    """How often a factor changes between varying and shared, from the outside in, starting with varying."""
    own = (1,) * (len(full) - len(own)) + own
    kinds = [mine == size for size, mine in zip(full, own, strict=True) if size > 1]
    return sum(a != b for a, b in zip([True, *kinds], kinds, strict=False)) + 1


@given(shapes())
def test_share_addresses_every_pair(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    full, own = shape
    sharing = share(full, own)
    if sharing is None:
        assert levels(full, own) > 4
        return
    assert levels(full, own) <= 4
    expected = brute_force(full, own)
    assert [group_of(bh, sharing) for bh in range(math.prod(full))] == expected
    assert sharing.groups == math.prod(own)
    assert sharing.groups * sharing.members == math.prod(full)
    for f in range(sharing.groups):
        members = [member_of(f, m, sharing) for m in range(sharing.members)]
        assert sorted(members) == [bh for bh, group in enumerate(expected) if group == f]


@given(shapes())
def test_storable_can_always_be_shared(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    full, own = shape
    x = torch.randn(*own, 2, 3)
    y = storable(x, full)
    assert share(full, tuple(y.shape[:-2])) is not None
    assert y.dim() == len(full) + 2
    assert torch.equal(y.expand(*full, 2, 3), x.expand(*full, 2, 3))
    if share(full, own) is not None:
        assert y.numel() == x.numel(), "nothing is expanded that need not be"
    assert y.data_ptr() == x.data_ptr()


def test_five_levels_expand_one() -> None:
    x = torch.randn(2, 1, 2, 1, 2, 4, 3, requires_grad=True)
    full = (2, 2, 2, 2, 2)
    assert share(full, x.shape[:5]) is None
    y = storable(x, full)
    assert tuple(y.shape[:5]) == (2, 2, 2, 1, 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.full_like(x, 2.0))


def test_nothing_is_shared_by_nobody() -> None:
    assert Sharing.nothing(12) == Sharing(12, 1, 1, 1)
    assert Sharing.nothing(12).members == 1


def test_flatten_heads_is_a_view() -> None:
    x = torch.randn(2, 3, 5, 4)
    assert flatten_heads(x).shape == (6, 5, 4)
    assert flatten_heads(x).data_ptr() == x.data_ptr()


@given(st.integers(1, 60), st.integers(1, 60))
def test_parts_hold_all_members_and_none_is_empty(members: int, wanted: int) -> None:
    parts, each = Sharing(1, members, 1, 1).parts(wanted)
    assert parts <= wanted
    assert (parts - 1) * each < members <= parts * each
