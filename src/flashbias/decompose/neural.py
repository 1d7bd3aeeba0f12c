"""FlashBias: Fast Computation of Attention with Bias.

https://arxiv.org/abs/2505.12044, section 3.2 and appendix H: a bias that depends on the content of a pair of tokens
(AlphaFold's pair bias, a distance on a sphere) is replaced by the product of two functions of one token each,

    b[h, i, j] = phi_q(x_i)[h] . phi_k(x_j)[h],

each of them three linear layers with tanh between them. `distill` trains the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashbias.factored import FactoredBias

__all__ = ["NeuralBias"]


class NeuralBias(nn.Module):
    """A bias computed from the features of the tokens, factored by construction.

    Formula: `b[h, i, j] = phi_q(x_i)[h] . phi_k(x_j)[h]`, with two token-wise networks of rank R per head.

    Use it for a bias that no formula factors and that changes with the input. Cost: `O((N + M) * parameters)`, never
    N×M. The defaults are the paper's; for AlphaFold it takes 577 features to 4 heads of rank 96.

    The last layers are drawn so that the standard deviation of an entry of the initial bias is at most about
    `init_std`, whatever the rank: attention begins almost unbiased, and both networks receive a gradient at once.

    Factors come in the dtype in which the last layer computes: float32, or bfloat16 under such an autocast. The bias
    that they stand for is then rounded accordingly; call the module outside of autocast where that matters.

    Args:
        in_features: F, the number of features of a query's token.
        num_heads: H.
        rank: R.
        in_features_k: number of features of a key's token; default F.
        hidden: widths of the hidden layers; empty for factors that are linear in the features.
        shared: let queries and keys share the hidden layers, and only the last layers differ. About half the cost
            where queries and keys are the same tokens; the bias may still be asymmetric or of any sign.
        init_std: bound on the standard deviation of an entry of the initial bias, positive.

    Attributes:
        trunk_q: standardisation and hidden layers of the queries.
        trunk_k: the same for the keys; None if they are shared.
        last_q: the last layer of the queries, to H·R columns.
        last_k: the last layer of the keys.

    Raises:
        ValueError: a size is not a positive integer, `init_std` is not positive, or `shared` with different features.

    Supports:
        autocast and `torch.compile`; gradients to parameters and features.

    Examples:
        >>> import torch
        >>> bias = NeuralBias(in_features=7, num_heads=4, rank=8, hidden=(32, 32))
        >>> bias(torch.randn(2, 50, 7)).shape
        torch.Size([2, 4, 50, 50])

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, section 3.2 and table 12.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        rank: int,
        *,
        in_features_k: int | None = None,
        hidden: Sequence[int] = (256, 256),
        shared: bool = False,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        in_features_k = in_features if in_features_k is None else in_features_k
        for name, value in (
            ("in_features", in_features),
            ("in_features_k", in_features_k),
            ("num_heads", num_heads),
            ("rank", rank),
            *(("each entry of hidden", width) for width in hidden),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if shared and in_features != in_features_k:
            raise ValueError(
                f"shared=True needs the same features for queries and keys, got in_features={in_features} "
                f"and in_features_k={in_features_k}"
            )
        if not init_std > 0 or math.isinf(init_std):
            raise ValueError(f"init_std must be positive and finite, got {init_std!r}")
        self.in_features, self.in_features_k = in_features, in_features_k
        self.num_heads, self.rank, self.shared, self.init_std = num_heads, rank, shared, init_std
        self.hidden = tuple(hidden)
        self.trunk_q = _Trunk(in_features, hidden)
        self.trunk_k = None if shared else _Trunk(in_features_k, hidden)
        self.last_q = nn.Linear(hidden[-1] if hidden else in_features, num_heads * rank)
        self.last_k = nn.Linear(hidden[-1] if hidden else in_features_k, num_heads * rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and forget the standardisation (needed after `to_empty`)."""
        for trunk in (self.trunk_q, self.trunk_k):
            if trunk is not None:
                trunk.reset_parameters()
        # What enters is of size 1 at most, so a column of phi has at most the deviation s, and a sum of R products
        # of two such columns sqrt(R) s^2.
        std = math.sqrt(self.init_std / math.sqrt(self.rank))
        for last in (self.last_q, self.last_k):
            nn.init.normal_(last.weight, std=std / math.sqrt(last.in_features))
            nn.init.zeros_(last.bias)

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> FactoredBias:
            """Typed, because `nn.Module` leaves it open."""
            ...

    def forward(self, x_q: Tensor, x_k: Tensor | None = None) -> FactoredBias:
        """Make the bias between the tokens of two sets of features.

        Args:
            x_q: `[*batch, N, F]`, the queries' features, in the dtype of the parameters (any under autocast).
            x_k: `[*batch, M, F_k]`, the keys' features; default those of the queries. Batch dimensions broadcast.

        Returns:
            phi_q `[*batch, H, N, R]` and phi_k `[*batch, H, M, R]`.

        Raises:
            TypeError: features are not floating point, or of another dtype than the parameters.
            ValueError: features of another number or without a token dimension, or batches that do not broadcast.
        """
        self._check("x_q", x_q, self.in_features)
        if x_k is None and self.in_features_k != self.in_features:
            raise ValueError(f"x_k must be given: keys have {self.in_features_k} features, queries {self.in_features}")
        if x_k is not None:
            self._check("x_k", x_k, self.in_features_k)
        hidden_q = self.trunk_q(x_q)
        if self.trunk_k is not None:
            hidden_k = self.trunk_k(x_q if x_k is None else x_k)
        else:
            hidden_k = hidden_q if x_k is None else self.trunk_q(x_k)
        return FactoredBias(self._split_heads(self.last_q(hidden_q)), self._split_heads(self.last_k(hidden_k)))

    def lengths(self, x_q: Tensor, x_k: Tensor | None = None) -> tuple[int, int]:
        """Return N and M for these features."""
        return x_q.shape[-2], (x_q if x_k is None else x_k).shape[-2]

    def block(self, queries: Tensor, keys: Tensor, x_q: Tensor, x_k: Tensor | None = None) -> FactoredBias:
        """Make the bias between some of the tokens, at the cost of these alone.

        Args:
            queries: `[n]` indices of queries.
            keys: `[m]` indices of keys.
            x_q: as in `forward`.
            x_k: as in `forward`.

        Returns:
            The bias of n queries and m keys.
        """
        return self(x_q[..., queries, :], (x_q if x_k is None else x_k)[..., keys, :])

    @torch.no_grad()
    def standardize(self, x_q: Tensor, x_k: Tensor | None = None) -> NeuralBias:
        """Fix the scale of the features, from typical ones: each is then read with mean 0 and deviation 1.

        Without it, features are read as they are. Call it once, before training, if they are coordinates in metres or
        sums of many terms: tanh sees nothing beyond a size of about 2. A feature that is constant is only shifted.

        Args:
            x_q: `[..., F]`.
            x_k: `[..., F_k]`; default those of the queries.

        Returns:
            The module itself.

        Raises:
            TypeError: features are not floating point.
            ValueError: another number of features, or fewer than two tokens.
        """
        x_k = x_q if x_k is None else x_k
        for name, x, features in (("x_q", x_q, self.in_features), ("x_k", x_k, self.in_features_k)):
            _check_features(name, x, features)
            if x.numel() < 2 * features:
                raise ValueError(f"{name} must hold at least two tokens, got shape {tuple(x.shape)}")
        if self.trunk_k is None:
            self.trunk_q.standardize(torch.cat([x_q.reshape(-1, self.in_features), x_k.reshape(-1, self.in_features)]))
        else:
            self.trunk_q.standardize(x_q)
            self.trunk_k.standardize(x_k)
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, rank={self.rank}, shared={self.shared}"

    def _split_heads(self, columns: Tensor) -> Tensor:
        """`[*batch, N, H R]` to `[*batch, H, N, R]`."""
        return columns.unflatten(-1, (self.num_heads, self.rank)).transpose(-3, -2)

    def _check(self, name: str, x: Tensor, features: int) -> None:
        _check_features(name, x, features)
        dtype = self.last_q.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} is {x.dtype} and the parameters are {dtype}: cast one to the dtype of the other")


class _Trunk(nn.Module):
    """Standardise features, then linear layers, each followed by tanh."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, in_features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((in_features, *hidden)))

    def reset_parameters(self) -> None:
        self.mean.zero_()
        self.deviation.fill_(1.0)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="tanh")
            nn.init.zeros_(layer.bias)

    def standardize(self, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1]).double()
        deviation = tokens.std(0)
        self.mean.copy_(tokens.mean(0))
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.deviation
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _check_features(name: str, x: Tensor, features: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {got}")
    if x.dim() < 2 or x.shape[-1] != features:
        raise ValueError(f"{name} must be [*batch, length, {features}], got shape {tuple(x.shape)}")
