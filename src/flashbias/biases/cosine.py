"""FlashBias: Fast Computation of Attention with Bias.

https://arxiv.org/abs/2505.12044, section 3.2: the bias of periodic coordinates (angles, longitudes, phases).

    b[h, i, j]  = w[h, i] * cos(f_h * (x_i - y_j))
    phi_q[h, i] = w[h, i] * [cos(f_h x_i), sin(f_h x_i)]
    phi_k[h, j] = [cos(f_h y_j), sin(f_h y_j)]
    rank        = 2
    exactness   : phases are formed in float64, so large coordinates lose nothing; each factor is then
                  rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashbias.biases.base import About, Bias, Example, query_weight, wide_dtype
from flashbias.factored import FactoredBias

__all__ = ["CosineDifference"]


class CosineDifference(Bias):
    """The cosine of the difference of two angles, with one frequency and one weight per head.

    Formula: `b[h, i, j] = w[h, i] * cos(f_h * (x_i - y_j))`.

    Exact, in two columns. Sums of several frequencies are sums of biases (`+`), two columns each.

    Args:
        num_heads: H.
        frequency: a number, or `[H]`; a constant, kept in float64.
        learned_weight: learn one weight per head, beginning at 1. It multiplies a weight that is given in
            the call.

    Attributes:
        head_weight: `[H]`, or None.

    Raises:
        ValueError: `frequency` has another length than `num_heads` or needs a gradient.

    Examples:
        >>> import math, torch, flashbias as fb
        >>> angle = torch.tensor([0.0, math.pi])
        >>> fb.CosineDifference(num_heads=1)(angle).dense()[0].round()
        tensor([[ 1., -1.],
                [-1.,  1.]])

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, example 3.6.
    """

    about = About(
        title="FlashBias: Fast Computation of Attention with Bias",
        url="https://arxiv.org/abs/2505.12044",
        formula="w_hi * cos(f_h * (x_i - y_j))",
        rank="2",
        exactness="each factor is rounded once, to float32",
        bound=2.0**-22,
    )

    def __init__(
        self,
        num_heads: int,
        frequency: Tensor | Sequence[float] | float = 1.0,
        learned_weight: bool = False,
    ) -> None:
        super().__init__(num_heads)
        frequencies = torch.as_tensor(frequency, dtype=torch.float64)
        if frequencies.requires_grad:
            raise ValueError("frequency is a constant and must not require a gradient; detach it")
        if frequencies.shape not in ((), (num_heads,)):
            shape = tuple(frequencies.shape)
            raise ValueError(f"frequency must be a number or [{num_heads}], got shape {shape}")
        self.register_constant("frequency", frequencies.reshape(-1))
        self.head_weight = nn.Parameter(torch.empty(num_heads)) if learned_weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the learned weights to 1."""
        if self.head_weight is not None:
            nn.init.ones_(self.head_weight)

    @property
    def frequency(self) -> Tensor:
        """`[H or 1]` float64, whatever dtype the module was cast to."""
        return self.constant("frequency")

    def forward(self, x_q: Tensor, x_k: Tensor | None = None, weight: Tensor | float | None = None) -> FactoredBias:
        """Make the bias between two sets of angles.

        Args:
            x_q: `[N]` or `[*batch, H or 1, N]`, radians if the frequency is 1.
            x_k: `[M]` or `[*batch, H or 1, M]`; default the queries'.
            weight: a number, `[H]`, or one per query, `[*batch, H or 1, N]`; default 1.

        Returns:
            phi_q and phi_k of rank 2, in float64 if an input is, else in float32.

        Raises:
            TypeError: angles are not floating point.
            ValueError: heads that are neither 1 nor `num_heads`.
        """
        x_k = x_q if x_k is None else x_k
        given = query_weight(weight, self.num_heads, x_q.shape[-1] if x_q.dim() else 0)
        dtype = wide_dtype(x_q, x_k, weight, self.head_weight)
        if self.head_weight is not None:
            given = self.head_weight.double()[:, None, None] * given
        phi_q = given * self._circle(x_q, "x_q")
        return FactoredBias(phi_q.to(dtype), self._circle(x_k, "x_k").to(dtype))

    def _circle(self, x: Tensor, name: str) -> Tensor:
        """`[cos(f x), sin(f x)]` in float64, `[*batch, H or 1, length, 2]`."""
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.dim() < 1 or (x.dim() > 1 and x.shape[-2] not in (1, self.num_heads)):
            allowed = f"[length] or [*batch, {self.num_heads} or 1, length]"
            raise ValueError(f"{name} must be {allowed}, got shape {tuple(x.shape)}")
        phase = self.frequency[:, None] * x.double()
        return torch.stack([phase.cos(), phase.sin()], dim=-1)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, learned_weight={self.head_weight is not None}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """One frequency and several, weights of each kind, coordinates far from the origin."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return 3.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        def build(bias: CosineDifference, queries: range, keys: range, *inputs: Tensor) -> FactoredBias:
            x, y, *rest = inputs
            weight = rest[0] if rest else None
            if weight is not None and weight.dim() > 1:
                weight = weight[..., queries.start : queries.stop]
            return bias(x[..., queries.start : queries.stop], y[..., keys.start : keys.stop], weight)

        def dense(bias: CosineDifference, x: Tensor, y: Tensor, weight: Tensor | float = 1.0) -> Tensor:
            x, y = (t.double() if t.dim() > 1 else t.double()[None] for t in (x, y))
            if isinstance(weight, Tensor):
                weight = weight.double()
                weight = weight[:, None, None] if weight.dim() == 1 else weight[..., None]
            if bias.head_weight is not None:
                weight = weight * bias.head_weight.double()[:, None, None]
            difference = x[..., :, None] - y[..., None, :]
            return weight * torch.cos(bias.frequency[:, None, None] * difference)

        def example(name: str, bias: CosineDifference, *inputs: Tensor) -> Example:
            return Example(name, bias, inputs[0].shape[-1], inputs[1].shape[-1], build, dense, inputs)

        return [
            example("plain", cls(2), draw(6), draw(9)),
            example("frequencies", cls(3, frequency=(0.5, 1.0, 7.3)), draw(5), draw(4)),
            example("learned", cls(2, learned_weight=True), draw(2, 1, 4), draw(2, 1, 5), draw(2, 2, 4)),
            example("per-head", cls(3), draw(3, 4), draw(5), draw(3)),
            example("far", cls(1, frequency=0.37), 1e5 + draw(5), 1e5 + draw(6)),
        ]
