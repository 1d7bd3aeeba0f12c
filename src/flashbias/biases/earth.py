"""Pangu-Weather: A 3D High-Resolution Model for Fast and Accurate Global Weather Forecast.

https://arxiv.org/abs/2211.02556; the earth-specific positional bias of its 3-D windows over pressure, latitude and
longitude. A degree of longitude is shorter near the poles and air is thinner aloft, so pressure and latitude enter by
their own values, and longitude alone by a difference:

    b[h, i, j] = weight[row, t, h]             t the type of the window: its pressure and latitude, not its longitude
    row        = ((z_i + Wz z_j) Wlat^2 + lat_i + Wlat lat_j) (2 Wlon - 1) + lon_i - lon_j + Wlon - 1
               = row_q[i] + row_k[j]           z, lat, lon the place of a token in its window
    table      = weight[:, t, h]               T = Wz^2 Wlat^2 (2 Wlon - 1) entries (one more if that is even)
    code_q[i]  = -row_q[i]
    code_k[j]  = row_k[j] - T//2               so that code_k[j] - code_q[i] + T//2 is the row
    phi_q, phi_k: none
    rank       = 0
    exactness  : equal to the bit.

The bias is no function of an offset, and its rank is in general that of the whole window. It is a table all the same:
a row of the weights is a sum of a number of the query and a number of the key, and codes of queries and keys may be
chosen apart from each other. A table of Pangu-Weather's has 3,312 entries where its matrix has 20,736.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashbias.biases.base import About, Bias, Example, checked_sides, wide_dtype
from flashbias.factored import FactoredBias

__all__ = ["EarthSpecificBias"]


class EarthSpecificBias(Bias):
    """A learned bias per pair of pressures and latitudes and per difference of longitudes: Pangu-Weather.

    Formula: `b[t, h, i, j] = weight[row(i, j), t, h]`, `row(i, j) = ((z_i + Wz z_j) Wlat^2 + lat_i + Wlat lat_j)
    (2 Wlon - 1) + lon_i - lon_j + Wlon - 1`; t is the type of the window.

    Exact, and stored as the table itself, `T = Wz^2 Wlat^2 (2 Wlon - 1)` numbers per type and head.

    A window's type is where it lies in pressure and latitude; windows around the globe at the same place of both share
    it. A table has no batch dimensions, so the types stand in the head dimension, type by type: queries `[*batch,
    longitude windows, types, H, N, head_dim]` go in as `q.flatten(-4, -3)`, and the output comes back by
    `out.unflatten(-3, (types, H))`. Neither copies, as long as types and heads lie next to each other.

    Where the tables of a trained model are of low rank, factors are a second form, as in the paper of FlashBias: give
    `bias(...).dense()` to `flashbias.compress` with `table=None`. It bounds the change of the output, or refuses.
    `flashbias.plan` says which form is the faster one: factors have to be of small rank to be faster than the table.

    Args:
        num_heads: H, the heads of one window.
        windows: number of windows over pressure and over latitude; their product is the number of types. The default
            is that of Pangu-Weather's outer layers (8 × 186 places, padded); its inner ones have `(4, 16)`.
        window: `(pressure, latitude, longitude)`, the sides of a window; tokens are in row-major order.

    Attributes:
        weight: `[T, types, H]`, the layout of the authors' pseudocode; types are numbered
            `pressure window * latitude windows + latitude window`.

    Raises:
        ValueError: `windows` is not 2 positive numbers, or `window` not 3.

    Examples:
        >>> import torch, flashbias as fb
        >>> from flashbias.biases import EarthSpecificBias
        >>> bias = EarthSpecificBias(num_heads=2, windows=(1, 3), window=(2, 2, 4))()
        >>> bias.shape, bias.table.shape
        (torch.Size([6, 16, 16]), torch.Size([6, 113]))
        >>> q = torch.randn(5, 3, 2, 16, 8)  # longitude windows, types, heads, tokens, head_dim
        >>> out = fb.attention(*(x.flatten(-4, -3) for x in (q, q, q)), bias).unflatten(-3, (3, 2))
        >>> out.shape
        torch.Size([5, 3, 2, 16, 8])

    Reference:
        Bi et al., https://arxiv.org/abs/2211.02556, "earth-specific positional bias"; factors of it:
        Wu et al., https://arxiv.org/abs/2505.12044, section 4.
    """

    about = About(
        title="Pangu-Weather: A 3D High-Resolution Model for Fast and Accurate Global Weather Forecast",
        url="https://arxiv.org/abs/2211.02556",
        formula="weight[row(z_i, z_j, lat_i, lat_j, lon_i - lon_j), t, h], t the type of the window",
        rank="0, a table of Wz^2 Wlat^2 (2 Wlon - 1) entries",
        exactness="equal to the bit",
        bound=0.0,
    )

    def __init__(self, num_heads: int, windows: Sequence[int] = (4, 31), window: Sequence[int] = (2, 6, 12)) -> None:
        super().__init__(num_heads)
        self.windows = checked_sides("windows", windows, (2,))
        self.window = checked_sides("window", window, (3,))
        self.num_types, self.num_tokens = math.prod(self.windows), math.prod(self.window)
        pressure, latitude, longitude = self.window
        self.num_rows = (pressure * latitude) ** 2 * (2 * longitude - 1)
        self.weight = nn.Parameter(torch.empty(self.num_rows, self.num_types, num_heads))
        for name in ("code_q", "code_k"):
            self.register_buffer(name, torch.empty(self.num_tokens, dtype=torch.int32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, and fill in the codes (needed after `to_empty`)."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        row_q, row_k = self._rows()
        self.get_buffer("code_q").copy_(-row_q)
        self.get_buffer("code_k").copy_(row_k - self.num_rows // 2)

    def forward(
        self, token_q: Tensor | None = None, token_k: Tensor | None = None, types: Tensor | None = None
    ) -> FactoredBias:
        """Make the bias of all types of windows, or of some; of all their tokens, or of some.

        Args:
            token_q: `[N]` integers, which tokens are the queries; default all.
            token_k: `[M]` integers, which tokens are the keys; default all.
            types: `[K]` integers, which types of windows; default all, K = `num_types`.

        Returns:
            A table, differentiable with respect to `weight`, for `K * H` heads, type by type.
        """
        code_q, code_k = self.get_buffer("code_q"), self.get_buffer("code_k")
        code_q = code_q if token_q is None else code_q[token_q]
        code_k = code_k if token_k is None else code_k[token_k]
        return FactoredBias.from_table(self.table(types), len(code_q), len(code_k), code_q, code_k)

    def table(self, types: Tensor | None = None) -> Tensor:
        """`[K * H, T]`, T odd: the weights by row, for each type and head, float32 at least."""
        weight = self.weight if types is None else self.weight[:, types]
        rows = weight.to(wide_dtype(weight)).flatten(1).mT
        return nn.functional.pad(rows, (0, 1 - self.num_rows % 2)).contiguous()

    def _rows(self) -> tuple[Tensor, Tensor]:
        """`[tokens]` each: what a query and what a key add to the row of `weight`."""
        pressure, latitude, longitude = self.window
        axes = [torch.arange(side, device="cpu") for side in self.window]
        z, lat, lon = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        differences = 2 * longitude - 1
        row_q = (z * latitude**2 + lat) * differences + lon
        row_k = (pressure * z * latitude**2 + latitude * lat) * differences + longitude - 1 - lon
        return row_q, row_k

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, windows={self.windows}, window={self.window}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """One window type and one of several, tables of odd and of even length, sides of one."""

        def example(name: str, windows: tuple[int, int], window: tuple[int, int, int], kind: int) -> Example:
            def build(bias: EarthSpecificBias, queries: range, keys: range) -> FactoredBias:
                device = bias.weight.device
                tokens = (torch.tensor(part, device=device) for part in (queries, keys))
                return bias(*tokens, torch.tensor([kind], device=device))

            def dense(bias: EarthSpecificBias) -> Tensor:
                pressure, latitude, longitude = bias.window
                weight = bias.weight.double()[:, kind]
                weight = weight.reshape(pressure, pressure, latitude, latitude, 2 * longitude - 1, bias.num_heads)
                places = torch.cartesian_prod(*(torch.arange(side, device=weight.device) for side in bias.window))
                z, lat, lon = places.unbind(-1)
                index = (z[None], z[:, None], lat[None], lat[:, None], lon[:, None] - lon[None] + longitude - 1)
                return weight[index].permute(2, 0, 1)

            bias = cls(2, windows, window)
            return Example(name, bias, bias.num_tokens, bias.num_tokens, build, dense)

        return [
            example("one-type", (1, 1), (2, 2, 3), 0),
            example("one-of-several", (2, 2), (1, 2, 2), 2),
            example("odd-table", (1, 2), (1, 3, 2), 1),
            example("one-place", (1, 1), (1, 1, 1), 0),
        ]
