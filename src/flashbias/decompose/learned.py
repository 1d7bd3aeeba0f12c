"""`LowRankBias`: factors as parameters, trained in place of an N×M table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashbias.factored import FactoredBias

__all__ = ["LowRankBias"]


class LowRankBias(nn.Module):
    """A learned bias between fixed positions, held as two factors.

    Formula: `b[h, i, j] = phi_q[h, i] . phi_k[h, j] (+ table[h, clip(code_k[j] - code_q[i])])`.

    Use it where a model would learn a table of N×M numbers per head: it learns `(N + M) R` of them. Begin from
    scratch, or from factors that are known already (`from_bias`), to tune what a compression has found.

    Both factors start as normal noise of the same size, chosen so that an entry of the bias has the standard deviation
    `init_std`. The gradient of one factor is the gradient of the bias times the other one: with both at zero nothing
    would ever move, and with one at zero the other would wait for it.

    Args:
        num_heads: H.
        seqlen_q: N.
        seqlen_k: M.
        rank: R, at least 1.
        batch_shape: leading dimensions, for instance one bias per window; default none.
        init_std: standard deviation of an entry of the initial bias, positive.

    Attributes:
        phi_q: `[*batch, H, N, R]` float32 parameter.
        phi_k: `[*batch, H, M, R]` float32 parameter.
        table: `[H or 1, T]` parameter, or None; only `from_bias` makes one.
        code_q: `[N]` integer buffer, or None.
        code_k: `[M]` integer buffer, or None.
        ranks: one integer per head, or None. Columns at and beyond it are zero, take no part, and stay zero.

    Raises:
        ValueError: a size is not a positive integer, or `init_std` is not positive.

    Examples:
        >>> import torch
        >>> bias = LowRankBias(num_heads=4, seqlen_q=64, seqlen_k=80, rank=3)
        >>> bias().shape, sum(p.numel() for p in bias.parameters())
        (torch.Size([4, 64, 80]), 1728)
        >>> bias(queries=slice(0, 16)).shape
        torch.Size([4, 16, 80])

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, section 3.2.
    """

    phi_q: nn.Parameter
    phi_k: nn.Parameter
    table: nn.Parameter | None
    code_q: Tensor | None
    code_k: Tensor | None
    ranks: tuple[int, ...] | None

    def __init__(
        self,
        num_heads: int,
        seqlen_q: int,
        seqlen_k: int,
        rank: int,
        *,
        batch_shape: Sequence[int] = (),
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k), ("rank", rank)):
            _check_size(name, value)
        for value in batch_shape:
            _check_size("each entry of batch_shape", value)
        if not init_std > 0 or math.isinf(init_std):
            raise ValueError(f"init_std must be positive and finite, got {init_std!r}")
        self.init_std = init_std
        shape = (*batch_shape, num_heads)
        phi_q, phi_k = torch.empty(*shape, seqlen_q, rank), torch.empty(*shape, seqlen_k, rank)
        self._hold(FactoredBias(phi_q.float(), phi_k.float()))
        self.reset_parameters()

    @classmethod
    def from_bias(cls, bias: FactoredBias) -> LowRankBias:
        """Make a trainable copy of factors.

        Args:
            bias: what a bias family or a compression returns. Its values are copied, half precision widened to
                float32; its codes become buffers, and its `ranks` are kept.

        Returns:
            A module whose call gives the same bias, to the bit.

        Raises:
            TypeError: `bias` is no FactoredBias.

        Examples:
            >>> import flashbias as fb
            >>> module = LowRankBias.from_bias(fb.RelativeBuckets(num_heads=2)(8, 8))
            >>> [name for name, p in module.named_parameters() if p.numel()]
            ['table']
        """
        if not isinstance(bias, FactoredBias):
            raise TypeError(f"bias must be a FactoredBias, got {type(bias).__name__}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.init_std = None
        module._hold(bias.detach())
        return module

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> FactoredBias:
            """Typed, because `nn.Module` leaves it open."""
            ...

    def reset_parameters(self) -> None:
        """Draw new factors (needed after `to_empty`).

        Raises:
            RuntimeError: the factors came from a bias, so there is nothing to draw them from.
        """
        if self.init_std is None:
            raise RuntimeError("these factors came from a bias and cannot be drawn: load a state_dict instead")
        # A sum of R products of two normal numbers of deviation s has the deviation sqrt(R) s^2.
        std = math.sqrt(self.init_std / math.sqrt(self.phi_q.shape[-1]))
        nn.init.normal_(self.phi_q, std=std)
        nn.init.normal_(self.phi_k, std=std)

    def forward(self, queries: slice = slice(None), keys: slice = slice(None)) -> FactoredBias:
        """Make the bias, or a block of it.

        Args:
            queries: slice of `0 … N-1`, of step 1; default all.
            keys: slice of `0 … M-1`, of step 1; default all.

        Returns:
            The parameters themselves as a bias: nothing is computed, and gradients reach them.
        """
        bias = FactoredBias(self.phi_q, self.phi_k, self.table, self.code_q, self.code_k, self.ranks)
        everything = slice(None)
        return bias if queries == keys == everything else bias.slice(queries, keys)

    def get_extra_state(self) -> Tensor:
        """`ranks` as integers, empty for None: a tensor, so that any format can store it."""
        return torch.tensor(self.ranks or (), dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take `ranks` from a state_dict."""
        self.ranks = tuple(int(r) for r in state.tolist()) or None

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return repr(self())[len("FactoredBias(") : -1]

    def _hold(self, bias: FactoredBias) -> None:
        """Copy a bias into parameters and buffers."""
        self.phi_q = nn.Parameter(_widened(_without_padding(bias, bias.phi_q)))
        self.phi_k = nn.Parameter(_widened(_without_padding(bias, bias.phi_k)))
        self.register_parameter("table", None if bias.table is None else nn.Parameter(_widened(bias.table)))
        self.register_buffer("code_q", None if bias.code_q is None else bias.code_q.clone())
        self.register_buffer("code_k", None if bias.code_k is None else bias.code_k.clone())
        self.ranks = None if bias.ranks is None else tuple(bias.ranks)


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _widened(tensor: Tensor) -> Tensor:
    """A contiguous copy in float32 at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _without_padding(bias: FactoredBias, phi: Tensor) -> Tensor:
    """Zero the columns that no head of the factor reads: nothing feeds them, so an optimiser leaves them there."""
    if bias.ranks is None:
        return phi
    read = bias.rank_mask()
    read = read.any(0, keepdim=True) if phi.shape[-3] == 1 else read
    return torch.where(read[:, None, :], phi, 0.0)
