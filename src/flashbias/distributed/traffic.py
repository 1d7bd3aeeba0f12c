"""Bytes between ranks: what was sent, and what must be sent.

Per rank, with P ranks, n tokens each, e bytes per element of keys, h_kv key heads of width d (values d_v), factors of
width R held by h_phi heads in e_phi bytes, gradients travelling in e_g = 4 bytes (8 beside float64):

    ring, forward     (P - 1) n (h_kv (d + d_v) e + h_phi R e_phi)
    ring, backward    the same again, and P n (h_kv (d + d_v) + h_phi R) e_g for what travels home
    all-to-all        (P - 1) / P of the bytes that a rank holds of each tensor

So factors add `h_phi R e_phi / (h_kv (d + d_v) e)` to a ring: R / (2 head_dim) where each head has its own in the keys'
dtype, and 1 / H of that where all heads share phi_k, as ALiBi's do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["RingBytes", "Traffic", "count_traffic", "record"]

ALIGNMENT = 16
"""Where a tensor begins within a message, so that kernels read it as they would its own memory."""


@dataclass
class Traffic:
    """Bytes that this process has sent, by what they were sent for.

    Attributes:
        sent: bytes for each purpose: "keys" and "gradients" of a ring, "to heads" and "to tokens" of an
            all-to-all, "table gradient", "agreement".
        messages: messages for each purpose.
    """

    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All bytes sent."""
        return sum(self.sent.values())


# Not a context variable: backward passes run in threads of their own.
_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes that context-parallel attention sends from this process.

    Examples:
        >>> import flashbias.distributed as cp
        >>> with cp.count_traffic() as traffic:
        ...     pass
        >>> traffic.total
        0
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def record(purpose: str, nbytes: int) -> None:
    """Add a message to every count that is open."""
    for traffic in _counting:
        traffic.sent[purpose] += nbytes
        traffic.messages[purpose] += 1


@dataclass(frozen=True)
class RingBytes:
    """What a ring must send, from its shapes.

    Args:
        cp_size: P.
        tokens: n, of each rank.
        num_kv_heads: key heads, times batch elements.
        head_dim: d.
        head_dim_v: d_v.
        element: bytes per element of keys and values.
        rank: R, width of the factors; 0 without.
        factor_heads: heads that phi_k has, times its batch elements.
        factor_element: bytes per element of phi_k.
        gradient_element: bytes per element of a gradient on its way home.

    Examples:
        >>> ring = RingBytes(cp_size=2, tokens=1024, num_kv_heads=8, head_dim=128, head_dim_v=128, element=2,
        ...                  rank=16, factor_heads=8, factor_element=2)
        >>> ring.overhead == 16 / (2 * 128)
        True
    """

    cp_size: int
    tokens: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    element: int
    rank: int = 0
    factor_heads: int = 1
    factor_element: int = 4
    gradient_element: int = 4

    @property
    def keys(self) -> int:
        """Bytes of one rank's keys and values, without factors."""
        return self.tokens * self.num_kv_heads * (self.head_dim + self.head_dim_v) * self.element

    @property
    def factors(self) -> int:
        """Bytes of one rank's phi_k."""
        return self.tokens * self.factor_heads * self.rank * self.factor_element

    @property
    def gradients(self) -> int:
        """Bytes of one rank's dk and dv, and of dphi_k where it is learned."""
        width = self.num_kv_heads * (self.head_dim + self.head_dim_v) + self.factor_heads * self.rank
        return self.tokens * width * self.gradient_element

    @property
    def forward(self) -> int:
        """Bytes that a rank sends in a forward pass."""
        return (self.cp_size - 1) * (self.keys + self.factors)

    @property
    def backward(self) -> int:
        """Bytes that a rank sends in a backward pass, phi_k learned."""
        return self.forward + (self.cp_size * self.gradients if self.cp_size > 1 else 0)

    @property
    def overhead(self) -> float:
        """What factors add to the forward pass of a ring without a bias, as a share of it."""
        return self.factors / self.keys
