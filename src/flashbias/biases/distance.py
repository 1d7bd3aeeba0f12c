"""FlashBias: Fast Computation of Attention with Bias.

https://arxiv.org/abs/2505.12044, section 3.2; the bias of geometric transformers (AlphaFold's point
attention, models of meshes and particles).

    b[h, i, j]  = -w[h, i] * ||x_i - y_j||^2
    phi_q[h, i] = w[h, i] * [2 x_i, -||x_i||^2, -1]       (columns in another order, see below)
    phi_k[j]    = [y_j, 1, ||y_j||^2]
    rank        = dim + 2
    exactness   : coordinates are centred on the keys first, which changes no distance and keeps the squares
                  small; then each factor is within a few roundings of float32.

The columns are interleaved: ||x_i||^2 after a quarter of the dimensions, ||y_j||^2 after three quarters.
For near pairs, which are those that matter, 2 x y and the squares cancel; in this order the partial sums of
the product stay near half a square, rather than climb to two of them, and so does their rounding.

P points in D dimensions per token are one point in P*D: the squared distances of the points add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashbias.biases.base import About, Bias, Example, query_weight, wide_dtype
from flashbias.factored import FactoredBias

__all__ = ["SquaredDistance"]


class SquaredDistance(Bias):
    """A penalty on the squared distance between the points of two tokens.

    Formula: `b[h, i, j] = -w[h, i] * ||x_i - y_j||^2`.

    Exact from coordinates, in `dim + 2` columns; gradients reach coordinates and weights. Factors are formed
    in float32 at least: half-precision coordinates are widened before they are squared.

    Args:
        num_heads: H.
        learned_weight: learn one positive weight per head, `softplus(raw_weight)`, beginning at 1. It
            multiplies a weight that is given in the call.

    Attributes:
        raw_weight: `[H]`, or None.

    Examples:
        >>> import torch, flashbias as fb
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> bias = fb.SquaredDistance(num_heads=1)(x, weight=2.0)
        >>> bias.rank, bias.dense()[0]
        (4, tensor([[  0., -50.],
                [-50.,   0.]]))

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, example 3.5.
    """

    about = About(
        title="FlashBias: Fast Computation of Attention with Bias",
        url="https://arxiv.org/abs/2505.12044",
        formula="-w_hi * ||x_i - y_j||^2",
        rank="dim + 2",
        exactness="each factor is within a few roundings of float32, about the keys' centre",
        bound=2.0**-21,
    )

    def __init__(self, num_heads: int, learned_weight: bool = False) -> None:
        super().__init__(num_heads)
        self.raw_weight = nn.Parameter(torch.empty(num_heads)) if learned_weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the learned weights to 1."""
        if self.raw_weight is not None:
            nn.init.constant_(self.raw_weight, math.log(math.e - 1.0))

    def forward(
        self,
        x_q: Tensor,
        x_k: Tensor | None = None,
        weight: Tensor | float | None = None,
        center: Tensor | None = None,
    ) -> FactoredBias:
        """Make the bias between two sets of points.

        Args:
            x_q: `[N, dim]` or `[*batch, H or 1, N, dim]`, the queries' points.
            x_k: `[M, dim]` or `[*batch, H or 1, M, dim]`, the keys' points; default those of the queries.
            weight: a number, `[H]`, or one per query, `[*batch, H or 1, N]`; default 1.
            center: `[dim]`, or anything that broadcasts against both sets: the origin to compute about.
                Default the mean of the keys. Factors that are made in several calls fit together only if
                all calls are given the same one (shards of a sequence, keys that arrive later).

        Returns:
            phi_q and phi_k of rank `dim + 2`, in float64 if an input is, else in float32.

        Raises:
            TypeError: coordinates or `center` are not floating point.
            ValueError: coordinates of different dimension, heads that are neither 1 nor `num_heads`, or a `center`
                that does not broadcast against both sets.
        """
        x_k = x_q if x_k is None else x_k
        self._check_points(x_q, x_k)
        dtype = wide_dtype(x_q, x_k, weight, self.raw_weight)
        weights = query_weight(weight, self.num_heads, x_q.shape[-2])
        weights = weights.to(dtype) if isinstance(weights, Tensor) else weights
        if self.raw_weight is not None:
            weights = weights * nn.functional.softplus(self.raw_weight.to(dtype))[:, None, None]
        x, y = _with_heads(x_q).to(dtype), _with_heads(x_k).to(dtype)
        center = _center(y, x) if center is None else _checked_center(center, y, x).to(dtype)
        x, y = x - center, y - center
        phi_q = weights * _interleave(2.0 * x, -_square(x), torch.full_like(x[..., :1], -1.0))
        return FactoredBias(phi_q, _interleave(y, torch.ones_like(y[..., :1]), _square(y)))

    def _check_points(self, x_q: Tensor, x_k: Tensor) -> None:
        for name, x in (("x_q", x_q), ("x_k", x_k)):
            if not x.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {x.dtype}")
            if x.dim() < 2 or (x.dim() > 2 and x.shape[-3] not in (1, self.num_heads)):
                raise ValueError(
                    f"{name} must be [length, dim] or [*batch, {self.num_heads} or 1, length, dim], "
                    f"got shape {tuple(x.shape)}"
                )
        if x_q.shape[-1] != x_k.shape[-1]:
            raise ValueError(f"x_q has {x_q.shape[-1]} dimensions and x_k {x_k.shape[-1]}; they must agree")

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, learned_weight={self.raw_weight is not None}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """A weight of each kind, points with and without batch and heads, far from the origin."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def dense(bias: SquaredDistance, x: Tensor, y: Tensor, weight: Tensor | float = 1.0) -> Tensor:
            x, y = _with_heads(x.double()), _with_heads(y.double())
            square = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
            if isinstance(weight, Tensor):
                weight = weight.double()
                weight = weight[:, None, None] if weight.dim() == 1 else weight[..., None]
            if bias.raw_weight is not None:
                weight = weight * nn.functional.softplus(bias.raw_weight.double())[:, None, None]
            return -weight * square

        def example(name: str, bias: SquaredDistance, *inputs: Tensor) -> Example:
            def build(bias: SquaredDistance, queries: range, keys: range, *inputs: Tensor) -> FactoredBias:
                x, y, *rest = inputs
                weight = rest[0] if rest else None
                if weight is not None and weight.dim() > 1:
                    weight = weight[..., queries.start : queries.stop]
                center = y.mean(-2, keepdim=True).mean(tuple(range(y.dim() - 2)), keepdim=True).flatten()
                x = x[..., queries.start : queries.stop, :]
                return bias(x, y[..., keys.start : keys.stop, :], weight, center)

            return Example(name, bias, inputs[0].shape[-2], inputs[1].shape[-2], build, dense, inputs)

        return [
            example("plain", cls(2), draw(6, 3), draw(9, 3)),
            example("learned", cls(3, learned_weight=True), draw(5, 2), draw(4, 2)),
            example("per-head", cls(3), draw(5, 3), draw(4, 3), draw(3).abs()),
            example("per-token", cls(2), draw(2, 1, 4, 3), draw(2, 1, 5, 3), draw(2, 2, 4)),
            example("points-per-head", cls(2, learned_weight=True), draw(2, 3, 12), draw(2, 4, 12)),
            example("far", cls(1), 1000 + draw(4, 3), 1000 + draw(6, 3)),
        ]


def _with_heads(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 2 else x


def _square(x: Tensor) -> Tensor:
    """`||x||^2`, rounded once: the sum is formed in float64."""
    return x.double().square().sum(-1, keepdim=True).to(x.dtype)


def _interleave(x: Tensor, after_one_quarter: Tensor, after_three_quarters: Tensor) -> Tensor:
    quarter = (x.shape[-1] + 2) // 4
    first, middle, last = x.split([quarter, x.shape[-1] - 2 * quarter, quarter], dim=-1)
    return torch.cat([first, after_one_quarter, middle, after_three_quarters, last], dim=-1)


def _checked_center(center: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The caller's origin, without a gradient: the distance does not depend on it."""
    if not isinstance(center, Tensor) or not center.is_floating_point():
        raise TypeError(f"center must be floating point, got {getattr(center, 'dtype', type(center).__name__)}")
    for name, points in (("x_q", x), ("x_k", y)):
        lead = points.shape[points.dim() - center.dim() :] if center.dim() <= points.dim() else ()
        if len(lead) != center.dim() or any(c not in (1, p) for c, p in zip(center.shape, lead, strict=True)):
            raise ValueError(
                f"center must broadcast against {name}, of shape {tuple(points.shape)}, got {tuple(center.shape)}"
            )
    return center.detach()


def _center(y: Tensor, x: Tensor) -> Tensor:
    """Mean of the keys, shared over whatever dimension the queries share, so that these are not expanded.

    No gradient flows through it: the distance does not depend on it.
    """
    total = y.detach().sum(-2, keepdim=True) / max(y.shape[-2], 1)
    missing = total.dim() - x.dim()
    if missing > 0:
        total = total.mean(tuple(range(missing)))
    shared = [d for d in range(-total.dim(), -2) if x.shape[d] == 1]
    return total.mean(shared, keepdim=True) if shared else total
