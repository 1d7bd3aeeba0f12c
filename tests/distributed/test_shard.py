"""Who holds what: cutting and laying together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashbias as fb
from flashbias.distributed import Layout
from flashbias.distributed.shard import ORDERS, local_rows

lengths, sizes, orders = st.integers(0, 40), st.integers(1, 5), st.sampled_from(ORDERS)


@given(lengths, sizes, orders)
def test_every_token_is_held_once(seqlen: int, size: int, order: str) -> None:
    layout = Layout.of(seqlen, size, order)
    held = torch.cat([layout.positions(rank) for rank in range(size)])
    assert torch.equal(held.sort().values, torch.arange(seqlen))
    assert layout.seqlen == seqlen and layout.cp_size == size
    for rank in range(size):
        assert torch.equal(layout.positions(rank), layout.positions(rank).sort().values)


@given(lengths, sizes)
def test_contiguous_is_cut_as_torch_cuts(seqlen: int, size: int) -> None:
    expected = [len(part) for part in torch.arange(seqlen).chunk(size)] if seqlen else []
    assert Layout.of(seqlen, size).sizes == expected + [0] * (size - len(expected))


def test_zigzag_pairs_the_first_chunk_with_the_last() -> None:
    layout = Layout.of(16, 2, "zigzag")
    assert layout.positions(0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert layout.positions(1).tolist() == list(range(4, 12))
    causal_pairs = [int((layout.positions(rank) + 1).sum()) for rank in range(2)]
    assert causal_pairs[0] == causal_pairs[1]


@given(lengths, sizes, orders)
def test_parts_laid_together_are_the_whole(seqlen: int, size: int, order: str) -> None:
    layout = Layout.of(seqlen, size, order)
    x = torch.randn(2, seqlen, 3)
    parts = [layout.cut(x, rank, -2) for rank in range(size)]
    assert [part.shape[-2] for part in parts] == layout.sizes
    assert torch.equal(layout.lay(parts, -2), x)


@given(lengths, st.integers(1, 3), st.integers(1, 3), orders)
def test_pooled_tokens_ascend(seqlen: int, groups: int, members: int, order: str) -> None:
    """What a row of a mesh pools is a shard of the coarser layout, and its members' tokens lie in it in order."""
    layout = Layout.of(seqlen, groups * members, order)
    pooled = layout.together(members)
    for group in range(groups):
        inner = layout.within(group * members, members)
        parts = [layout.positions(group * members + rank) for rank in range(members)]
        assert torch.equal(inner.lay(parts, 0), pooled.positions(group))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_any_sizes(counts: list[int]) -> None:
    assert Layout.of_sizes(counts).sizes == counts


def test_local_rows_of_a_bias() -> None:
    layout = Layout.of(11, 2, "zigzag")
    bias = fb.Alibi(4, symmetric=True)(11, 11)
    mixed = bias + fb.FactoredBias(torch.randn(4, 11, 2), torch.randn(1, 11, 2))
    for rank in range(2):
        where = layout.positions(rank)
        assert torch.equal(local_rows(mixed, layout, rank).dense(), mixed.dense()[:, where][:, :, where])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="order must be one of"):
        Layout.of(4, 2, "striped")
    with pytest.raises(ValueError, match="seqlen must not be negative"):
        Layout.of(-1, 2)
