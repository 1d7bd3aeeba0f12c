"""Factors as parameters: the same bias as the factors they came from, and trained like a table."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashbias as fb
from flashbias.decompose.learned import LowRankBias


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def window_bias() -> fb.FactoredBias:
    """Three heads of ranks 2, 0 and 3, with a table read by codes of its own; padding columns hold rubbish."""
    return fb.FactoredBias(
        draw(3, 6, 4, seed=1),
        draw(3, 7, 4, seed=2),
        draw(3, 9, seed=3),
        torch.tensor([0, 2, 1, 5, 3, 4]),
        torch.tensor([6, 1, 0, 3, 2, 5, 4]),
        ranks=(2, 0, 3),
    )


SOURCES = {
    "plain": lambda: fb.FactoredBias(draw(2, 5, 3), draw(2, 4, 3, seed=1)),
    "batch": lambda: fb.FactoredBias(draw(2, 1, 2, 5, 3), draw(3, 1, 4, 3, seed=1)),
    "shared-head": lambda: fb.FactoredBias(draw(1, 5, 3), draw(2, 4, 3, seed=1), ranks=(1, 2)),
    "table-only": lambda: fb.RelativeBuckets(num_heads=2)(5, 4),
    "window": window_bias,
    "double": lambda: fb.FactoredBias(draw(2, 5, 3).double(), draw(2, 4, 3).double()),
    "half": lambda: fb.FactoredBias(draw(2, 5, 3).bfloat16(), draw(2, 4, 3).bfloat16()),
}
each_source = pytest.mark.parametrize("source", SOURCES)


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    heads=st.integers(1, 4),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    rank=st.integers(1, 5),
)
def test_from_scratch(batch: list[int], heads: int, n: int, m: int, rank: int):
    module = LowRankBias(heads, n, m, rank, batch_shape=batch)
    bias = module()
    assert bias.shape == (*batch, heads, n, m)
    assert bias.phi_q is module.phi_q and bias.phi_k is module.phi_k
    assert bias.phi_q.dtype == bias.phi_k.dtype == torch.float32
    assert bias.rank == rank and bias.table is None


@pytest.mark.parametrize("rank", [1, 16, 96])
def test_initial_bias_has_the_size_that_was_asked_for(rank: int):
    module = LowRankBias(8, 200, 200, rank, init_std=0.3)
    # Rank 1 is a product of two long vectors: its deviation itself fluctuates, by about 1 / sqrt(N) per head.
    assert module().dense().std().item() == pytest.approx(0.3, rel=0.06)


def test_both_factors_receive_a_gradient_at_once():
    module = LowRankBias(2, 6, 5, 3)
    module().dense().square().sum().backward()
    assert (module.phi_q.grad != 0).all()
    assert (module.phi_k.grad != 0).all()


@each_source
def test_from_bias_is_the_same_bias(source: str):
    bias = SOURCES[source]()
    module = LowRankBias.from_bias(bias)
    wide = bias.to(torch.promote_types(bias.phi_q.dtype, torch.float32))
    assert torch.equal(module().dense(), wide.dense())
    assert module().ranks == bias.ranks
    assert all(p.requires_grad and p.dtype == wide.phi_q.dtype for p in module.parameters())
    assert (module.table is None) == (bias.table is None)


def test_from_bias_copies():
    bias = window_bias()
    before = bias.dense()
    module = LowRankBias.from_bias(bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
        module.code_q.add_(1)
    assert torch.equal(bias.dense(), before)


@each_source
@settings(max_examples=25)
@given(data=st.data())
def test_a_block_equals_the_block_of_the_whole(source: str, data: st.DataObject):
    module = LowRankBias.from_bias(SOURCES[source]())
    whole = module()

    def part_of(length: int) -> slice:
        start = data.draw(st.integers(0, length - 1))
        return slice(start, data.draw(st.integers(start + 1, length)))

    queries, keys = part_of(whole.seqlen_q), part_of(whole.seqlen_k)
    torch.testing.assert_close(module(queries, keys).dense(), whole.dense()[..., queries, keys])
    assert module(queries=queries).shape[-1] == whole.seqlen_k
    assert module(keys=keys).shape[-2] == whole.seqlen_q


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_padding_stays_zero_under_training(impl: str):
    module = LowRankBias.from_bias(window_bias())
    unread = ~window_bias().rank_mask()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    query, key, value = draw(3, 6, 8, seed=4), draw(3, 7, 8, seed=5), draw(3, 7, 8, seed=6)
    for _ in range(3):
        optimizer.zero_grad()
        fb.attention(query, key, value, module(), impl=impl).square().sum().backward()
        for phi in (module.phi_q, module.phi_k):
            assert (phi.grad.transpose(-1, -2)[unread] == 0).all()
            assert (phi.grad.transpose(-1, -2)[~unread] != 0).any()
        optimizer.step()
    for phi in (module.phi_q, module.phi_k):
        assert (phi.transpose(-1, -2)[unread] == 0).all()
        assert (phi.transpose(-1, -2)[~unread] != 0).all()


def test_shared_factor_keeps_the_columns_that_one_head_reads():
    module = LowRankBias.from_bias(SOURCES["shared-head"]())
    assert (module.phi_q[0, :, :2] != 0).all() and (module.phi_q[0, :, 2] == 0).all()
    assert (module.phi_k[0, :, 1:] == 0).all() and (module.phi_k[1, :, :2] != 0).all()


@each_source
def test_state_dict_round_trip(source: str):
    module = LowRankBias.from_bias(SOURCES[source]())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = LowRankBias.from_bias(SOURCES[source]())
    other.ranks = None
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert other.ranks == module.ranks
    assert torch.equal(other().dense(), module().dense())


def test_deepcopy_is_independent():
    module = LowRankBias.from_bias(window_bias())
    other = copy.deepcopy(module)
    assert torch.equal(other().dense(), module().dense())
    with torch.no_grad():
        other.phi_q.add_(1.0)
    assert not torch.equal(other().dense(), module().dense())


def test_dtype_moves_leave_codes_alone():
    module = LowRankBias.from_bias(window_bias())
    before = module().dense()
    double = copy.deepcopy(module).double()
    assert double().phi_q.dtype == double().table.dtype == torch.float64
    assert double.code_q.dtype == torch.int64
    torch.testing.assert_close(double().dense().float(), before)
    assert module.to(torch.bfloat16)().phi_k.dtype == torch.bfloat16
    assert torch.equal(module.code_q, window_bias().code_q)


def test_learns_a_table_through_attention():
    """A table of rank 2 is found from the outputs alone, up to constants of its rows."""
    table = draw(2, 12, 2, seed=7) @ draw(2, 2, 10, seed=8)
    query, key, value = draw(8, 2, 12, 4, seed=1), draw(8, 2, 10, 4, seed=2), draw(8, 2, 10, 4, seed=3)
    target = fb.attention(query, key, value, fb.FactoredBias(table, torch.eye(10).expand(2, 10, 10)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = LowRankBias(2, 12, 10, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (fb.attention(query, key, value, module()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
    error = (module().dense() - table).detach()
    assert (error - error.mean(-1, keepdim=True)).norm() < 0.1 * (table - table.mean(-1, keepdim=True)).norm()


def test_deferred_initialisation():
    with torch.device("meta"):
        module = LowRankBias(2, 6, 5, 3)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert module().check_finite().phi_q.std() > 0
    with pytest.raises(RuntimeError, match="came from a bias"):
        LowRankBias.from_bias(window_bias()).reset_parameters()


def test_from_bias_draws_nothing():
    before = torch.get_rng_state()
    LowRankBias.from_bias(window_bias())
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_shows_shapes():
    assert "ranks=(2, 0, 3)" in repr(LowRankBias.from_bias(window_bias()))


def test_bad_arguments():
    for name in ("num_heads", "seqlen_q", "seqlen_k", "rank"):
        sizes = {"num_heads": 2, "seqlen_q": 3, "seqlen_k": 4, "rank": 1}
        for bad in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {bad!r}"):
                LowRankBias(**{**sizes, name: bad})
    with pytest.raises(ValueError, match="batch_shape"):
        LowRankBias(2, 3, 4, 1, batch_shape=(2, 0))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="init_std"):
            LowRankBias(2, 3, 4, 1, init_std=bad)
    with pytest.raises(TypeError, match="bias must be a FactoredBias, got Tensor"):
        LowRankBias.from_bias(torch.zeros(2, 3, 4))
