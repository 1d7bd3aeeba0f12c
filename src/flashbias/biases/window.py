"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.

https://arxiv.org/abs/2103.14030; in 3-D Video Swin (https://arxiv.org/abs/2106.13230); with a class token
BEiT (https://arxiv.org/abs/2106.08254).

    b[h, i, j]  = weight[index(p_i - p_j), h]      p_i the place of token i in its window
    code[i]     = y_i * (2W - 1) + x_i             in 3-D  (z_i * (2H - 1) + y_i) * (2W - 1) + x_i
    table[h, d] = weight[T//2 - d, h]              T = (2H - 1)(2W - 1) entries, for d = code[j] - code[i]
    phi_q, phi_k: none
    rank        = 0
    exactness   : equal to the bit.

Two offsets never share a code difference, since |x_i - x_j| < W; so the whole table is read by one number.
Models number their tables by query minus key and the library's by key minus query, hence the reversal.

A class token has no place. It gets codes that reach entries of its own, outside those of the window, two on
either side of it:

    … window … | class -> class | token -> class, and everything further      (right)
    everything further, and class -> token | the same | … window …            (left)

With half = T//2, tokens have codes 0 … half. As a query, the class token has 2*half + 1, which puts every
token at least half + 1 to its left. As a key, it has 3*half + 2: half + 1 to the right of itself as a query,
and at least 2*half + 2 to the right of every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flashbias.biases.base import About, Bias, Example, checked_sides, wide_dtype
from flashbias.factored import FactoredBias

__all__ = ["WindowBias", "window_codes", "window_table"]


class WindowBias(Bias):
    """A learned bias per offset within a 2-D or 3-D window: Swin, Video Swin, BEiT.

    Formula: `b[h, i, j] = weight[index(p_i - p_j), h]`, `index(dy, dx) = (dy + H-1) (2W-1) + (dx + W-1)`.

    Exact, and stored as the table itself. Where a head's table has a low rank, decomposing it is faster;
    this form is right for the heads where it has not.

    Args:
        num_heads: H.
        window: `(height, width)`, or `(depth, height, width)`; tokens are in row-major order.
        class_token: a class token stands before the others. `weight` then ends with three more rows: class
            token to token, token to class token, class token to itself.

    Attributes:
        weight: `[T, H]` or `[T + 3, H]`, the layout of timm's and transformers'
            `relative_position_bias_table`; T is the product of `2 * side - 1`.

    Raises:
        ValueError: `window` is not 2 or 3 positive integers.

    Examples:
        >>> import flashbias as fb
        >>> bias = fb.WindowBias(num_heads=4, window=(7, 7))()
        >>> bias.shape, bias.table.shape
        (torch.Size([4, 49, 49]), torch.Size([4, 169]))

    Reference:
        Liu et al., https://arxiv.org/abs/2103.14030, equation 4; Bao et al., https://arxiv.org/abs/2106.08254.
    """

    about = About(
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        url="https://arxiv.org/abs/2103.14030",
        formula="weight[index(p_i - p_j), h], p the place in the window",
        rank="0, a table of (2H - 1)(2W - 1) entries (with a class token, 4 more)",
        exactness="equal to the bit",
        bound=0.0,
    )

    def __init__(self, num_heads: int, window: Sequence[int], class_token: bool = False) -> None:
        super().__init__(num_heads)
        self.window = checked_sides("window", window, (2, 3))
        self.class_token = class_token
        self.num_offsets = math.prod(2 * side - 1 for side in self.window)
        self.num_tokens = math.prod(self.window) + class_token
        self.weight = nn.Parameter(torch.empty(self.num_offsets + 3 * class_token, num_heads))
        for name in ("code_q", "code_k"):
            self.register_buffer(name, torch.empty(self.num_tokens, dtype=torch.int32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, and fill in the codes (needed after `to_empty`)."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        for name, code in zip(("code_q", "code_k"), window_codes(self.window, self.class_token), strict=True):
            self.get_buffer(name).copy_(code)

    def forward(self, token_q: Tensor | None = None, token_k: Tensor | None = None) -> FactoredBias:
        """Make the bias of the window, or of some of its tokens.

        Args:
            token_q: `[N]` integers, which tokens are the queries; default all, class token first.
            token_k: `[M]` integers, which tokens are the keys; default all.

        Returns:
            A table, differentiable with respect to `weight`, with codes of length N and M.
        """
        code_q, code_k = self.get_buffer("code_q"), self.get_buffer("code_k")
        code_q = code_q if token_q is None else code_q[token_q]
        code_k = code_k if token_k is None else code_k[token_k]
        return FactoredBias.from_table(self.table(), len(code_q), len(code_k), code_q, code_k)

    def table(self) -> Tensor:
        """`[H, T]`, or `[H, T + 4]` with a class token: the bias per code difference, float32 at least."""
        return window_table(self.weight, self.class_token)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, window={self.window}, class_token={self.class_token}"

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """2-D and 3-D, sides that differ, with and without a class token."""

        def example(name: str, window: tuple[int, ...], class_token: bool) -> Example:
            def build(bias: WindowBias, queries: range, keys: range) -> FactoredBias:
                device = bias.weight.device
                return bias(torch.tensor(queries, device=device), torch.tensor(keys, device=device))

            def dense(bias: WindowBias) -> Tensor:
                axes = [torch.arange(side) for side in bias.window]
                place = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
                index = torch.zeros(place.shape[1], place.shape[1], dtype=torch.int64)
                for side, axis in zip(bias.window, place, strict=True):
                    index = index * (2 * side - 1) + (axis[:, None] - axis[None, :] + side - 1)
                if bias.class_token:
                    index = nn.functional.pad(index, (1, 0, 1, 0))
                    last = bias.weight.shape[0]
                    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
                return bias.weight.double()[index.to(bias.weight.device)].permute(2, 0, 1)

            bias = cls(3, window, class_token)
            return Example(name, bias, bias.num_tokens, bias.num_tokens, build, dense)

        return [
            example("2d", (3, 4), False),
            example("3d", (2, 3, 2), False),
            example("class-token", (3, 2), True),
            example("3d-class-token", (2, 1, 3), True),
            example("one-place", (1, 1), True),
        ]


def window_table(weight: Tensor, class_token: bool) -> Tensor:
    """The bias per code difference.

    Args:
        weight: `[T, H]`, or `[T + 3, H]` with a class token, as in `WindowBias`.
        class_token: whether there is one.

    Returns:
        `[H, T]`, or `[H, T + 4]` with a class token, float32 at least.
    """
    weight = weight.to(wide_dtype(weight))
    if not class_token:
        return weight.flip(0).mT.contiguous()
    class_to_token, token_to_class, class_to_class = weight[-3:].split(1)
    left, right = [class_to_token, class_to_token], [class_to_class, token_to_class]
    return torch.cat([*left, weight[:-3].flip(0), *right]).mT.contiguous()


def window_codes(window: Sequence[int], class_token: bool) -> tuple[Tensor, Tensor]:
    """Codes of the tokens of a window as queries and as keys, int32 on the CPU: differences tell offsets apart."""
    place = torch.zeros(1, dtype=torch.int32, device="cpu")
    for side in window:
        place = (place[:, None] * (2 * side - 1) + torch.arange(side, dtype=torch.int32, device="cpu")).flatten()
    half = math.prod(2 * side - 1 for side in window) // 2
    code_q, code_k = (
        torch.cat([place.new_full((int(class_token),), class_code), place])
        for class_code in (2 * half + 1, 3 * half + 2)
    )
    return code_q, code_k
