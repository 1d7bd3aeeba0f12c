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
    "OffsetTable",
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

    def bias(self) -> FactoredBias:
        """Read it as a relative table: in float32 at least, rank 0, differentiable with respect to `weight`."""
        code_q, code_k = _codes(tuple(self.window), self.class_token, self.weight.device)
        table = window_table(self.weight, self.class_token)
        return FactoredBias.from_table(table, len(code_q), len(code_k), code_q, code_k)


@torch.compiler.assume_constant_result
@made_once(maxsize=64)
def _codes(window: tuple[int, ...], class_token: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    code_q, code_k = window_codes(window, class_token)
    return code_q.to(device), code_k.to(device)


@made_once(maxsize=64)
def shifted_regions(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> Tensor:
    """As `shifted_window_regions`: the same tensor for all images of a size."""
    return shifted_window_regions(size, window, shift, device)


class LatestShift:
    """The factors of the regions that came last: those of all images of one size are one tensor."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, float, FactoredBias] | None = None

    def of(self, regions: Tensor, penalty: float) -> FactoredBias:
        """The mask of a shift as factors.

        Args:
            regions: `[windows, N]`.
            penalty: what a pair from two of them loses.
        """
        if torch.compiler.is_compiling():  # a graph that looked at what is kept would hold for that alone
            return shift_factors(regions, penalty)
        kept = self.kept  # as a whole: another thread may exchange it
        if kept is not None and regions is kept[0] and penalty == kept[1]:
            return kept[2]
        if not may_be_kept():
            return shift_factors(regions, penalty)
        with torch.inference_mode(mode=False):
            bias = shift_factors(regions, penalty)
        self.kept = regions, penalty, bias
        return bias


def shift_factors(regions: Tensor, penalty: float) -> FactoredBias:
    """The mask of a shift as factors; arguments as in `LatestShift.of`."""
    numbers = torch.arange(REGIONS, device=regions.device)
    # 100 and 200 are exact in bfloat16, which needs the fewest columns.
    return region_factors(regions[:, None], regions[:, None], numbers, penalty, torch.bfloat16)


@dataclass
class WindowSettings(Settings):
    """Settings of an attention with a table over windows.

    Args:
        shift: the mask of its shift.
    """

    shift: LatestShift = field(default_factory=LatestShift)


def bias_of(module: nn.Module, device: torch.device, exact: Callable[[], FactoredBias | None]) -> FactoredBias | None:
    """The bias of a patched attention: the factors that stand for its table, or else its exact form.

    Args:
        module: the attention.
        device: where its queries live.
        exact: makes the exact form; called only where it is needed.

    Raises:
        RuntimeError: as `TableFactors.current`.
    """
    factors = settings_of(module).factors
    return exact() if factors is None else factors.current(module, device)


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
    bias = bias_of(module, query.device, lambda: table().bias())
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
