"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.

https://arxiv.org/abs/2103.14030, section 3.2, "cyclic shift"; its -100 between pairs that must not see each other is
that of the authors' code (https://github.com/microsoft/Swin-Transformer, models/swin_transformer.py).

Tokens lie in regions, and a pair from two regions is hidden by a penalty. Region 0 is the reference; of the penalty
[different], the row constant that makes the columns few is taken off, which no attention weight sees:

    b[h, i, j]  = -penalty * [r_i != r_j]  +  penalty * [r_i != 0]
    phi_q[i, g] = penalty * ([r_i = g] - [r_i = 0])     g = 1 … regions - 1, shared by all heads
    phi_k[j, g] = [r_j = g]
    rank        = regions - 1; no row constant makes it less
    exactness   : one product at most is not 0, so an entry is 0 or the penalty, rounded once to the dtype of the
                  factors. 100 is exact in all of them, bfloat16 included.

A query of region 0 has 0 where it may look; one of another region has the penalty there, and 0 elsewhere.

Shifted windows. Swin rolls the image by half a window, so the last window of an axis holds tokens from two opposite
edges. In a window, an axis with a shift has two sides, before the edge and beyond it; s such axes cut a window into
at most 2^s regions. The official nine regions of an image are those, numbered over all windows. Region 0 is before
every edge: there, and so in all windows but the last ones, the whole bias is 0. For an image that is 3 columns; the
masks [windows, N, N] are not formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from flashbias.biases.base import About, Bias, Example, checked_sides
from flashbias.factored import FactoredBias

