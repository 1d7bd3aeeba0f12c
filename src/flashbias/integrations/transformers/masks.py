"""Masks that are never N×M: one boolean per key, and causality by position.

transformers asks an interface for its masks, by the name in a model's configuration. The one registered here answers

    [B, M] booleans     the keys that are no padding; whether queries see later keys, the attention itself knows
    [1, 1] True         nothing is padding
    [B, 1, N, M]        anything else, such as a cache of fixed size that queries fill in the middle

so the number of dimensions says which of the two readings holds. True means that a pair attends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

__all__ = ["IMPLEMENTATION", "MASKS_ONLY", "key_mask", "ready_made", "visibility"]

IMPLEMENTATION = "factored_bias"
"""Attention implementation of models that go through transformers' AttentionInterface. A name with "flash" in it
would be taken for FlashAttention."""

MASKS_ONLY = "factored_bias_masks"
"""The same for models that do not. It names masks and no attention, so transformers builds no model with it."""

HIDDEN = -1e4
"""Additive masks hide a pair with this or less: the least that any of the models has used."""


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Answer transformers' request for a mask.

    Args:
        batch_size: B.
        q_length: N.
        kv_length: M.
        q_offset: position of the first query; a tensor for caches of fixed size.
        kv_offset: position of the first key.
        mask_function: which pairs attend, padding aside.
        attention_mask: `[B, positions]` booleans, True where a token is no padding.
        device: where the mask lives.
        **kwargs: what other interfaces take.

    Returns:
        A mask as the module's text says.
    """
    if not _said_by_position(mask_function, q_length, kv_length, q_offset, kv_offset):
        request: dict[str, Any] = kwargs | {
            "batch_size": batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": mask_function,
            "attention_mask": attention_mask,
            "device": device,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": False,
        }
        dense = sdpa_mask(**request)
        assert dense is not None, "skipping the mask was not allowed"
        return dense
    if attention_mask is not None:
        missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        keys = pad(attention_mask.to(device, torch.bool), (0, missing))[:, kv_offset : kv_offset + kv_length]
        if is_tracing(keys) or not keys.all():
            return keys
    return torch.ones(1, 1, dtype=torch.bool, device=device)


def _said_by_position(
    mask_function: Callable[..., Any], q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> bool:
    """Whether queries see all keys, or all up to their own position with the last query at the last key."""
    if mask_function is bidirectional_mask_function:
        return True
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    return mask_function is causal_mask_function and ends_together


def ready_made(mask: Tensor) -> Tensor:
    """Turn a mask `[B, 1, N, M]` that the caller has made into booleans.

    Raises:
        TypeError: it is neither boolean nor floating point.
        ValueError: it holds something between 0 and "hidden": that is a bias, and would be lost.
        NotImplementedError: it is floating point while a graph is traced, where its values cannot be read.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"attention_mask of 4 dimensions must be bool (True attends) or additive, got {mask.dtype}")
    if is_tracing(mask):
        raise NotImplementedError("attention_mask of 4 dimensions must be bool where a graph is traced")
    visible = mask == 0
    if not (visible | (mask <= HIDDEN)).all():
        raise ValueError(
            f"attention_mask of 4 dimensions must hold 0 (attends) and values <= {HIDDEN:g} (hidden) only; "
            "a bias cannot travel in the mask of a patched model"
        )
    return visible


def visibility(mask: Tensor | None, seqlen_q: int, seqlen_k: int, is_causal: bool) -> dict[str, Any]:
    """Say in the words of `flashbias.attention` who sees whom.

    Args:
        mask: as `key_mask` returns it; None hides nothing.
        seqlen_q: N.
        seqlen_k: M.
        is_causal: whether queries see no later key. A mask of four dimensions has that in it already.

    Returns:
        Keywords for `flashbias.attention`.
    """
    if mask is not None and mask.dim() == 4:
        return {"attn_mask": mask}
    hides = mask is not None and mask.shape[-1] == seqlen_k
    return {
        "attn_mask": mask[:, None, None, :] if hides and mask is not None else None,
        "is_causal": is_causal and seqlen_q > 1,
        "causal_alignment": "bottom_right",
    }


AttentionMaskInterface.register(IMPLEMENTATION, key_mask)
AttentionMaskInterface.register(MASKS_ONLY, key_mask)
