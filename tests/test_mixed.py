"""`MixedBias`: every head once, in the form it has, wherever it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import flashbias as fb


def low_rank(heads: int = 2, n: int = 6, m: int = 5, rank: int = 2, batch: tuple[int, ...] = ()) -> fb.FactoredBias:
    return fb.FactoredBias(torch.randn(*batch, heads, n, rank), torch.randn(*batch, heads, m, rank))


def matrix(heads: int = 1, n: int = 6, m: int = 5, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.randn(*batch, heads, n, m)


@pytest.fixture
def bias() -> fb.MixedBias:
    return fb.MixedBias((low_rank(), matrix(1), matrix(2)), heads=((0, 3), (1,), (4, 2)))


def test_heads_stand_where_they_are_named(bias: fb.MixedBias):
    first, second, third = bias.parts
    dense = bias.dense()
    assert dense.shape == bias.shape == (5, 6, 5) and bias.num_heads == 5
    expected = [first.dense()[0], second[0], third[1], first.dense()[1], third[0]]
    assert torch.equal(dense, torch.stack(expected))
    assert bias.order().tolist() == [0, 2, 4, 1, 3]


def test_a_part_may_be_shared_by_its_group():
    shared, one = low_rank(heads=1), matrix(1)
    bias = fb.MixedBias((shared, one), heads=((0, 2), (1, 3)))
    assert torch.equal(bias.dense()[2], shared.dense()[0])
    assert torch.equal(bias.dense()[3], one[0])


def test_batches_broadcast():
    bias = fb.MixedBias((low_rank(batch=(4, 1)), matrix(batch=(3,))), heads=((0, 1), (2,)))
    assert bias.shape == bias.dense().shape == (4, 3, 3, 6, 5)


@pytest.mark.parametrize(
    ("factors", "dense", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),  # neither holds the other
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_dense_takes_the_finest_dtype(factors: torch.dtype, dense: torch.dtype, expected: torch.dtype):
    bias = fb.MixedBias((low_rank().to(factors), matrix().to(dense)), heads=((0, 1), (2,)))
    assert bias.dense().dtype == expected
    assert bias.dense(torch.float64).dtype == torch.float64


def test_moves_and_casts_all_parts(bias: fb.MixedBias):
    other = bias.to(torch.float64)
    assert other.dense().dtype == torch.float64 and other.heads == bias.heads
    assert bias.to("meta").device.type == "meta"
    assert bias.device.type == "cpu"
    assert bias.nbytes == sum(part.nbytes for part in bias.parts)


def test_report_goes_along(bias: fb.MixedBias):
    with_report = fb.MixedBias(bias.parts, bias.heads, report="found")
    assert with_report.to(torch.float64).report == with_report.detach().report == "found"


def test_detached_from_the_graph():
    leaf, dense = torch.randn(2, 6, 2, requires_grad=True), matrix().requires_grad_()
    bias = fb.MixedBias((fb.FactoredBias(leaf, torch.randn(2, 5, 2)), dense), heads=((0, 1), (2,)))
    assert bias.dense().requires_grad and not bias.detach().dense().requires_grad
    bias.dense().sum().backward()
    assert torch.equal(dense.grad, torch.ones_like(dense)) and leaf.grad is not None


def test_is_a_tree_of_tensors(bias: fb.MixedBias):
    leaves, spec = pytree.tree_flatten(bias)
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)
    doubled = pytree.tree_map(lambda x: 2 * x if isinstance(x, Tensor) and x.is_floating_point() else x, bias)
    assert isinstance(doubled, fb.MixedBias) and doubled.heads == bias.heads
    assert torch.equal(pytree.tree_unflatten(leaves, spec).dense(), bias.dense())


def test_shows_forms_and_no_values(bias: fb.MixedBias):
    text = repr(bias)
    assert "[0, 3]: FactoredBias(shape=(2, 6, 5)" in text and "[1]: dense torch.float32" in text
    assert "tensor(" not in text


@pytest.mark.parametrize(
    ("error", "match", "parts", "heads"),
    [
        (ValueError, "one entry per group, got 0", (), ()),
        (ValueError, "one entry per group, got 1", (matrix(),), ((0,), (1,))),
        (
            TypeError,
            "parts must be FactoredBias or floating point tensors, got torch.int64",
            (matrix().long(),),
            ((0,),),
        ),
        (TypeError, "parts must be FactoredBias or floating point tensors, got <class 'int'>", (3,), ((0,),)),
        (ValueError, r"a dense part must be \[\*batch, heads, N, M\], got shape \(6, 5\)", (matrix()[0],), ((0,),)),
        (ValueError, r"a part of 2 heads cannot serve the group \(0, 1, 2\)", (low_rank(),), ((0, 1, 2),)),
        (ValueError, r"a part of 1 heads cannot serve the group \(\)", (matrix(),), ((),)),
        (ValueError, "heads must name each of 0 … 1 once", (matrix(), matrix()), ((0,), (0,))),
        (ValueError, "heads must name each of 0 … 1 once", (matrix(), matrix()), ((0,), (2,))),
        (ValueError, "heads must name each of 0 … 0 once", (matrix(),), ((-1,),)),
        (ValueError, r"the same N and M, got \[\(6, 5\), \(6, 7\)\]", (matrix(), matrix(m=7)), ((0,), (1,))),
        (ValueError, "batch dimensions of parts", (matrix(batch=(2,)), matrix(batch=(3,))), ((0,), (1,))),
        (ValueError, "on one device, got", (matrix(), matrix().to("meta")), ((0,), (1,))),
    ],
)
def test_bad_input(error: type[Exception], match: str, parts: Any, heads: Any):
    with pytest.raises(error, match=match):
        fb.MixedBias(parts, heads)
