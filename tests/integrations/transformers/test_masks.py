"""Masks of one boolean per key, against those that transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from flashbias.attention.call import visible
from flashbias.integrations.transformers import check_version
from flashbias.integrations.transformers.masks import key_mask, ready_made, visibility

KEEP = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]], dtype=torch.bool)


def seen(mask: Tensor, n: int, m: int, is_causal: bool) -> Tensor:
    """`[B, 1, N, M]`: who attends to whom, as `flashbias.attention` reads the words of `visibility`."""
    words = visibility(mask, n, m, is_causal)
    keep = torch.ones(3, 1, n, m, dtype=torch.bool)
    if words["attn_mask"] is not None:
        keep = keep & words["attn_mask"]
    if words.get("is_causal"):
        assert words["causal_alignment"] == "bottom_right"
        keep = keep & visible(torch.arange(m) - torch.arange(n)[:, None] - (m - n), None, 0)
    return keep


@pytest.mark.parametrize("padding", [None, KEEP, torch.ones_like(KEEP)], ids=["none", "some", "full"])
@pytest.mark.parametrize(
    ("request_", "dims"),
    [
        ({"q_length": 6, "kv_length": 6, "mask_function": bidirectional_mask_function}, 2),
        ({"q_length": 4, "kv_length": 6, "mask_function": bidirectional_mask_function}, 2),
        ({"q_length": 6, "kv_length": 6}, 2),
        ({"q_length": 1, "kv_length": 6, "q_offset": 5}, 2),
        ({"q_length": 3, "kv_length": 6, "q_offset": 3}, 2),
        ({"q_length": 2, "kv_length": 4, "q_offset": 4, "kv_offset": 2}, 2),
        ({"q_length": 3, "kv_length": 8, "q_offset": 2}, 4),
        ({"q_length": 3, "kv_length": 8, "q_offset": torch.tensor(2)}, 4),
        ({"q_length": 6, "kv_length": 6, "mask_function": sliding_window_causal_mask_function(2)}, 4),
    ],
    ids=["encoder", "cross", "decoder", "decode", "chunk", "offset", "ahead", "static", "window"],
)
def test_says_what_transformers_says(request_: dict[str, Any], dims: int, padding: Tensor | None) -> None:
    request_ = {"mask_function": causal_mask_function, "q_offset": 0, "kv_offset": 0} | request_
    dense = sdpa_mask(3, attention_mask=padding, allow_is_causal_skip=False, **request_)
    mask = key_mask(3, attention_mask=padding, **request_)
    assert mask.dtype == torch.bool
    assert mask.dim() == dims
    if dims == 2:
        n = request_["kv_length"]
        nothing_hidden = padding is None or bool(padding[:, request_["kv_offset"] :][:, :n].all())
        assert mask.shape == ((1, 1) if nothing_hidden else (3, n))
    is_causal = request_["mask_function"] is not bidirectional_mask_function
    found = seen(mask, request_["q_length"], request_["kv_length"], is_causal)
    assert torch.equal(found, dense.expand_as(found))


def test_keys_beyond_the_padding_mask_are_hidden() -> None:
    """transformers extends a short mask in the same way."""
    mask = key_mask(3, 2, 8, mask_function=bidirectional_mask_function, attention_mask=KEEP)
    assert torch.equal(mask[:, :6], KEEP)
    assert not mask[:, 6:].any()


def test_additive_masks_become_booleans() -> None:
    keep = KEEP[:, None, None, :].expand(3, 1, 4, 6)
    for hidden in (torch.finfo(torch.float32).min, -torch.inf, -1e4):
        assert torch.equal(ready_made(torch.where(keep, 0.0, hidden)), keep)
    assert ready_made(keep) is keep


def test_one_key_alone_may_be_hidden() -> None:
    """A mask of one key looks like the one that hides nothing; it is passed on, and both readings agree."""
    hidden = torch.zeros(1, 1, dtype=torch.bool)
    assert visibility(hidden, 1, 1, True)["attn_mask"].shape == (1, 1, 1, 1)
    assert visibility(~hidden, 4, 4, True)["attn_mask"] is None


def test_older_transformers_is_refused() -> None:
    with pytest.raises(ImportError, match=r"models of transformers 5.23 or newer, found 5.9.1; upgrade"):
        check_version("5.9.1")
    for version in ("5.23.0", "5.23.0.dev0", "6.0"):
        check_version(version)