__all__ = ["RegionMask", "ShiftedWindowMask", "region_factors", "shifted_window_regions"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class RegionMask(Bias):
    """A penalty between tokens of different regions: a block mask for any assignment of tokens to blocks.

    Formula: `b[h, i, j] = -penalty * [r_i != r_j]`, up to the row constant `penalty * [r_i != 0]`.

    Exact, in one column less than there are regions. An attention weight across regions is at most
    `exp(-penalty + difference of the scores)`: with 100, far below the rounding of the output. A query whose region
    holds no key sees all keys, as under any finite penalty.

    Few regions that interleave, or that change from window to window, are what this is for. Sequences packed one
    after the other are the case of `varlen_attention`, which skips what is hidden. Give the number 0 to the largest
    region: where its queries look, the bias is 0 and no score is rounded.

    Args:
        num_heads: H; all heads have the same mask.
        num_regions: G, at least 2.
        penalty: a positive number.

    Raises:
        ValueError: `num_regions` is less than 2, or `penalty` not a positive finite number.

    Examples:
        >>> import torch, flashbias as fb
        >>> bias = fb.RegionMask(num_heads=8, num_regions=3)(torch.tensor([0, 1, 1, 2]))
        >>> bias.rank, bias.dense()[0]
        (2, tensor([[   0., -100., -100., -100.],
                [   0.,  100.,  100.,    0.],
                [   0.,  100.,  100.,    0.],
                [   0.,    0.,    0.,  100.]]))

    Reference:
        Liu et al., https://arxiv.org/abs/2103.14030, section 3.2.
    """

    about = About(
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        url="https://arxiv.org/abs/2103.14030",
        formula="-penalty * [r_i != r_j] + penalty * [r_i != 0], r the region of a token",
        rank="regions - 1",
        exactness="the penalty is rounded once; 100 is exact in every dtype",
        bound=2.0**-24,
    )

    def __init__(self, num_heads: int, num_regions: int, penalty: float = 100.0) -> None:
        super().__init__(num_heads)
        if not isinstance(num_regions, int) or num_regions < 2:
            raise ValueError(f"num_regions must be an integer of at least 2, got {num_regions!r}")
        self.num_regions = num_regions
        self.penalty = _checked_penalty(penalty)
        self.register_buffer("regions", torch.empty(num_regions, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill in the numbers of the regions (needed after `to_empty`)."""
        self.get_buffer("regions").copy_(torch.arange(self.num_regions, device="cpu"))

    def forward(
        self, region_q: Tensor, region_k: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> FactoredBias:
        """Make the bias between two sets of tokens.

        Args:
            region_q: `[N]` or `[*batch, H or 1, N]` integers, 0 … num_regions - 1: the regions of the queries. They
                are read to be checked, which synchronises a GPU; not under `torch.compile`.
            region_k: `[M]` or `[*batch, H or 1, M]`, those of the keys; default the queries'.
            dtype: of the factors; a half, if it holds the penalty, makes for fewer columns in the kernels.

        Returns:
            phi_q and phi_k of rank `num_regions - 1`.

        Raises:
            TypeError: regions are not integers.
            ValueError: regions out of range, heads that are neither 1 nor `num_heads`, or a `dtype` that does not
                hold the penalty.
        """
        region_k = region_q if region_k is None else region_k
        for name, region in (("region_q", region_q), ("region_k", region_k)):
            self._check_regions(name, region)
        _check_dtype(self.penalty, dtype)
        return region_factors(region_q, region_k, self.get_buffer("regions"), self.penalty, dtype)

    def _check_regions(self, name: str, region: Tensor) -> None:
        if region.is_floating_point() or region.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {region.dtype}")
        if region.dim() < 1 or (region.dim() > 1 and region.shape[-2] not in (1, self.num_heads)):
            allowed = f"[length] or [*batch, {self.num_heads} or 1, length]"
            raise ValueError(f"{name} must be {allowed}, got shape {tuple(region.shape)}")
        if region.is_meta or region.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = (int(x) for x in region.aminmax())
        if low < 0 or high >= self.num_regions:
            raise ValueError(f"{name} must lie in 0 … {self.num_regions - 1}, got {low} … {high}")

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, num_regions={self.num_regions}, penalty={self.penalty}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Two regions and more, batches and heads, a region without keys, a penalty that is rounded."""
        generator = torch.Generator().manual_seed(0)

        def draw(regions: int, *shape: int) -> Tensor:
            return torch.randint(regions, shape, generator=generator)

        def example(name: str, bias: RegionMask, r: Tensor, t: Tensor) -> Example:
            def build(bias: RegionMask, queries: range, keys: range) -> FactoredBias:
                device = bias.get_buffer("regions").device
                r_q, r_k = r[..., queries.start : queries.stop], t[..., keys.start : keys.stop]
                return bias(r_q.to(device), r_k.to(device))

            def dense(bias: RegionMask) -> Tensor:
                r_q, r_k = (x if x.dim() > 1 else x[None] for x in (r, t))
                different = (r_q[..., :, None] != r_k[..., None, :]).double()
                return bias.penalty * ((r_q != 0)[..., None].double() - different)

            return Example(name, bias, r.shape[-1], t.shape[-1], build, dense)

        return [
            example("two", cls(2, 2), draw(2, 7), draw(2, 9)),
            example("five", cls(3, 5), draw(5, 12), draw(5, 10)),
            example("per-head", cls(2, 3, penalty=37.5), draw(3, 2, 2, 6), draw(3, 2, 1, 8)),
            example("without-keys", cls(1, 4), draw(4, 8), draw(2, 5)),
            example("rounded", cls(1, 3, penalty=33.3), draw(3, 6), draw(3, 6)),
        ]


class ShiftedWindowMask(Bias):
    """The mask of Swin's shifted windows, for all windows of an image, or of a video, at once.

    Formula: `b[window, h, i, j] = -penalty * [r_i != r_j]`, up to the row constant `penalty * [r_i != 0]`; r says
    beyond which edges of the rolled image a token lies.

    Exact, in `2^s - 1` columns for s axes with a shift: 3 for an image, 7 for a video. Queries are `[*images, windows,
    H, N, head_dim]`, with windows and tokens in row-major order, as `window_partition` of Swin makes them. The
    window's table of offsets is added by `+`.

    Args:
        num_heads: H; all heads have the same mask.
        size: `(height, width)` or `(depth, height, width)` of the image in tokens, after padding: multiples of the
            window.
        window: the sides of a window.
        shift: by how many tokens each axis is rolled towards its beginning, from 0 to the window's side, that
            excluded; default half a window, rounded down. An axis with a shift of 0 hides nothing; one needs a shift.
        penalty: a positive number. 100 is that of Swin.

    Attributes:
        num_windows: how many windows there are.
        region: `[windows, N]`, the region of each token: 2^a summed over the axes a, counted among those with a
            shift, beyond whose edge it lies.

    Raises:
        ValueError: sides that are not positive integers, a window that does not divide the size, a shift out of
            range or 0 on all axes, or a penalty that is not a positive finite number.

    Examples:
        >>> import torch, flashbias as fb
        >>> mask = fb.ShiftedWindowMask(num_heads=4, size=(14, 21), window=(7, 7))
        >>> mask().shape, mask().rank
        (torch.Size([6, 1, 49, 49]), 3)
        >>> bias = fb.WindowBias(num_heads=4, window=(7, 7))() + mask()
        >>> q = torch.randn(2, 6, 4, 49, 8)  # images, windows, heads, tokens, head_dim
        >>> fb.attention(q, q, q, bias).shape
        torch.Size([2, 6, 4, 49, 8])

    Reference:
        Liu et al., https://arxiv.org/abs/2103.14030, section 3.2, and the authors' code, `attn_mask` of
        `SwinTransformerBlock`; of videos, Liu et al., https://arxiv.org/abs/2106.13230.
    """

    about = About(
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        url="https://arxiv.org/abs/2103.14030",
        formula="-penalty * [r_i != r_j] + penalty * [r_i != 0], r the edges beyond which a token lies",
        rank="2^s - 1 for s axes with a shift: 3 for an image",
        exactness="the penalty is rounded once; 100 is exact in every dtype",
        bound=2.0**-24,
    )

    def __init__(
        self,
        num_heads: int,
        size: Sequence[int],
        window: Sequence[int],
        shift: Sequence[int] | None = None,
        penalty: float = 100.0,
    ) -> None:
        super().__init__(num_heads)
        self.size = checked_sides("size", size, (2, 3))
        self.window = checked_sides("window", window, (len(self.size),))
        if any(length % side for length, side in zip(self.size, self.window, strict=True)):
            raise ValueError(
                f"window must divide size, got {self.window} for {self.size}; pad the image, and let a window that is "
                "larger than an axis be the axis, with a shift of 0"
            )
        self.shift = tuple(side // 2 for side in self.window) if shift is None else self._checked_shift(shift)
        if not any(self.shift):
            raise ValueError(
                f"shift must be positive on one axis, got {self.shift}; without a shift, leave the mask out"
            )
        self.penalty = _checked_penalty(penalty)
        self.num_regions = 2 ** sum(shift > 0 for shift in self.shift)
        self.num_tokens = math.prod(self.window)
        self.num_windows = math.prod(self.size) // self.num_tokens
        region = torch.empty(self.num_windows, self.num_tokens, dtype=torch.int64)
        self.register_buffer("region", region, persistent=False)
        self.reset_parameters()

    def _checked_shift(self, shift: Sequence[int]) -> tuple[int, ...]:
        try:
            found = tuple(index(by) for by in shift)
        except TypeError:  # one number for all axes, or one that is no integer
            found = ()
        if len(found) != len(self.window) or not all(
            0 <= by < side for by, side in zip(found, self.window, strict=True)
        ):
            raise ValueError(f"shift must be {len(self.window)} integers, 0 <= shift < {self.window}, got {shift!r}")
        return found

    def reset_parameters(self) -> None:
        """Fill in the regions (needed after `to_empty`)."""
        self.get_buffer("region").copy_(shifted_window_regions(self.size, self.window, self.shift, device="cpu"))

    def forward(
        self,
        token_q: Tensor | None = None,
        token_k: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FactoredBias:
        """Make the bias of all windows, or of some of their tokens.

        Args:
            token_q: `[N]` integers, which tokens of each window are the queries; default all.
            token_k: `[M]` integers, which tokens are the keys; default all.
            dtype: of the factors; a half, if it holds the penalty, makes for fewer columns in the kernels.

        Returns:
            phi_q `[windows, 1, N, R]` and phi_k `[windows, 1, M, R]`, R = 2^s - 1.

        Raises:
            ValueError: a `dtype` that does not hold the penalty.
        """
        _check_dtype(self.penalty, dtype)
        region = self.get_buffer("region")[:, None]
        region_q = region if token_q is None else region[..., token_q]
        region_k = region if token_k is None else region[..., token_k]
        regions = torch.arange(self.num_regions, device=region.device)
        return region_factors(region_q, region_k, regions, self.penalty, dtype)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        sides = f"size={self.size}, window={self.window}, shift={self.shift}"
        return f"num_heads={self.num_heads}, {sides}, penalty={self.penalty}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Windows that are square or not, one axis without a shift, a single window, a video."""

        def dense(bias: ShiftedWindowMask) -> Tensor:
            """Roll the image, and compare where the tokens of a window came from."""
            axes = [torch.arange(length) for length in bias.size]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
            rolled = places.roll([-shift for shift in bias.shift], list(range(len(bias.size))))
            index = [torch.arange(0, length, side) for length, side in zip(bias.size, bias.window, strict=True)]
            corners, steps = torch.cartesian_prod(*index), torch.cartesian_prod(*map(torch.arange, bias.window))
            came_from = rolled[(corners[:, None] + steps).unbind(-1)]
            # Tokens that a roll has brought over an edge came from the first `shift` places of that axis.
            beyond = (came_from < torch.tensor(bias.shift)).double()
            different = (beyond[:, :, None] != beyond[:, None, :]).any(-1).double()
            return bias.penalty * (beyond.any(-1).double()[..., None] - different)[:, None]

        def build(bias: ShiftedWindowMask, queries: range, keys: range) -> FactoredBias:
            device = bias.get_buffer("region").device
            return bias(*(torch.tensor(part, device=device) for part in (queries, keys)))

        def example(name: str, bias: ShiftedWindowMask) -> Example:
            return Example(name, bias, bias.num_tokens, bias.num_tokens, build, dense)

        return [
            example("image", cls(2, (6, 9), (3, 3))),
            example("oblong", cls(1, (4, 9), (2, 3), (1, 2), penalty=200.0)),
            example("one-axis", cls(2, (4, 4), (4, 2), (0, 1))),
            example("one-window", cls(1, (4, 4), (4, 4))),
            example("video", cls(1, (4, 2, 4), (2, 2, 2))),
        ]


def region_factors(
    region_q: Tensor, region_k: Tensor, regions: Tensor, penalty: float, dtype: torch.dtype
) -> FactoredBias:
    """Make the factors of a mask from regions that are known to be right.

    Args:
        region_q: `[N]` or `[*batch, H or 1, N]` integers.
        region_k: `[M]` or `[*batch, H or 1, M]` integers.
        regions: `[G]`, the numbers that occur; the first is the reference.
        penalty: what a pair from two regions loses.
        dtype: of the factors.

    Returns:
        phi_q and phi_k of rank G - 1.
    """
    region_q, region_k = (x[None] if x.dim() == 1 else x for x in (region_q, region_k))
    is_q, is_k = ((x[..., None] == regions).to(dtype) for x in (region_q, region_k))
    return FactoredBias(penalty * (is_q[..., 1:] - is_q[..., :1]), is_k[..., 1:])


def shifted_window_regions(
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Number the regions of all windows of a rolled image.

    Args:
        size: the sides of the image, multiples of the window's.
        window: the sides of a window.
        shift: by how many tokens each axis is rolled.
        device: where the result lives.

    Returns:
        `[windows, N]` int64, windows and tokens in row-major order: 2^a summed over the axes a, counted among those
        with a shift, beyond whose edge a token lies.
    """
    axes, shifted = len(size), [axis for axis, by in enumerate(shift) if by > 0]
    region = torch.zeros(*size, dtype=torch.int64, device=device)
    for bit, axis in enumerate(shifted):
        beyond = torch.arange(size[axis], device=device) >= size[axis] - shift[axis]
        region = region + (beyond.long() << bit).view([-1 if other == axis else 1 for other in range(axes)])
    # [windows, side, windows, side, …] to windows before sides.
    cut = region.view([n for length, side in zip(size, window, strict=True) for n in (length // side, side)])
    return cut.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)).reshape(-1, math.prod(window))


def _checked_penalty(penalty: float) -> float:
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < math.inf:
        raise ValueError(f"penalty must be a positive finite number, got {penalty!r}")
    return float(penalty)


def _check_dtype(penalty: float, dtype: torch.dtype) -> None:
    """The penalty must be in the range of the dtype, and a half must hold it exactly."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    info = torch.finfo(dtype)
    in_range = info.tiny <= penalty <= info.max
    exact = info.bits > 16 or (math.frexp(penalty)[0] * 2 / info.eps).is_integer()
    if not in_range or not exact:
        raise ValueError(f"dtype {dtype} does not hold the penalty {penalty}; take 100, or a wider dtype")
