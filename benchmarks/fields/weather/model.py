"""A small model in the manner of Pangu-Weather: windows of tokens, and a bias that knows where on earth they lie.

A token is 2 x 2 places of one component of the wind. The data have one level of pressure; eastward and northward wind
stand where Pangu-Weather has two levels, so that its window of 2 x 6 x 12 tokens fits. Every second layer shifts the
windows by half their sides: along longitude the globe closes, and along latitude the shift only moves the padding, so
that no mask is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashbias as fb
from flashbias.factored import FactoredBias

__all__ = ["Size", "WindModel", "WindowAttention"]

PATCH = 2
CHANNELS = 2  # of each component: the anomaly of this month, and the climatology of the next

KERNELS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
"""All but cuDNN's, which gives no gradient to the matrix."""


@dataclass(frozen=True)
class Size:
    """How large the model is.

    Args:
        width: of a token.
        heads: of each layer.
        layers: how many.
        window: components, latitudes and longitudes of a window, in tokens.
    """

    width: int = 64
    heads: int = 4
    layers: int = 4
    window: tuple[int, int, int] = (2, 6, 12)


class WindowAttention(nn.Module):
    """Attention within windows, with an earth-specific bias.

    Args:
        size: of the model.
        places: latitudes and longitudes, in tokens; the windows divide the longitudes.
        shifted: by half a window.

    Attributes:
        form: what stands for the bias: a form of it, or a matrix `[types * H, tokens, tokens]`; None: its own matrix.
    """

    def __init__(self, size: Size, places: tuple[int, int], shifted: bool) -> None:
        super().__init__()
        _, latitudes, longitudes = self.window = size.window
        if places[1] % longitudes:
            raise ValueError(f"places must be a multiple of {longitudes} longitudes, got {places}")
        self.shift = (latitudes // 2, longitudes // 2) if shifted else (0, 0)
        self.heads, self.rows = size.heads, places[0]
        types = math.ceil((places[0] + self.shift[0]) / latitudes)
        self.padding = (self.shift[0], types * latitudes - places[0] - self.shift[0])
        self.bias = fb.EarthSpecificBias(size.heads, windows=(1, types), window=size.window)
        self.project_in = nn.Linear(size.width, 3 * size.width)
        self.project_out = nn.Linear(size.width, size.width)
        self.form: FactoredBias | Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 2, latitudes, longitudes, width]` to the same."""
        windows = self._cut(x)
        q, k, v = self.project_in(windows).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = (y.flatten(1, 2) for y in (q, k, v))  # types and heads side by side, as the bias has them
        if isinstance(self.form, FactoredBias):
            out = fb.attention(q, k, v, self.form)
        else:
            matrix = self.bias().dense() if self.form is None else self.form
            with sdpa_kernel(list(KERNELS)):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=matrix.to(q.dtype)[None])
        assert isinstance(out, Tensor)
        out = out.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(-2)
        return self._joined(self.project_out(out), len(x))

    def _cut(self, x: Tensor) -> Tensor:
        """`[batch * windows around the globe, types, tokens, width]`."""
        _, latitudes, longitudes = self.window
        x = F.pad(x.roll(-self.shift[1], dims=3), (0, 0, 0, 0, *self.padding))
        x = x.unflatten(3, (-1, longitudes)).unflatten(2, (-1, latitudes))
        return x.permute(0, 4, 2, 1, 3, 5, 6).flatten(3, 5).flatten(0, 1)

    def _joined(self, windows: Tensor, batch: int) -> Tensor:
        x = windows.unflatten(2, self.window).unflatten(0, (batch, -1)).permute(0, 3, 2, 4, 1, 5, 6)
        x = x.flatten(4, 5).flatten(2, 3)
        return x[:, :, self.padding[0] : self.padding[0] + self.rows].roll(self.shift[1], dims=3)


class _Layer(nn.Module):
    def __init__(self, size: Size, places: tuple[int, int], shifted: bool, dropout: float) -> None:
        super().__init__()
        width = size.width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(size, places, shifted)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.before_attention(x)))
        return x + self.dropout(self.mlp(self.before_mlp(x)))


class WindModel(nn.Module):
    """A correction of what the next month is guessed to be, from this month's anomaly and the next one's climatology.

    It starts as no correction: its last layer is zero.

    Args:
        size: of the model.
        places: latitudes and longitudes of the data.
        dropout: of what each layer adds.
    """

    def __init__(self, size: Size, places: tuple[int, int], dropout: float = 0.1) -> None:
        super().__init__()
        self.places = places
        tokens = math.ceil(places[0] / PATCH), places[1] // PATCH
        if places[1] % PATCH:
            raise ValueError(f"places must have an even number of longitudes, got {places}")
        self.embed = nn.ModuleList(nn.Linear(CHANNELS * PATCH**2, size.width) for _ in range(2))
        self.season = nn.Linear(2, size.width)
        layers = [_Layer(size, tokens, index % 2 == 1, dropout) for index in range(size.layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(size.width)
        self.predict = nn.ModuleList(nn.Linear(size.width, PATCH**2) for _ in range(2))
        for parameter in self.predict.parameters():
            nn.init.zeros_(parameter)

    @property
    def attentions(self) -> Sequence[WindowAttention]:
        """Of all layers."""
        return [module for module in self.modules() if isinstance(module, WindowAttention)]

    def forward(self, anomaly: Tensor, climatology: Tensor, months: Tensor) -> Tensor:
        """`[batch, 2, latitudes, longitudes]`, in the unit of the anomaly.

        Args:
            anomaly: of this month, `[batch, 2, latitudes, longitudes]`.
            climatology: of the next month, likewise.
            months: `[batch]`, the number of the next month, counted from a January.
        """
        x = self._patches(torch.stack((anomaly, climatology), 2))
        x = torch.stack([embed(x[:, component]) for component, embed in enumerate(self.embed)], 1)
        angle = months.to(anomaly.dtype) * (2 * math.pi / 12)
        x = x + self.season(torch.stack((angle.cos(), angle.sin()), -1))[:, None, None, None]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        patches = torch.stack([predict(x[:, component]) for component, predict in enumerate(self.predict)], 1)
        field = patches.unflatten(-1, (PATCH, PATCH)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return field[:, :, : self.places[0]].float()

    def _patches(self, x: Tensor) -> Tensor:
        """`[batch, 2, channels, latitudes, longitudes]` to `[batch, 2, latitudes / 2, longitudes / 2, 4 channels]`."""
        x = F.pad(x, (0, 0, 0, x.shape[-2] % PATCH))
        return x.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH).permute(0, 1, 3, 4, 2, 5, 6).flatten(4)
