"""The call of the factored attention from a patched module, and what `patch` notes there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flashbias.attention import attention
from flashbias.factored import FactoredBias
from flashbias.integrations.base import SETTINGS
from flashbias.integrations.factors import TableFactors
from flashbias.integrations.learned import LearnedTable

__all__ = ["Settings", "call", "settings_of"]


@dataclass
class Settings:
    """What a patched attention needs to know beyond what its module knows.

    Args:
        impl: as in `flashbias.attention`.
        factors: what stands for the attention's learned table; None where it is read as it is.
    """

    impl: str
    factors: TableFactors | LearnedTable | None = field(default=None, kw_only=True)


def settings_of(module: nn.Module) -> Any:
    """Return what `patch` has noted at a module: `Settings`, or those of its family.

    Raises:
        RuntimeError: nothing: the module is not patched, and something sent it here all the same.
    """
    settings = module.__dict__.get(SETTINGS)
    if settings is None:
        raise RuntimeError(
            f"{type(module).__name__} is not patched, yet its attention implementation says so; "
            "leave attn_implementation as it is and call flashbias.patch(model)"
        )
    return settings


def call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None,
    *,
    scale: float,
    dropout_p: float,
    **visibility: Any,
) -> Tensor:
    """Compute the attention of a patched module.

    Args:
        module: the attention, patched; dropout acts if it is in training.
        query: `[*batch, H, N, head_dim]`.
        key: `[*batch, H_kv, M, head_dim]`.
        value: `[*batch, H_kv, M, head_dim]`.
        bias: for N queries and M keys, or None.
        scale: factor of the dot products.
        dropout_p: probability of dropping an attention weight in training.
        visibility: keywords of `flashbias.attention` that say who sees whom; without them all see all.

    Returns:
        `[*batch, N, H, head_dim]`.
    """
    out = attention(
        query,
        key,
        value,
        bias,
        scale=scale,
        enable_gqa=True,
        dropout_p=dropout_p if module.training else 0.0,
        impl=settings_of(module).impl,
        **visibility,
    )
    assert isinstance(out, Tensor)
    return out.transpose(-3, -2)
