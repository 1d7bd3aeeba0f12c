"""What vision models of all libraries share: tables over offsets in a window, shifted windows, Swin V2's cosine scores.

Shifted windows. In place of their masks `[windows, N, N]` the layers hand out which region each token is in,
`[windows, N]`; `flashbias.biases.regions` says which regions these are, and how they become factors of rank 3, shared
by all heads and images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flashbias.biases.base import wide_dtype
from flashbias.biases.regions import region_factors, shifted_window_regions
from flashbias.biases.window import window_codes, window_table
from flashbias.constants import made_once, may_be_kept
from flashbias.factored import FactoredBias
from flashbias.integrations.call import Settings, call, settings_of

__all__ = [
    "LatestShift",
    "LatestWindow",
    "OffsetTable",
    "Window",
    "WindowSettings",
    "attend_in_windows",
    "bias_of",
    "cosine_operands",
    "shifted_regions",
    "sigmoid_table",
    "split_heads",
]

REGIONS = 4
"""Of a window: both axes are shifted, and each has two sides."""

LARGEST_SCALE = 100.0
"""Of Swin V2's scores."""


class Window:
    """How a model's own table of offsets is read as a relative table.

    Args:
        window: height and width, in tokens.
        class_token: a class token stands before the others.
    """

    def __init__(self, window: tuple[int, int], class_token: bool = False) -> None:
        self.size, self.class_token = window, class_token
        self.code_q, self.code_k = _codes(window, class_token)

    def bias(self, weight: Tensor) -> FactoredBias:
        """Read a table.

        Args:
            weight: `[offsets, H]`, with three more rows where there is a class token.

        Returns:
            A table in float32 at least, rank 0, differentiable with respect to `weight`.
        """
        if self.code_q.device != weight.device:
            self.code_q, self.code_k = self.code_q.to(weight.device), self.code_k.to(weight.device)
        table = window_table(weight, self.class_token)
        return FactoredBias.from_table(table, len(self.code_q), len(self.code_k), self.code_q, self.code_k)


@torch.compiler.assume_constant_result
def _codes(window: tuple[int, int], class_token: bool) -> tuple[Tensor, Tensor]:
    return window_codes(window, class_token)


class LatestWindow:
    """The window that was asked for last: a model sees many images of one size."""

    def __init__(self) -> None:
        self.window: Window | None = None

    def of(self, size: tuple[int, int], class_token: bool = False) -> Window:
        """The window of this height and width."""
        window = self.window
        if window is None or window.size != size or window.class_token != class_token:
            window = self.window = Window(size, class_token)
        return window


@dataclass(frozen=True)
class OffsetTable:
    """A model's own table over the offsets in a window.

    Args:
        weight: `[offsets, H]`, query minus key in row-major order; three more rows where there is a class token.
        window: height and width, in tokens.
        class_token: a class token stands before the others.
    """

    weight: Tensor
    window: Sequence[int]
    class_token: bool = False

    def bias(self, latest: LatestWindow | None = None) -> FactoredBias:
        """Read it, as `Window.bias` does.

        Args:
            latest: keeps the window for the next time.
        """
        height, width = self.window
        return (latest or LatestWindow()).of((height, width), self.class_token).bias(self.weight)


@made_once(maxsize=64)
def shifted_regions(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> Tensor:
    """As `shifted_window_regions`: the same tensor for all images of a size."""
    return shifted_window_regions(size, window, shift, device)


class LatestShift:
    """The factors of the regions that came last: those of all images of one size are one tensor."""

    def __init__(self) -> None:
        self.regions: Tensor | None = None
        self.penalty = 0.0
        self.bias: FactoredBias | None = None

    def of(self, regions: Tensor, penalty: float) -> FactoredBias:
        """The mask of a shift as factors.

        Args:
            regions: `[windows, N]`.
            penalty: what a pair from two of them loses.
        """
        if self.bias is not None and regions is self.regions and penalty == self.penalty:
            return self.bias
        numbers = torch.arange(REGIONS, device=regions.device)
        # 100 and 200 are exact in bfloat16, which needs the fewest columns.
        bias = region_factors(regions[:, None], regions[:, None], numbers, penalty, torch.bfloat16)
        if may_be_kept():
            self.regions, self.penalty, self.bias = regions, penalty, bias
        return bias


@dataclass
class WindowSettings(Settings):
    """Settings of an attention with a table over windows.

    Args:
        latest: how the table is read.
        shift: the mask of its shift.
    """

    latest: LatestWindow = field(default_factory=LatestWindow)
    shift: LatestShift = field(default_factory=LatestShift)


def bias_of(
    module: nn.Module, device: torch.device, exact: Callable[[LatestWindow], FactoredBias | None]
) -> FactoredBias | None:
    """The bias of a patched attention: the factors that stand for its table, or else its exact form.

    Args:
        module: the attention, with `WindowSettings`.
        device: where its queries live.
        exact: makes the exact form; called only where it is needed.

    Raises:
        RuntimeError: as `TableFactors.current`.
    """
    settings = settings_of(module)
    assert isinstance(settings, WindowSettings)
    return exact(settings.latest) if settings.factors is None else settings.factors.current(module, device)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """`[B, N, H * head_dim]` to `[B, H, N, head_dim]`."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend_in_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Callable[[], OffsetTable],
    mask: Tensor | None,
    *,
    penalty: float,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Compute the attention of a patched module in all windows of all images.

    Args:
        module: the attention, patched, with `WindowSettings`.
        query: `[images * windows, H, N, head_dim]`.
        key: likewise.
        value: likewise.
        table: makes the table of offsets; called only where factors do not stand for it.
        mask: the regions `[windows, N]` that the patched layer made, or None.
        penalty: what the model takes off the score of a pair from two regions.
        scale: factor of the dot products.
        dropout_p: probability of dropping an attention weight in training.

    Returns:
        `[images * windows, N, H * head_dim]`.

    Raises:
        ValueError: `mask` comes from somewhere else.
    """
    bias = bias_of(module, query.device, lambda latest: table().bias(latest))
    assert bias is not None, "every window has a table"
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"the mask must be what the patched layer makes, [windows, N], got {tuple(mask.shape)}; "
                "call the layer, not its attention"
            )
        query, key, value = (x.unflatten(0, (-1, len(mask))) for x in (query, key, value))
        settings = settings_of(module)
        assert isinstance(settings, WindowSettings)
        bias = bias + settings.shift.of(mask, penalty)
    out = call(module, query, key, value, bias, scale=scale, dropout_p=dropout_p).flatten(-2)
    return out if mask is None else out.flatten(0, 1)


# -------------------------------------------------------------------- Swin V2


def cosine_operands(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot products are `min(exp(logit_scale), 100) * cos(query, key)`.

    Args:
        query: `[B, H, N, head_dim]`.
        key: `[B, H, M, head_dim]`.
        logit_scale: `[H, 1, 1]`.

    Returns:
        Queries of the length of their head's scale, and keys of length 1.
    """
    scale = logit_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
    return (normalize(query, dim=-1) * scale).to(query.dtype), normalize(key, dim=-1).to(key.dtype)


def sigmoid_table(values: Tensor) -> Tensor:
    """The bias at each offset, `16 * sigmoid(values)`, `[offsets, H]`.

    Args:
        values: `[1, 2 * height - 1, 2 * width - 1, H]`, of the network that is asked once for each offset.
    """
    return 16 * values.flatten(0, -2).to(wide_dtype(values)).sigmoid()
