"""`BlockFunction`: a bias that is a function of two coordinates, asked for blocks that are thin or small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["CALL_ENTRIES", "BlockFunction"]

CALL_ENTRIES = 1 << 22
"""Most entries, all heads together, that one call is asked for (or one row or column, where that is more)."""


class BlockFunction:
    """`b[h, i, j] = f(x[i], y[j])[h]`: called in pieces, checked, counted.

    Args:
        f: as `compress_function` takes it.
        x: `[N, D]`, coordinates of queries.
        y: `[M, D']`, coordinates of keys, on the same device; the same object as `x` if they are the queries.
        num_heads: H.
        progress: called as `progress(done, total, text)`, or None.

    Attributes:
        same: whether queries and keys are the same points.
        evaluations: pairs of coordinates that `f` was asked for.

    Raises:
        TypeError: `f` cannot be called, or coordinates are no real numbers.
        ValueError: coordinates of a wrong shape, on two devices, or not finite.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        num_heads: int,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        if not callable(f):
            raise TypeError(f"f must be a function of two tensors of coordinates, got {f!r}")
        _check_coordinates("q_coords", x)
        _check_coordinates("k_coords", y)
        if x.device != y.device:
            raise ValueError(f"q_coords is on {x.device} and k_coords on {y.device}; both must be on one device")
        self.same = y is x
        self.f, self.x, self.y, self.num_heads = f, x.detach(), y.detach(), num_heads
        self.progress = progress or (lambda done, total, text: None)
        self.evaluations = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(H, N, M)`."""
        return self.num_heads, len(self.x), len(self.y)

    @property
    def device(self) -> torch.device:
        """Where the coordinates are."""
        return self.x.device

    def pieces(self, length: int, width: int, text: str) -> Iterator[slice]:
        """Cut `length` so that a piece of that `width` is as much as one call is asked for, and report progress."""
        step = max(1, CALL_ENTRIES // (max(width, 1) * self.num_heads))
        for start in range(0, length, step):
            self.progress(start, length, text)
            yield slice(start, min(start + step, length))

    def block(self, rows: Tensor, columns: Tensor, text: str) -> Tensor:
        """`[H, rows, columns]`: where the given rows and columns cross."""
        y = self.y[columns]
        return torch.cat([self(self.x[rows[piece]], y) for piece in self.pieces(len(rows), len(columns), text)], dim=1)

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One call: `[H, n, m]`, float64 if that is what `f` returns, else float32.

        Raises:
            TypeError: `f` returned no floating point tensor.
            ValueError: `f` returned another shape, or values that are not finite in float32.
        """
        values = self.f(x, y)
        self.evaluations += len(x) * len(y)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"f must return a floating point tensor, got {kind}")
        shape = self.num_heads, len(x), len(y)
        if tuple(values.shape) not in ((shape, shape[1:]) if self.num_heads == 1 else (shape,)):
            raise ValueError(
                f"f must return shape {shape if self.num_heads > 1 else shape[1:]} for coordinates {tuple(x.shape)}, "
                f"{tuple(y.shape)} (num_heads={self.num_heads}), got {tuple(values.shape)}"
            )
        bad = int((~values.float().isfinite()).sum())
        if bad:
            raise ValueError(f"f must return values that are finite in float32, got {bad} of {values.numel()} not")
        return values.reshape(shape).to(torch.promote_types(values.dtype, torch.float32))


def _check_coordinates(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_complex() or x.dtype == torch.bool:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be [length, dimensions], both at least 1, got shape {tuple(x.shape)}")
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {x.numel()} values that are not")
