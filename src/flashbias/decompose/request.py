"""`Request`: what `compress` was asked for, checked, and head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.decompose.bound import check_tol
from flashbias.decompose.fit import Head
from flashbias.decompose.relative import Codes, codes_of_positions

__all__ = ["FACTOR_DTYPES", "Request"]

FACTOR_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that factors may have, exact first: float32 costs three to six products, bfloat16 one."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a bias may have."""


@dataclass(frozen=True, eq=False)
class Request:
    """Checked arguments. Batch and heads are one dimension; what broadcasts is expanded, not copied.

    Args:
        bias: `[B, N, M]`.
        shape: of the bias as it was given, with a head dimension.
        tol: bound on the output's change.
        mask: booleans `[B, N, M]`, or None.
        weights: `[B, N, M]`, or None.
        calibrated: whether the promise is for the weights only.
        max_rank: largest rank of a head.
        table: "auto", "exact", a half width or None.
        dtypes: of factors, in the order in which they are tried.
        seed: of the random starts.
    """

    bias: Tensor
    shape: torch.Size
    tol: float
    mask: Tensor | None
    weights: Tensor | None
    calibrated: bool
    max_rank: int
    table: str | int | None
    dtypes: tuple[torch.dtype, ...]
    seed: int

    @classmethod
    def checked(
        cls,
        bias: Tensor,
        tol: float,
        mask: Tensor | None,
        weights: Tensor | None,
        calibrated: bool,
        max_rank: int | None,
        table: str | int | None,
        factor_dtype: torch.dtype | None,
        seed: int,
    ) -> Request:
        """Check the arguments of `compress`, all but the entries of the bias."""
        shape = _checked_shape(bias)
        _check_mask(mask)
        _check_weights(weights, calibrated)
        _check_table(table, shape)
        if max_rank is not None and (not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1):
            raise ValueError(f"max_rank must be None or an integer >= 1, got {max_rank!r}")
        if factor_dtype not in (None, *FACTOR_DTYPES):
            raise ValueError(f"factor_dtype must be None, torch.float32 or torch.bfloat16, got {factor_dtype!r}")
        return cls(
            bias=bias.detach().reshape(-1, *shape[-2:]),
            shape=shape,
            tol=check_tol(tol),
            mask=_expanded("mask", mask, shape),
            weights=_expanded("weights", weights, shape),
            calibrated=calibrated,
            max_rank=min(*shape[-2:], max_rank or max(shape)),
            table=table,
            dtypes=FACTOR_DTYPES if factor_dtype is None else (factor_dtype,),
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.bias)

    @property
    def num_heads(self) -> int:
        """Number of heads, H."""
        return self.shape[-3]

    @property
    def biases(self) -> int:
        """How many biases a batch has, for each head."""
        return math.prod(self.shape[:-3])

    @property
    def near_width(self) -> int | None:
        """Half width of the near field that was asked for."""
        return self.table if isinstance(self.table, int) else None

    def head(self, index: int) -> Head:
        """The bias of one head, its entries checked."""
        b = self.bias[index]
        mask = None if self.mask is None else self.mask[index]
        weights = None if self.weights is None else self.weights[index]
        read = b if mask is None else b.masked_fill(~mask, 0.0)
        if not _is_finite(read):
            bad = ~torch.isfinite(read.to(torch.float32))
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"bias has {int(bad.sum())} entries of head {index} that are not finite in float32, the first at "
                f"{where}: {float(b[where])}; all that are read must be finite (hide the others with mask)"
            )
        if mask is not None and bool(mask.all()):
            mask = None
        return Head(read, self.tol, mask, weights, self.calibrated, self.seed)

    def values(self, index: int) -> Tensor | None:
        """All entries of one head, hidden ones too; None if not all are finite."""
        b = self.bias[index]
        return b.to(torch.float64) if _is_finite(b) else None

    def places(self, positions: Tensor | tuple[Tensor, Tensor]) -> Codes:
        """Check the places that the caller gave, and number them."""
        pair = positions if isinstance(positions, tuple) else (positions, positions)
        if len(pair) != 2:
            raise ValueError(f"positions must be one tensor or two (of queries and of keys), got {len(pair)}")
        for name, places, length in zip(("queries", "keys"), pair, self.shape[-2:], strict=True):
            if not isinstance(places, Tensor) or places.is_floating_point() or places.dtype == torch.bool:
                found = getattr(places, "dtype", type(places))
                raise TypeError(f"positions of {name} must be an integer tensor, got {found}")
            if (
                places.dim() not in (1, 2)
                or len(places) != length
                or (places.dim() == 2 and not 1 <= places.shape[1] <= 3)
            ):
                raise ValueError(
                    f"positions of {name} must be [{length}] or [{length}, 1 to 3], got shape {tuple(places.shape)}"
                )
        dimensions = {1 if p.dim() == 1 else p.shape[1] for p in pair}
        if len(dimensions) > 1:
            raise ValueError(f"positions of queries and keys must have one number of dimensions, got {dimensions}")
        codes = codes_of_positions(*(p.to(self.bias.device) for p in pair))
        if self.near_width is not None and not codes.is_line:
            raise ValueError(f"table={self.table} is a near field along a line; positions have {dimensions} dimensions")
        return codes

    def line(self) -> Codes:
        """Queries and keys in order, from 0."""
        return codes_of_positions(*(torch.arange(n, device=self.bias.device) for n in self.shape[-2:]))


