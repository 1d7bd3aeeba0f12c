"""Which queries of one shard see which keys of another, as rectangles that a kernel takes.

Shards are runs of consecutive tokens, so what a mask leaves of a pair of runs is everything, nothing, or a band. A
rectangle has its own window, counted from its own corner.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from flashbias.distributed.shard import Layout

__all__ = ["Mask", "Tile", "tiles"]


@dataclass(frozen=True)
class Mask:
    """Which pairs of the whole sequence are seen.

    Args:
        left: how far behind a query its keys reach; None: to the beginning.
        right: how far ahead; 0 is causal, None: to the end.
        documents: boundaries of packed documents, from 0 to N; no query sees another document. None: one document.
    """

    left: int | None = None
    right: int | None = None
    documents: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tile:
    """A rectangle of queries and keys, in positions within their shards.

    Args:
        queries: rows.
        keys: columns.
        left: window of the rectangle, counted from its corner; None: open.
        right: likewise.
        documents: boundaries of packed documents within the rectangle, the same for rows and columns.
    """

    queries: slice
    keys: slice
    left: int | None = None
    right: int | None = None
    documents: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of one shard: where they stand in the sequence, and in the shard."""

    tokens: range
    offset: int

    def cut(self, start: int, stop: int) -> slice:
        """Where tokens `start … stop - 1` lie in the shard."""
        return slice(start - self.tokens.start + self.offset, stop - self.tokens.start + self.offset)


def tiles(layout: Layout, q_rank: int, k_rank: int, mask: Mask) -> list[Tile]:
    """Cover every pair that a mask leaves between two shards, each once.

    Args:
        layout: who holds what.
        q_rank: the shard of the queries.
        k_rank: the shard of the keys.
        mask: what is seen.

    Returns:
        Rectangles, none of them empty.

    Examples:
        >>> tiles(Layout.of(8, 2, "zigzag"), 0, 1, Mask(right=0))  # rank 0 holds 0, 1 and 6, 7
        [Tile(queries=slice(2, 4, None), keys=slice(0, 4, None), left=None, right=None, documents=None)]
    """
    if not layout.runs[q_rank] or not layout.runs[k_rank]:
        return []
    is_own = q_rank == k_rank
    has_window = mask.left is not None or mask.right not in (None, 0)
    if mask.documents is not None and is_own and not (has_window and len(layout.runs[q_rank]) > 1):
        # Tokens of a document lie side by side in a shard, in ascending order: one packed batch.
        size = layout.sizes[q_rank]
        return [Tile(slice(0, size), slice(0, size), mask.left, mask.right, _local_bounds(layout, q_rank, mask))]
    found: list[Tile] = []
    for document in _common_documents(layout, q_rank, k_rank, mask):
        rows, keys = (_pieces(layout, rank, document) for rank in (q_rank, k_rank))
        if has_window and not (is_own and len(rows) == 1):
            found += [tile for q in rows for k in keys for tile in _banded(q, k, mask)]
        elif is_own or mask.right is None:
            # Ascending order makes the shard's own diagonal that of the sequence.
            found.append(Tile(_span(rows), _span(keys), mask.left, mask.right))
        else:
            found += _earlier(rows, keys)
    return found


def _local_bounds(layout: Layout, rank: int, mask: Mask) -> tuple[int, ...]:
    """Where documents begin and end in a shard."""
    assert mask.documents is not None
    bounds = [0]
    for document in _common_documents(layout, rank, rank, mask):
        bounds.append(bounds[-1] + sum(len(piece.tokens) for piece in _pieces(layout, rank, document)))
    return tuple(bounds)


def _common_documents(layout: Layout, q_rank: int, k_rank: int, mask: Mask) -> list[range]:
    """Documents with tokens in both shards, ascending."""
    if mask.documents is None:
        return [range(layout.seqlen)]
    common = _documents_of(layout.runs[q_rank], mask.documents) & _documents_of(layout.runs[k_rank], mask.documents)
    return [range(mask.documents[n], mask.documents[n + 1]) for n in sorted(common)]


def _documents_of(runs: Sequence[range], bounds: tuple[int, ...]) -> set[int]:
    """Numbers of the documents that runs touch."""
    touched: set[int] = set()
    for run in runs:
        first, last = (bisect_right(bounds, token) - 1 for token in (run.start, run.stop - 1))
        touched.update(n for n in range(first, last + 1) if bounds[n] < bounds[n + 1])
    return touched


def _pieces(layout: Layout, rank: int, document: range) -> list[_Piece]:
    """The tokens of a document that a shard holds."""
    pieces = []
    for run, where in zip(layout.runs[rank], layout.slices(rank), strict=True):
        start, stop = max(run.start, document.start), min(run.stop, document.stop)
        if start < stop:
            pieces.append(_Piece(range(start, stop), where.start + start - run.start))
    return pieces


def _span(pieces: Sequence[_Piece]) -> slice:
    """Pieces of one document lie side by side in a shard."""
    last = pieces[-1]
    return slice(pieces[0].offset, last.offset + len(last.tokens))


def _earlier(rows: Sequence[_Piece], keys: Sequence[_Piece]) -> list[Tile]:
    """Causal, between shards: each piece of queries sees all keys of the pieces before it, and none of the others."""

    def pieces_before(row: _Piece) -> int:
        return sum(key.tokens.stop <= row.tokens.start for key in keys)

    return [Tile(_span(list(group)), _span(keys[:count])) for count, group in groupby(rows, key=pieces_before) if count]


def _banded(q: _Piece, k: _Piece, mask: Mask) -> list[Tile]:
    """What a window leaves of a pair of pieces: rows and keys without any pair are cut off."""
    first, last = q.tokens.start, q.tokens.stop
    start, stop = k.tokens.start, k.tokens.stop
    if mask.left is not None:
        last = min(last, stop + mask.left)
    if mask.right is not None:
        first = max(first, start - mask.right)
    if mask.left is not None:
        start = max(start, first - mask.left)
    if mask.right is not None:
        stop = min(stop, last + mask.right)
    if first >= last or start >= stop:
        return []
    left = None if mask.left is None else mask.left + start - first
    right = None if mask.right is None else mask.right + first - start
    # A side that hides nothing of the rectangle is left open: kernels are faster without it.
    left = None if left is not None and left >= last - first - 1 else left
    right = None if right is not None and right >= stop - start - 1 else right
    return [Tile(q.cut(first, last), k.cut(start, stop), left, right)]


def checked_documents(cu_seqlens: Sequence[int], seqlen: int) -> tuple[int, ...]:
    """Boundaries of documents as a tuple.

    Args:
        cu_seqlens: ascending, from 0 to N.
        seqlen: N.

    Raises:
        ValueError: they do not ascend from 0 to N.
    """
    bounds = tuple(int(n) for n in cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != seqlen or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must ascend from 0 to the tokens of the whole sequence, {seqlen}, got {list(bounds[:8])} …"
        )
    return bounds
