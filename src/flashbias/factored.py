"""`FactoredBias`: the one data type that passes between the rooms of the library."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flashbias.constants import on_device

__all__ = ["FactoredBias", "broadcast_shapes", "relative_lookup", "without_autocast"]


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """As `torch.broadcast_shapes`, without its cost where all are the same, which is once in every call."""
    return shapes[0] if all(shape == shapes[0] for shape in shapes[1:]) else torch.broadcast_shapes(*shapes)


def relative_lookup(table: Tensor, code_q: Tensor, code_k: Tensor) -> Tensor:
    """Look a relative table up for every pair of codes.

    Formula: `out[h, i, j] = table[h, clip(code_k[j] - code_q[i], -(T//2), T//2) + T//2]`.

    Args:
        table: `[H or 1, T]`, T odd; the middle entry belongs to a code difference of zero.
        code_q: `[N]` integers.
        code_k: `[M]` integers.

    Returns:
        `[H or 1, N, M]`, differentiable with respect to `table`.
    """
    half = table.shape[-1] // 2
    difference = code_k.to(torch.int64)[None, :] - code_q.to(torch.int64)[:, None]
    return table[:, difference.clamp(-half, half) + half]


@dataclass(frozen=True, eq=False)
class FactoredBias:
    """An additive attention bias that is never stored as a matrix.

    The bias of head h between query i and key j is

        b[i, j] = sum_r phi_q[i, r] * phi_k[j, r]  (+ table[h, clip(code_k[j] - code_q[i])])

    It is added to the scaled scores. Leading dimensions broadcast against those of the queries, so a
    factor that is shared by a batch or by all heads is stored once.

    Args:
        phi_q: `[*batch, H or 1, N, R]`, the query-side factor, floating point. Never scaled by the user.
        phi_k: `[*batch, H or 1, M, R]`, the key-side factor.
        table: `[H or 1, T]` with T odd, optional: an exact relative table with constant tails.
        code_q: `[N]` integers, optional; default the positions `0 … N-1`. Below 2^30 in size, as those of keys: kernels
            subtract them in 32 bits, and nothing waits for the GPU to look at them.
        code_k: `[M]` integers, optional; default the positions `0 … M-1`.
        ranks: one integer per head, optional: columns at and beyond `ranks[h]` are padding and are never
            read for head h.
        report: how the factors were found and what they promise, optional; whoever made them puts it here. It is
            carried along by slicing and moves, and by nothing else.

    Raises:
        TypeError: a factor or the table is not a floating point tensor, or codes or ranks are not integers.
        ValueError: ranks, lengths, heads or devices do not fit together; an even table; codes of the
            wrong length.

    Note:
        Rank 0 (`R == 0`) is allowed together with a table: then the table is the whole bias.

    Examples:
        >>> import torch, flashbias as fb
        >>> j = torch.arange(4.0)
        >>> bias = fb.FactoredBias(torch.full((1, 4, 1), 0.5), j.reshape(1, 4, 1))
        >>> bias.dense()[0, 0]
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
        >>> (bias + bias).rank
        2
    """

    phi_q: Tensor
    phi_k: Tensor
    table: Tensor | None = None
    code_q: Tensor | None = None
    code_k: Tensor | None = None
    ranks: Sequence[int] | None = None
    report: Any = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading a value."""
        _check_factors(self.phi_q, self.phi_k)
        _check_table(self.table, self.code_q, self.code_k, self.seqlen_q, self.seqlen_k, self.phi_q.device)
        if self.rank == 0 and self.table is None:
            raise ValueError("phi_q has rank 0 and table is None: give factors of rank >= 1, or a table")
        if self.table is not None:
            _broadcast_heads(self.phi_q.shape[-3], self.phi_k.shape[-3], self.table.shape[0])
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _checked_ranks(self.ranks, self.rank, self.num_heads))

    # ---------------------------------------------------------------- constructors

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        seqlen_q: int,
        seqlen_k: int,
        code_q: Tensor | None = None,
        code_k: Tensor | None = None,
    ) -> FactoredBias:
        """Make a bias that is a relative table and nothing else (rank 0).

        Args:
            table: `[H or 1, T]`, T odd.
            seqlen_q: N.
            seqlen_k: M.
            code_q: `[N]` integers; default positions.
            code_k: `[M]` integers; default positions.

        Returns:
            A bias with factors of rank 0.

        Raises:
            TypeError: as the class.
            ValueError: as the class.

        Examples:
            >>> import torch, flashbias as fb
            >>> fb.FactoredBias.from_table(torch.tensor([[-1.0, 0.0, 5.0]]), 2, 3).dense()[0]
            tensor([[ 0.,  5.,  5.],
                    [-1.,  0.,  5.]])
        """
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"table must be a floating point tensor, got {_describe(table)}")
        if table.dim() != 2:
            raise ValueError(f"table must be a [H or 1, T] tensor, got {_describe(table)}")
        return cls(table.new_zeros(1, seqlen_q, 0), table.new_zeros(1, seqlen_k, 0), table, code_q, code_k)

    # ---------------------------------------------------------------- what it is

    @property
    def rank(self) -> int:
        """Width of the factors, R."""
        return self.phi_q.shape[-1]

    @property
    def seqlen_q(self) -> int:
        """Number of queries, N."""
        return self.phi_q.shape[-2]

    @property
    def seqlen_k(self) -> int:
        """Number of keys, M."""
        return self.phi_k.shape[-2]

    @property
    def num_heads(self) -> int:
        """Number of heads that the bias tells apart; 1 if it is shared by all heads."""
        table_heads = 1 if self.table is None else self.table.shape[0]
        return max(self.phi_q.shape[-3], self.phi_k.shape[-3], table_heads)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading batch dimensions, broadcast over both factors."""
        return broadcast_shapes(self.phi_q.shape[:-3], self.phi_k.shape[:-3])

    @property
    def shape(self) -> torch.Size:
        """Shape `[*batch, H or 1, N, M]` of the matrix that is never stored."""
        return torch.Size((*self.batch_shape, self.num_heads, self.seqlen_q, self.seqlen_k))

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.phi_q.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors, the table and the codes."""
        return sum(t.numel() * t.element_size() for t in self._tensors() if t is not None)

    @property
    def requires_grad(self) -> bool:
        """Whether a factor or the table needs a gradient."""
        return any(t is not None and t.requires_grad for t in (self.phi_q, self.phi_k, self.table))

    def codes(self, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
        """Return `(code_q, code_k)` as integers of `dtype`, filling in positions where none were given."""

        def fill(code: Tensor | None, length: int) -> Tensor:
            if code is None:
                return torch.arange(length, dtype=dtype, device=self.device)
            return code.to(dtype)

        return fill(self.code_q, self.seqlen_q), fill(self.code_k, self.seqlen_k)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Form the N×M matrix. For tests and small sizes only: memory is quadratic.

        `torch.autocast` does not change it: half-precision positions would be off by whole tokens.

        Args:
            dtype: dtype to compute and return; default the widest of the factors and the table.

        Returns:
            `[*batch, H or 1, N, M]`, differentiable.
        """
        held = [self.phi_q, self.phi_k] if self.table is None else [self.phi_q, self.phi_k, self.table]
        dtype = dtype or reduce(torch.promote_types, (x.dtype for x in held))
        clean = self.without_ranks()
        with without_autocast(self.device):
            out = clean.phi_q.to(dtype) @ clean.phi_k.to(dtype).mT
        if self.table is not None:
            out = out + relative_lookup(self.table.to(dtype), *self.codes())
        return out.expand(self.shape)

    def rank_mask(self) -> Tensor:
        """Return `[H, R]` booleans, True where a head has a column of its own (needs `ranks`)."""
        if self.ranks is None:
            raise ValueError("ranks is None: every head has all columns")
        ranks = on_device(tuple(self.ranks), self.device)
        return torch.arange(self.rank, device=self.device)[None, :] < ranks[:, None]

    def check_finite(self) -> FactoredBias:
        """Raise if a factor or the table holds NaN or an infinity. Reads every value (and synchronises a GPU).

        Returns:
            The bias itself, so that the call can be chained.

        Raises:
            ValueError: naming the offending tensor and how many of its values are not finite.
        """
        for name in ("phi_q", "phi_k", "table"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(f"{name} has {bad} non-finite values of {tensor.numel()}; all must be finite")
        return self

    # ---------------------------------------------------------------- what can be done with it

    def slice(self, queries: slice = slice(None), keys: slice = slice(None)) -> FactoredBias:
        """Restrict to a range of queries and of keys; codes keep their absolute values.

        Args:
            queries: slice of `0 … N-1`, of step 1.
            keys: slice of `0 … M-1`, of step 1.

        Returns:
            The bias of that block; its `dense()` equals the block of `dense()`.
        """
        code_q, code_k = self.codes() if self.table is not None else (None, None)
        return replace(
            self,
            phi_q=self.phi_q[..., queries, :],
            phi_k=self.phi_k[..., keys, :],
            code_q=None if code_q is None else code_q[queries],
            code_k=None if code_k is None else code_k[keys],
        )

    def __getitem__(self, index: tuple[slice, slice]) -> FactoredBias:
        """`bias[a:b, c:d]`: the block of queries a … b-1 and keys c … d-1."""
        if not (isinstance(index, tuple) and len(index) == 2 and all(isinstance(i, slice) for i in index)):
            raise TypeError(f"index must be two slices, as in bias[a:b, c:d], got {index!r}")
        return self.slice(*index)

    def __add__(self, other: FactoredBias) -> FactoredBias:
        """Sum of two biases: ranks add, relative tables with the same codes are added entry by entry."""
        if not isinstance(other, FactoredBias):
            return NotImplemented
        if (self.seqlen_q, self.seqlen_k) != (other.seqlen_q, other.seqlen_k):
            raise ValueError(
                f"cannot add biases of {self.seqlen_q}x{self.seqlen_k} and {other.seqlen_q}x{other.seqlen_k}"
            )
        left, right = self.without_ranks(), other.without_ranks()
        table, code_q, code_k = _add_tables(left, right)
        return FactoredBias(
            _concatenate(left.phi_q, right.phi_q),
            _concatenate(left.phi_k, right.phi_k),
            table,
            code_q,
            code_k,
        )

    def without_ranks(self) -> FactoredBias:
        """The same bias with zeros in padding columns and no `ranks`, for what knows one rank for all heads.

        Returns:
            A `FactoredBias` of the same rank R; this one where it has no `ranks`. Gradients of padding are zero.

        Examples:
            >>> import torch, flashbias as fb
            >>> bias = fb.FactoredBias(torch.ones(2, 4, 3), torch.ones(2, 4, 3), ranks=[3, 1])
            >>> bias.without_ranks().phi_k[1, 0]
            tensor([1., 0., 0.])
        """
        if self.ranks is None:
            return self
        padding = ~self.rank_mask()[:, None, :]
        phi_q, phi_k = (phi.masked_fill(padding, 0.0) for phi in (self.phi_q, self.phi_k))
        return replace(self, phi_q=phi_q, phi_k=phi_k, ranks=None)

    def to(self, *args: Any, **kwargs: Any) -> FactoredBias:
        """Move or cast like `Tensor.to`; codes move but stay integers."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]  # pyright: ignore[reportAttributeAccessIssue]
        return replace(
            self,
            phi_q=self.phi_q.to(*args, **kwargs),
            phi_k=self.phi_k.to(*args, **kwargs),
            table=None if self.table is None else self.table.to(*args, **kwargs),
            code_q=None if self.code_q is None else self.code_q.to(device=device),
            code_k=None if self.code_k is None else self.code_k.to(device=device),
        )

    def detach(self) -> FactoredBias:
        """The same values, cut from the autograd graph."""
        return replace(
            self,
            phi_q=self.phi_q.detach(),
            phi_k=self.phi_k.detach(),
            table=None if self.table is None else self.table.detach(),
        )

    def __repr__(self) -> str:
        """Shapes and dtypes, never values."""
        parts = [f"shape={tuple(self.shape)}", f"rank={self.rank}"]
        if self.ranks is not None:
            parts.append(f"ranks={tuple(self.ranks)}")
        if self.table is not None:
            parts.append(f"table={tuple(self.table.shape)}")
        parts += [f"dtype={self.phi_q.dtype}", f"device={self.device}"]
        return f"FactoredBias({', '.join(parts)})"

    # ---------------------------------------------------------------- private

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.phi_q, self.phi_k, self.table, self.code_q, self.code_k


# -------------------------------------------------------------------- checks


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands, also inside of `torch.autocast`."""
    if not torch.amp.is_autocast_available(device.type):  # pyright: ignore[reportAttributeAccessIssue]
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _describe(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(type(value))


def _check_factors(phi_q: Tensor, phi_k: Tensor) -> None:
    for name, phi, length in (("phi_q", phi_q, "N"), ("phi_k", phi_k, "M")):
        if not isinstance(phi, Tensor) or not phi.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {_describe(phi)}")
        if phi.dim() < 3:
            raise ValueError(f"{name} must be [*batch, H or 1, {length}, R], got shape {tuple(phi.shape)}")
    if phi_q.shape[-1] != phi_k.shape[-1]:
        raise ValueError(f"phi_q and phi_k must have the same rank, got {phi_q.shape[-1]} and {phi_k.shape[-1]}")
    if phi_q.device != phi_k.device:
        raise ValueError(f"phi_q is on {phi_q.device} and phi_k on {phi_k.device}; both must be on one device")
    _broadcast_heads(phi_q.shape[-3], phi_k.shape[-3])
    try:
        broadcast_shapes(phi_q.shape[:-3], phi_k.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"batch dimensions of phi_q {tuple(phi_q.shape[:-3])} and phi_k {tuple(phi_k.shape[:-3])} "
            "do not broadcast: each must be equal or 1"
        ) from None


def _broadcast_heads(*heads: int) -> int:
    wide = {h for h in heads if h != 1}
    if len(wide) > 1:
        raise ValueError(f"head dimensions of phi_q, phi_k and table are {heads}; each must be H or 1")
    return wide.pop() if wide else 1


def _check_table(
    table: Tensor | None,
    code_q: Tensor | None,
    code_k: Tensor | None,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> None:
    if table is None:
        if code_q is not None or code_k is not None:
            raise ValueError("code_q and code_k need a table, got table=None")
        return
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"table must be a floating point tensor, got {_describe(table)}")
    if table.dim() != 2 or table.shape[1] % 2 == 0:
        raise ValueError(f"table must be [H or 1, T] with T odd, got shape {tuple(table.shape)}")
    if table.device != device:
        raise ValueError(f"table is on {table.device} and phi_q on {device}; both must be on one device")
    for name, code, length in (("code_q", code_q, seqlen_q), ("code_k", code_k, seqlen_k)):
        if code is None:
            continue
        if not isinstance(code, Tensor) or code.dtype.is_floating_point or code.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {_describe(code)}")
        if code.dim() != 1 or code.shape[0] != length:
            raise ValueError(f"{name} must have shape ({length},), got {tuple(code.shape)}")
        if code.device != device:
            raise ValueError(f"{name} is on {code.device} and phi_q on {device}; both must be on one device")


def _checked_ranks(ranks: Sequence[int] | Tensor, rank: int, num_heads: int) -> tuple[int, ...]:
    try:
        values = tuple(index(r) for r in (ranks.tolist() if isinstance(ranks, Tensor) else ranks))
    except TypeError:
        raise TypeError(f"ranks must be integers, one per head, got {ranks!r}") from None
    if len(values) != num_heads:
        raise ValueError(f"ranks must have one entry for each of {num_heads} heads, got {len(values)}")
    if any(r < 0 or r > rank for r in values):
        raise ValueError(f"ranks must lie in 0 … {rank} (the width of phi_q), got {values}")
    return values


# -------------------------------------------------------------------- addition


def _concatenate(left: Tensor, right: Tensor) -> Tensor:
    """Put two factors side by side in the rank dimension, broadcasting what stands before it."""
    if left.shape[-1] == 0:
        return right
    if right.shape[-1] == 0:
        return left
    lead = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    return torch.cat([left.expand(*lead, -1), right.expand(*lead, -1)], dim=-1)


def _same_codes(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left is right or torch.equal(left, right)


def _add_tables(left: FactoredBias, right: FactoredBias) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if left.table is None or right.table is None:
        holder = right if left.table is None else left
        return holder.table, holder.code_q, holder.code_k
    if not (_same_codes(left.code_q, right.code_q) and _same_codes(left.code_k, right.code_k)):
        raise ValueError("cannot add two biases whose tables are read with different codes; factor one of them")
    width = max(left.table.shape[1], right.table.shape[1])
    return _widen(left.table, width) + _widen(right.table, width), left.code_q, left.code_k


def _widen(table: Tensor, width: int) -> Tensor:
    """Repeat the constant tails until the table has `width` entries."""
    half, target = table.shape[1] // 2, width // 2
    index = torch.arange(-target, target + 1, device=table.device).clamp(-half, half) + half
    return table[:, index]


# -------------------------------------------------------------------- pytree


def _flatten(bias: FactoredBias) -> tuple[list[Tensor | None], tuple[int, ...] | None]:
    ranks = None if bias.ranks is None else tuple(bias.ranks)
    return [bias.phi_q, bias.phi_k, bias.table, bias.code_q, bias.code_k], ranks


def _unflatten(children: Any, ranks: tuple[int, ...] | None) -> FactoredBias:
    """Rebuild without checks: a transform may have put placeholders into the leaves."""
    bias = object.__new__(FactoredBias)
    for name, child in zip(("phi_q", "phi_k", "table", "code_q", "code_k"), children, strict=True):
        object.__setattr__(bias, name, child)
    object.__setattr__(bias, "ranks", ranks)
    object.__setattr__(bias, "report", None)
    return bias


def _flatten_with_keys(bias: FactoredBias) -> tuple[list[tuple[Any, Tensor | None]], tuple[int, ...] | None]:
    leaves, ranks = _flatten(bias)
    names = ("phi_q", "phi_k", "table", "code_q", "code_k")
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], ranks


pytree.register_pytree_node(
    FactoredBias,
    _flatten,
    _unflatten,
    serialized_type_name="flashbias.FactoredBias",
    flatten_with_keys_fn=_flatten_with_keys,
)
