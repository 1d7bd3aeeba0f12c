"""How a tensor with broadcast leading dimensions is addressed by the flat (batch, head) index of a kernel.

Leading dimensions `[*batch, H]` of the queries, merged where neighbours behave alike, alternate between those in
which a factor varies (V) and those over which it is shared (S): V1 S1 V2 S2. With flat index bh and own index f,

    bh = ((v1 * S1 + s1) * V2 + v2) * S2 + s2,      f = v1 * V2 + v2,      member = s1 * S2 + s2.

So three integers address any such factor without an expanded copy, and walk over all (batch, head) that share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Sharing", "cdiv", "common", "flatten_heads", "next_power_of_2", "share", "storable"]


@dataclass(frozen=True)
class Sharing:
    """Sizes of the levels V1, S1, V2, S2 of the module's formula."""

    v1: int
    s1: int
    v2: int
    s2: int

    @property
    def groups(self) -> int:
        """How many different factors there are."""
        return self.v1 * self.v2

    @property
    def members(self) -> int:
        """How many (batch, head) pairs share each of them."""
        return self.s1 * self.s2

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What a kernel needs: S1, V2, S2."""
        return self.s1, self.v2, self.s2

    def parts(self, wanted: int) -> tuple[int, int]:
        """Cut the members into at most `wanted` parts, none of them empty.

        Args:
            wanted: parts, at least 1.

        Returns:
            How many parts there are, and how many members each of them has, but for the last, which may have fewer.

        Examples:
            >>> Sharing(1, 9, 1, 1).parts(8)  # of two members, so that five are enough
            (5, 2)
        """
        each = cdiv(self.members, wanted)
        return cdiv(self.members, each), each

    @classmethod
    def nothing(cls, count: int) -> Sharing:
        """Every one of `count` pairs has its own."""
        return cls(count, 1, 1, 1)


def share(full: tuple[int, ...], own: tuple[int, ...]) -> Sharing | None:
    """Work out the levels of a factor with leading sizes `own` among queries with leading sizes `full`.

    Args:
        full: `(*batch, H)` of the queries.
        own: leading sizes of the factor, each equal or 1, possibly fewer.

    Returns:
        The levels, or None if there are more than four (a factor that alternates three times).

    Examples:
        >>> share((8, 64, 4), (1, 64, 4))  # windows of 8 images
        Sharing(v1=1, s1=8, v2=256, s2=1)
    """
    own = (1,) * (len(full) - len(own)) + tuple(own)
    levels: list[tuple[bool, int]] = []  # (shared, size)
    for size, mine in zip(full, own, strict=True):
        if size == 1:
            continue
        shared = mine == 1
        if levels and levels[-1][0] == shared:
            levels[-1] = (shared, levels[-1][1] * size)
        else:
            levels.append((shared, size))
    if levels and levels[0][0]:
        levels.insert(0, (False, 1))
    if len(levels) > 4:
        return None
    sizes = [size for _, size in levels] + [1] * (4 - len(levels))
    return Sharing(*sizes)


def common(parts: Iterable[Sharing], pairs: int, num_heads: int) -> Sharing | None:
    """Which (batch, head) pairs share several tensors at once, apart for each head.

    Members of the result are equally far from each other in memory: s2 is 1, and v2 a multiple of the heads.

    Args:
        parts: how each tensor is shared.
        pairs: how many (batch, head) pairs there are.
        num_heads: H.

    Returns:
        The levels; None if the tensors are shared in different ways.

    Examples:
        >>> common([share((8, 64, 4), (1, 64, 1)), share((8, 64, 4), (1, 1, 1))], 2048, 4)
        Sharing(v1=1, s1=8, v2=256, s2=1)
    """
    varying = {part for part in parts if part.groups > 1}
    if len(varying) > 1:
        return None
    sharing = next(iter(varying), Sharing(1, pairs, 1, 1))
    if sharing.members == 1:
        return sharing
    if sharing.v2 * sharing.s2 == 1:
        return Sharing(sharing.v1, sharing.s1 // num_heads, num_heads, 1)
    return Sharing(sharing.v1, sharing.s1, sharing.v2 * sharing.s2, 1)


def storable(x: Tensor, full: tuple[int, ...], trailing: int = 2) -> Tensor:
    """Expand the first shared dimension of a factor until four levels describe it (almost always none).

    Args:
        x: tensor `[*own, …]` with `trailing` dimensions after the leading ones.
        full: leading sizes of the queries.
        trailing: dimensions that do not lead.

    Returns:
        x, or an expanded view of it; autograd sums the gradient back.
    """
    x = x.reshape(*(1,) * (len(full) - (x.dim() - trailing)), *x.shape)
    while share(full, tuple(x.shape[: len(full)])) is None:
        first = next(d for d, size in enumerate(full) if size > 1 and x.shape[d] == 1)
        x = x.expand(*(full[d] if d == first else -1 for d in range(x.dim())))
    return x


def flatten_heads(x: Tensor, trailing: int = 2) -> Tensor:
    """Merge all leading dimensions: `[*own, N, R]` to `[groups, N, R]`; a view where strides allow it."""
    return x.reshape(math.prod(x.shape[: x.dim() - trailing]), *x.shape[x.dim() - trailing :])


# Triton has both, as functions for kernels too, which take twenty times as long on the host.


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up: tiles of b that cover a."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 or more."""
    return 1 << max(n - 1, 0).bit_length()
