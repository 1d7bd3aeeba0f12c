"""What the decomposition is tried on, and what is right about the output: attention written out in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attend(scores: Tensor, bias: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`softmax(scores + bias) value` over the open entries; rows without any give 0."""
    total = scores + bias
    if mask is not None:
        total = total.masked_fill(~mask, -math.inf)
    return torch.softmax(total, dim=-1).nan_to_num(0.0) @ value


def diameter(value: Tensor) -> float:
    """Largest distance between two values, `[M, D]`."""
    return float((value[:, None] - value[None]).norm(dim=-1).max())


def row_diameters(value: Tensor, mask: Tensor) -> Tensor:
    """`[N]`: largest distance between two values that a row can see."""
    distance = (value[:, None] - value[None]).norm(dim=-1)
    return torch.stack([distance[row][:, row].max() if row.any() else distance.new_zeros(()) for row in mask])


def causal(n: int, m: int | None = None) -> Tensor:
    return torch.ones(n, m or n, dtype=torch.bool).tril()


def gaussian(n: int, m: int | None = None, sharpness: float = 20.0) -> Tensor:
    """`exp(-sharpness (x - y)^2)` of places on the unit interval: smooth, of low rank."""
    x, y = torch.linspace(0, 1, n), torch.linspace(0, 1, m or n)
    return torch.exp(-sharpness * (x[:, None] - y) ** 2)


def noise(n: int, m: int | None = None, seed: int = 0) -> Tensor:
    """Of no low rank."""
    return torch.randn(n, m or n, generator=generator(seed))


def toeplitz(n: int, m: int | None = None, seed: int = 0) -> Tensor:
    """A random number for each difference of positions."""
    m = m or n
    return torch.randn(n + m - 1, generator=generator(seed))[torch.arange(m) - torch.arange(n)[:, None] + n - 1]


def spiked(n: int, width: int = 3, tail: float = 2.0, seed: int = 0) -> Tensor:
    """Sharp near the diagonal, and of rank 2 beyond."""
    near = torch.randn(2 * width - 1, generator=generator(seed))
    difference = torch.arange(n) - torch.arange(n)[:, None]
    x = torch.linspace(0, 1, n)
    smooth = tail * (torch.cos(3 * (x[:, None] - x)))
    sharp = near[difference.clamp(1 - width, width - 1) + width - 1] * (difference.abs() < width)
    return smooth + 3 * sharp


def places(axes: tuple[int, ...]) -> Tensor:
    """`[tokens, D]`: the places of a window in row-major order."""
    return torch.cartesian_prod(*(torch.arange(side) for side in axes)).reshape(-1, len(axes))


def window(axes: tuple[int, ...], seed: int = 0, class_token: bool = False) -> Tensor:
    """A random number for each offset in a window; behind a class token with three numbers of its own."""
    where = places(axes)
    table = torch.randn([2 * side - 1 for side in axes], generator=generator(seed))
    offset = where[None] - where[:, None] + torch.tensor(axes) - 1
    inside = table[tuple(offset.unbind(-1))]
    if not class_token:
        return inside
    size = len(where) + 1
    whole = torch.empty(size, size)
    whole[0, 0], whole[0, 1:], whole[1:, 0], whole[1:, 1:] = 5.0, 2.0, -3.0, inside
    return whole


def swin_v2_layer(num_heads: int, side: int, generator: torch.Generator, hidden: int = 512) -> Tensor:
    """Biases of a window of SwinV2, `[H, side^2, side^2]`: `16 sigmoid(MLP(offset))`, offsets on a logarithmic scale.

    The network is drawn at random, wide enough that heads differ as learned ones do.

    Reference:
        "Swin Transformer V2", https://arxiv.org/abs/2111.09883, equations 3 to 5.
    """
    line = torch.arange(1 - side, side) / (side - 1) * 8
    line = line.sign() * torch.log2(1 + line.abs()) / 3
    offsets = torch.cartesian_prod(line, line)
    weight, shift = (0.7 * torch.randn(hidden, n, generator=generator) for n in (2, 1))
    out = torch.randn(num_heads, hidden, generator=generator) / 10
    table = 16 * torch.sigmoid(out @ torch.relu(weight @ offsets.mT + shift))
    where = places((side, side))
    index = where[None] - where[:, None] + side - 1
    return table[:, index[..., 0] * (2 * side - 1) + index[..., 1]]