def _is_finite(b: Tensor) -> bool:
    """Whether all entries are, in float32, as which they are kept; NaN is passed on by both extremes."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(b)).to(torch.float32)).all())


def _checked_shape(bias: Tensor) -> torch.Size:
    if not isinstance(bias, Tensor) or bias.dtype not in DTYPES:
        found = bias.dtype if isinstance(bias, Tensor) else type(bias)
        raise TypeError(f"bias must be a tensor of {', '.join(map(_name, DTYPES))}, got {found}")
    if bias.is_meta:
        raise ValueError("bias must have values, got a tensor on the meta device")
    if bias.dim() < 2 or 0 in bias.shape:
        raise ValueError(
            f"bias must be [N, M] or [*batch, H, N, M] without an empty side, got shape {tuple(bias.shape)}"
        )
    return bias.shape if bias.dim() > 2 else torch.Size((1, *bias.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_mask(mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
    if not bool(mask.any()):
        raise ValueError("mask has no open entry (True), so there is nothing to fit")


def _check_weights(weights: Tensor | None, calibrated: bool) -> None:
    if weights is None:
        if calibrated:
            raise ValueError("calibrated=True needs weights, got None")
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights must be a floating point tensor, got {getattr(weights, 'dtype', type(weights))}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("weights must be finite and not negative")
    if not bool((weights > 0).any()):
        raise ValueError("weights are zero everywhere, so there is nothing to fit")


def _check_table(table: str | int | None, shape: torch.Size) -> None:
    if table is None or table in ("auto", "exact"):
        return
    if not isinstance(table, int) or isinstance(table, bool) or table < 1:
        raise ValueError(f"table must be 'auto', 'exact', None or a half width >= 1, got {table!r}")
    if table >= max(shape[-2:]) - 1:
        raise ValueError(f"table={table} must be less than {max(shape[-2:]) - 1} for a bias of shape {tuple(shape)}")
    if math.prod(shape[:-3]) > 1:
        raise ValueError(f"table={table}: one near field cannot serve the batch dimensions {tuple(shape[:-3])} of bias")


def _expanded(name: str, tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`[B, N, M]`."""
    if tensor is None:
        return None
    try:
        if tensor.dim() <= 2:
            return tensor.expand(shape[-2:]).expand(math.prod(shape[:-2]), -1, -1)
        return tensor.expand(shape).reshape(-1, *shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must broadcast to that of bias, {tuple(shape)}"
        ) from None
