"""Rectangles cover exactly the pairs that a mask leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from flashbias.attention.call import visible
from flashbias.distributed import Layout
from flashbias.distributed.shard import ORDERS
from flashbias.distributed.tiles import Mask, Tile, checked_documents, tiles

windows = st.one_of(st.none(), st.integers(0, 12))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layout, Mask]:
    seqlen, size = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    bounds = None
    if draw(st.booleans()):
        inner = draw(st.lists(st.integers(0, seqlen), max_size=5))
        bounds = (0, *sorted(inner), seqlen)
    if draw(st.booleans()):
        layout = Layout.of(seqlen, size, draw(st.sampled_from(ORDERS)))
    else:
        cuts = sorted(draw(st.lists(st.integers(0, seqlen), min_size=size - 1, max_size=size - 1)))
        layout = Layout.of_sizes([b - a for a, b in zip([0, *cuts], [*cuts, seqlen], strict=True)])
    return layout, Mask(draw(windows), draw(windows), bounds)


def expected(layout: Layout, q_rank: int, k_rank: int, mask: Mask) -> Tensor:
    """Pair by pair, from positions in the whole sequence."""
    i, j = layout.positions(q_rank)[:, None], layout.positions(k_rank)[None, :]
    keep = visible(j - i, mask.left, mask.right)
    if mask.documents is not None:
        bounds = torch.tensor(mask.documents[1:])
        keep &= torch.searchsorted(bounds, i, right=True) == torch.searchsorted(bounds, j, right=True)
    return keep


def seen(tile: Tile) -> Tensor:
    """What a kernel would see of a rectangle."""
    n, m = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
    assert n > 0 and m > 0
    i, j = torch.arange(n)[:, None], torch.arange(m)[None, :]
    keep = visible(j - i, tile.left, tile.right)
    if tile.documents is not None:
        assert n == m == tile.documents[-1]
        bounds = torch.tensor(tile.documents[1:])
        keep &= torch.searchsorted(bounds, i, right=True) == torch.searchsorted(bounds, j, right=True)
    return keep


@given(problems())
@example((Layout.of(8, 2, "zigzag"), Mask(right=0)))
@example((Layout.of(8, 2, "zigzag"), Mask(2, 0, (0, 3, 3, 8))))
@example((Layout.of(9, 3), Mask(1, 1)))
def test_every_pair_once(problem: tuple[Layout, Mask]) -> None:
    layout, mask = problem
    for q_rank in range(layout.cp_size):
        for k_rank in range(layout.cp_size):
            right = expected(layout, q_rank, k_rank, mask)
            found = torch.zeros_like(right, dtype=torch.int64)
            for tile in tiles(layout, q_rank, k_rank, mask):
                found[tile.queries, tile.keys] += seen(tile)
            assert torch.equal(found, right.to(torch.int64)), (q_rank, k_rank)


@pytest.mark.parametrize("order", ORDERS)
def test_causal_needs_one_rectangle_for_each_pair_of_shards(order: str) -> None:
    layout = Layout.of(64, 4, order)
    for q_rank in range(4):
        for k_rank in range(4):
            found = tiles(layout, q_rank, k_rank, Mask(right=0))
            assert len(found) <= 1
            if q_rank != k_rank and found:
                assert found[0].right is None, "only a shard's own keys need a mask"


def test_zigzag_gives_every_rank_the_same_work() -> None:
    layout = Layout.of(64, 4, "zigzag")
    work = [sum(int(expected(layout, q, k, Mask(right=0)).sum()) for k in range(4)) for q in range(4)]
    assert len(set(work)) == 1


@pytest.mark.parametrize("bounds", [(1, 5), (0, 4), (0, 3, 2, 5), (0,)])
def test_documents_must_cover_the_sequence(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to"):
        checked_documents(bounds, 5)
