"""The one data type: what it says is what its matrix says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import flashbias as fb
from flashbias.attention.packing import row_constant
from flashbias.factored import relative_lookup


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def plain(n: int = 5, m: int = 7) -> fb.FactoredBias:
    return fb.FactoredBias(draw(2, 1, n, 3), draw(1, 4, m, 3))


def with_table(n: int = 5, m: int = 7) -> fb.FactoredBias:
    return fb.FactoredBias(draw(4, n, 3), draw(1, m, 3), draw(4, 5))


def with_codes(n: int = 5, m: int = 7) -> fb.FactoredBias:
    code_q, code_k = torch.randint(-9, 9, (n,)), torch.randint(-9, 9, (m,), dtype=torch.int32)
    return fb.FactoredBias(draw(1, n, 3), draw(1, m, 3), draw(1, 7), code_q, code_k)


def with_ranks(n: int = 5, m: int = 7) -> fb.FactoredBias:
    return fb.FactoredBias(draw(3, n, 4), draw(3, m, 4), ranks=(4, 0, 2))


def table_only(n: int = 5, m: int = 7) -> fb.FactoredBias:
    return fb.FactoredBias.from_table(draw(2, 9), n, m)


KINDS: list[Callable[..., fb.FactoredBias]] = [plain, with_table, with_codes, with_ranks, table_only]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def entry(bias: fb.FactoredBias, b: int, h: int, i: int, j: int) -> float:
    """One entry of the matrix, by the definition."""

    def of(x: Tensor) -> Tensor:
        x = x.reshape(*(1,) * (4 - x.dim()), *x.shape)
        return x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]

    rank = bias.rank if bias.ranks is None else bias.ranks[h]
    total = float(of(bias.phi_q)[i, :rank] @ of(bias.phi_k)[j, :rank])
    if bias.table is not None:
        half = bias.table.shape[1] // 2
        code_q = i if bias.code_q is None else int(bias.code_q[i])
        code_k = j if bias.code_k is None else int(bias.code_k[j])
        difference = max(-half, min(half, code_k - code_q))
        total += float(bias.table[min(h, bias.table.shape[0] - 1), difference + half])
    return total


def test_dense_is_as_wide_as_the_widest_part() -> None:
    """A table of float32 beside factors of bfloat16 would lose its last bits in theirs."""
    table = torch.tensor([[0.1, 0.2, 0.3]])
    bias = fb.FactoredBias(torch.ones(1, 4, 2).bfloat16(), torch.ones(1, 4, 2).bfloat16(), table)
    assert bias.dense().dtype == torch.float32
    assert torch.equal(bias.dense().diagonal(1, -2, -1)[0], torch.full((3,), 2.0) + table[0, 2])
    assert bias.dense(torch.bfloat16).dtype == torch.bfloat16


@kinds
def test_dense_is_the_definition(kind: Callable[..., fb.FactoredBias]) -> None:
    bias = kind()
    dense = bias.dense()
    assert dense.shape == bias.shape
    flat = dense.reshape(-1, *dense.shape[-3:])
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, flat.shape)).tolist():
        assert abs(float(flat[b, h, i, j]) - entry(bias, b, h, i, j)) < 1e-12


def test_shape_rank_and_bytes() -> None:
    bias = plain()
    assert bias.shape == (2, 4, 5, 7)
    assert (bias.rank, bias.num_heads, bias.seqlen_q, bias.seqlen_k) == (3, 4, 5, 7)
    assert bias.batch_shape == (2,)
    assert bias.nbytes == 8 * (2 * 5 * 3 + 4 * 7 * 3)
    assert table_only().rank == 0
    assert table_only().num_heads == 2
    assert not bias.requires_grad
    assert fb.FactoredBias(bias.phi_q, bias.phi_k.requires_grad_()).requires_grad


@kinds
@given(data=st.data())
def test_slicing_is_slicing_the_matrix(kind: Callable[..., fb.FactoredBias], data: st.DataObject) -> None:
    bias = kind()
    ends = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in (5, 7)]
    queries, keys = (slice(*pair) for pair in ends)
    assert torch.equal(bias[queries, keys].dense(), bias.dense()[..., queries, keys])
    assert bias.slice(keys=keys).shape[-2:] == (5, keys.stop - keys.start)


@pytest.mark.parametrize("left", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("right", [table_only, with_codes, plain], ids=lambda kind: kind.__name__)
def test_addition_is_addition_of_matrices(
    left: Callable[..., fb.FactoredBias], right: Callable[..., fb.FactoredBias]
) -> None:
    heads = {left().num_heads, right().num_heads} - {1}
    a, b = left(), right()
    if len(heads) > 1:
        a, b = (
            fb.FactoredBias(
                x.phi_q[..., :1, :, :],
                x.phi_k[..., :1, :, :],
                None if x.table is None else x.table[:1],
                x.code_q,
                x.code_k,
            )
            for x in (a, b)
        )
    if a.table is not None and b.table is not None and (a.code_q is None) != (b.code_q is None):
        with pytest.raises(ValueError, match="different codes"):
            a + b
        return
    if a.code_q is not None and b.code_q is not None:
        b = fb.FactoredBias(b.phi_q, b.phi_k, b.table, a.code_q, a.code_k)
    total = a + b
    assert total.rank == a.rank + b.rank
    torch.testing.assert_close(total.dense(), a.dense() + b.dense())


def test_sum_of_tables_of_different_width_stays_one_table() -> None:
    a, b = fb.FactoredBias.from_table(draw(1, 3), 6, 6), fb.FactoredBias.from_table(draw(2, 9), 6, 6)
    assert (a + b).table.shape == (2, 9)  # type: ignore[union-attr]
    torch.testing.assert_close((a + b).dense(), a.dense() + b.dense())


@kinds
def test_to_moves_values_and_keeps_codes_whole(kind: Callable[..., fb.FactoredBias]) -> None:
    bias = kind().to(torch.float32)
    assert bias.phi_q.dtype == bias.phi_k.dtype == torch.float32
    assert bias.code_q is None or not bias.code_q.is_floating_point()
    assert bias.to("meta").device == torch.device("meta")
    assert bias.to("meta", torch.float16).phi_k.dtype == torch.float16


@kinds
def test_gradients_reach_every_part(kind: Callable[..., fb.FactoredBias]) -> None:
    bias = kind()
    leaves = [x for x in (bias.phi_q, bias.phi_k, bias.table) if x is not None and x.numel()]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = torch.autograd.grad(bias.dense().sin().sum(), leaves)
    assert all(grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))
    assert not bias.detach().requires_grad


def test_padding_columns_get_no_gradient() -> None:
    bias = with_ranks()
    bias.phi_q.requires_grad_()
    (grad,) = torch.autograd.grad(bias.dense().sum(), bias.phi_q)
    assert (grad[1] == 0).all()
    assert (grad[2, :, 2:] == 0).all()
    assert (grad[0] != 0).all()


def test_padding_columns_are_never_read() -> None:
    bias = with_ranks()
    padding = ~bias.rank_mask()[:, None, :]
    phi_q, phi_k = (phi.masked_fill(padding, torch.nan) for phi in (bias.phi_q, bias.phi_k))
    dirty = fb.FactoredBias(phi_q, phi_k, ranks=bias.ranks)
    assert torch.equal(dirty.dense(), bias.dense())
    assert torch.equal((dirty + dirty).dense(), (bias + bias).dense())
    clean = dirty.without_ranks()
    assert clean.ranks is None and clean.rank == bias.rank
    assert torch.equal(clean.dense(), bias.dense())
    assert torch.equal(row_constant(dirty, tiled=False), row_constant(bias, tiled=False))


def test_without_ranks_where_all_heads_have_all_columns() -> None:
    bias = plain()
    assert bias.without_ranks() is bias


def test_lookup_clips_at_the_tails() -> None:
    table = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    found = relative_lookup(table, torch.tensor([0, 10]), torch.tensor([-7, 0, 1, 11, 30]))
    assert found[0].tolist() == [[-2, 0, 1, 2, 2], [-2, -2, -2, 1, 2]]


@kinds
def test_is_a_pytree_of_its_tensors(kind: Callable[..., fb.FactoredBias]) -> None:
    bias = kind()
    leaves, spec = pytree.tree_flatten({"bias": bias, "x": 1})
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    own = [x for x in (bias.phi_q, bias.phi_k, bias.table, bias.code_q, bias.code_k) if x is not None]
    assert all(any(x is y for y in tensors) for x in own)
    assert len(tensors) == len(own)
    back = pytree.tree_unflatten(leaves, spec)["bias"]
    assert isinstance(back, fb.FactoredBias)
    assert back.ranks == bias.ranks
    assert torch.equal(back.dense(), bias.dense())
    doubled = pytree.tree_map_only(Tensor, lambda x: x if not x.is_floating_point() else x * 1, bias)
    assert torch.equal(doubled.dense(), bias.dense())


def test_pytree_paths_have_names() -> None:
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(with_codes())[0]]
    assert [path.lstrip(".") for path in paths] == ["phi_q", "phi_k", "table", "code_q", "code_k"]


@kinds
def test_copies_and_pickles(kind: Callable[..., fb.FactoredBias]) -> None:
    bias = kind()
    for other in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert torch.equal(other.dense(), bias.dense())


def test_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        plain().phi_q = draw(2, 1, 5, 3)  # type: ignore[misc]


def test_repr_has_shapes_and_no_values() -> None:
    text = repr(with_ranks())
    assert "shape=(3, 5, 7)" in text
    assert "ranks=(4, 0, 2)" in text
    assert "tensor(" not in text
    assert "table=(4, 5)" in repr(with_table())


def test_ranks_may_be_a_tensor() -> None:
    bias = fb.FactoredBias(draw(2, 5, 3), draw(2, 5, 3), ranks=torch.tensor([1, 3]))  # type: ignore[arg-type]
    assert bias.ranks == (1, 3)
    assert bias.rank_mask().tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(ValueError, match="ranks is None"):
        plain().rank_mask()


@pytest.mark.parametrize("ranks", [[1.5, 3], torch.tensor([1.0, 3.0]), 2])
def test_ranks_are_not_rounded(ranks: object) -> None:
    with pytest.raises(TypeError, match="ranks must be integers, one per head, got"):
        fb.FactoredBias(draw(2, 5, 3), draw(2, 5, 3), ranks=ranks)  # type: ignore[arg-type]


def test_autocast_does_not_change_the_matrix():
    position = torch.arange(1000.0)[None, :, None]
    one = torch.ones_like(position)
    bias = fb.FactoredBias(torch.cat([one, -position], -1), torch.cat([position, one], -1))
    expected = position.mT - position
    assert torch.equal(bias.dense(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bias.dense(), expected)
    assert bias.to("meta").dense().shape == (1, 1000, 1000)
