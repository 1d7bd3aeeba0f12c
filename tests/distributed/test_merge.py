"""Blocks merged by their log-sum-exp are the softmax over all keys."""

from __future__ import annotations

import math

import pytest
import torch

from flashbias.distributed.merge import Merged
from flashbias.distributed.parcel import Parcel


def test_blocks_make_the_whole() -> None:
    scores, v = 30 * torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    merged = Merged(torch.zeros(2, 5, 4, dtype=torch.float64), head_dim_v=3)
    for keys in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = scores[..., keys]
        merged.add(slice(0, 5), part.softmax(-1) @ v[:, keys], part.logsumexp(-1))
    torch.testing.assert_close(merged.out, scores.softmax(-1) @ v, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.lse, scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


def test_rows_that_see_nothing_stay_zero() -> None:
    merged = Merged(torch.zeros(1, 3, 4), head_dim_v=2)
    nothing = torch.full((1, 2), -math.inf, dtype=torch.float64)
    merged.add(slice(0, 2), torch.zeros(1, 2, 2), nothing)
    merged.add(slice(1, 3), torch.ones(1, 2, 2), torch.zeros(1, 2, dtype=torch.float64))
    merged.add(slice(1, 3), torch.zeros(1, 2, 2), nothing)
    assert merged.out[0, :, 0].tolist() == [0.0, 1.0, 1.0]
    assert merged.lse[0].tolist() == [-math.inf, 0.0, 0.0]


def test_one_block_of_all_rows_is_taken_as_it_is() -> None:
    """Where there is one block only, nothing is copied or rounded; blocks that come later do not write to it."""
    out, lse = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, dtype=torch.float64)
    merged, before = Merged(torch.zeros(2, 3, 4).bfloat16(), head_dim_v=4), (out.clone(), lse.clone())
    merged.add(slice(0, 3), out, lse)
    assert merged.out.data_ptr() == out.data_ptr() and merged.lse.data_ptr() == lse.data_ptr()
    merged.add(slice(1, 3), out[:, 1:], lse[:, 1:])
    assert merged.out.dtype == torch.float32
    torch.testing.assert_close(merged.out, out.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.lse[:, 1:], lse[:, 1:] + math.log(2))
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


def test_constants_of_rows_do_not_cost_accuracy() -> None:
    """A gauge such as ALiBi's slope * j shifts a row by 2^20; float32 would not resolve by what blocks differ."""
    shift = 2.0**20 + 0.1
    lse = torch.tensor([[shift]], dtype=torch.float64)
    merged = Merged(torch.zeros(1, 1, 4), head_dim_v=1)
    merged.add(slice(0, 1), torch.zeros(1, 1, 1), lse)
    merged.add(slice(0, 1), torch.ones(1, 1, 1), lse + 0.01)
    assert merged.out.item() == pytest.approx(1 / (1 + math.exp(-0.01)), rel=1e-6)


def test_a_message_holds_tensors_of_several_dtypes() -> None:
    tensors = [torch.arange(3), torch.randn(2, 1, 5).bfloat16(), torch.randn(0, 4), torch.randn(7, dtype=torch.float64)]
    parcel = Parcel.like(tensors)
    buffer = parcel.pack(tensors)
    assert buffer.dtype == torch.uint8 and buffer.numel() == parcel.nbytes
    for x, y in zip(tensors, parcel.unpack(buffer), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype
        assert y.data_ptr() % 16 == 0 or not y.numel()
    assert Parcel.like([torch.zeros(0)]).pack([torch.zeros(0)]).numel() > 0
