"""Factors from the features of tokens: the formula, its size at the start, its two networks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashbias as fb
from flashbias.decompose.neural import NeuralBias


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(*args: int, seed: int = 0, **kwargs: object) -> NeuralBias:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NeuralBias(*args, **kwargs)


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    features=st.integers(1, 5),
    features_k=st.integers(1, 5),
    heads=st.integers(1, 3),
    rank=st.integers(1, 5),
    hidden=st.lists(st.integers(1, 8), max_size=3),
)
def test_shapes(batch, n, m, features, features_k, heads, rank, hidden):
    module = NeuralBias(features, heads, rank, in_features_k=features_k, hidden=hidden)
    bias = module(torch.zeros(*batch, n, features), torch.zeros(*batch, m, features_k))
    assert bias.shape == (*batch, heads, n, m)
    assert bias.phi_q.shape == (*batch, heads, n, rank)
    assert bias.phi_k.shape == (*batch, heads, m, rank)


def test_batches_broadcast():
    bias = seeded(3, 2, 4, hidden=(8,))(draw(5, 1, 6, 3), draw(1, 4, 7, 3))
    assert bias.shape == (5, 4, 2, 6, 7)


@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_formula(shared: bool):
    module = seeded(3, 2, 4, hidden=(8, 5), shared=shared).double()
    x, y = draw(6, 3).double(), draw(7, 3, seed=1).double()

    def phi(tokens: torch.Tensor, trunk: torch.nn.Module, last: torch.nn.Linear) -> torch.Tensor:
        for layer in trunk.layers:
            tokens = torch.tanh(tokens @ layer.weight.T + layer.bias)
        return (tokens @ last.weight.T + last.bias).reshape(-1, 2, 4)

    phi_q = phi(x, module.trunk_q, module.last_q)
    phi_k = phi(y, module.trunk_q if shared else module.trunk_k, module.last_k)
    expected = torch.einsum("nhr,mhr->hnm", phi_q, phi_k)
    torch.testing.assert_close(module(x, y).dense(), expected, rtol=1e-12, atol=1e-14)


def test_sizes_of_the_paper():
    module = NeuralBias(577, 4, 96)
    widths = [(layer.in_features, layer.out_features) for layer in (*module.trunk_q.layers, module.last_q)]
    assert widths == [(577, 256), (256, 256), (256, 384)]


@pytest.mark.parametrize("shared", [False, True])
def test_keys_default_to_queries(shared: bool):
    module, x = seeded(3, 2, 4, hidden=(8,), shared=shared), draw(6, 3)
    assert torch.equal(module(x).dense(), module(x, x).dense())


def test_shared_layers_run_once_and_may_be_asymmetric():
    module = seeded(3, 1, 2, hidden=(8, 8), shared=True)
    calls = []
    module.trunk_q.register_forward_hook(lambda *_: calls.append(1))
    bias = module(draw(6, 3)).dense()
    assert len(calls) == 1 and module.trunk_k is None
    assert not torch.allclose(bias, bias.mT)
    assert (torch.linalg.eigvals(bias.double()[0]).real < 0).any()
    both = seeded(3, 1, 2, hidden=(8, 8))
    count = sum(p.numel() for p in module.trunk_q.parameters())
    assert sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("rank", [1, 32, 96])
@pytest.mark.parametrize("features", [2, 577])
def test_initial_bias_is_small_and_not_zero(rank: int, features: int):
    module = seeded(features, 8, rank, hidden=(64, 64), init_std=0.1)
    rms = module(draw(300, features)).dense().square().mean().sqrt().item()
    assert 0.02 < rms < 0.12


def test_first_layers_bend():
    """The initial factors of few features are not linear in them, else training would have to get there first."""
    x = draw(400, 2)
    phi = seeded(2, 1, 16, hidden=(64, 64))(x).phi_q[0].detach()
    linear = torch.cat([x, torch.ones(400, 1)], 1)
    residual = phi - linear @ torch.linalg.lstsq(linear, phi).solution
    assert residual.norm() > 0.3 * phi.norm()


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_reach_everything(shared: bool):
    module = seeded(3, 2, 4, hidden=(8, 8), shared=shared)
    x = draw(6, 3).requires_grad_()
    fb.attention(draw(2, 6, 4), draw(2, 6, 4, seed=1), draw(2, 6, 4, seed=2), module(x)).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    # All keys see a constant of phi_q alike, so its last bias moves the output only through differences of phi_k.
    assert all(g is not None and bool((g != 0).any()) for g in gradients.values()), gradients
    assert (x.grad != 0).all()


def test_gradcheck():
    module = seeded(2, 2, 3, hidden=(4,)).double()
    parameters = dict(module.named_parameters())
    x = draw(3, 2).double().requires_grad_()

    def dense(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,)).dense()

    assert torch.autograd.gradcheck(dense, (x, *parameters.values()))


@settings(max_examples=25)
@given(data=st.data())
def test_block_is_the_block_of_the_whole(data: st.DataObject):
    module, x, y = seeded(3, 2, 4, hidden=(8,)), draw(2, 9, 3), draw(2, 7, 3, seed=1)
    queries = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=9)))
    keys = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7)))
    assert module.lengths(x, y) == (9, 7) and module.lengths(x) == (9, 9)
    whole = module(x, y).dense()
    torch.testing.assert_close(module.block(queries, keys, x, y).dense(), whole[..., queries, :][..., keys])
    assert module.block(queries, queries, x).shape == (2, 2, len(queries), len(queries))


@pytest.mark.parametrize("shared", [False, True])
def test_standardised_features_have_no_unit(shared: bool):
    x, y = draw(2, 50, 3), draw(2, 40, 3, seed=1)
    shift, unit = torch.tensor([1e3, -5.0, 0.0]), torch.tensor([100.0, 1e-3, 1.0])
    metres, others = seeded(3, 2, 4, shared=shared), seeded(3, 2, 4, shared=shared)
    assert metres.standardize(x, y) is metres
    others.standardize(x * unit + shift, y * unit + shift)
    torch.testing.assert_close(
        others(x * unit + shift, y * unit + shift).dense(), metres(x, y).dense(), rtol=1e-2, atol=1e-3
    )
    assert not torch.allclose(others(x, y).dense(), metres(x, y).dense(), atol=1e-2)
    copied = seeded(3, 2, 4, shared=shared)
    copied.load_state_dict(others.state_dict())
    assert torch.equal(copied(x, y).dense(), others(x, y).dense())


def test_standardise_a_constant_feature():
    x = torch.cat([draw(20, 1), torch.full((20, 1), 7.0)], 1)
    module = seeded(2, 1, 2, hidden=(4,)).standardize(x)
    assert module(x).check_finite().rank == 2
    assert torch.equal(module.trunk_q.deviation[1], torch.tensor(1.0))


def test_autocast():
    module, x = seeded(5, 2, 4, hidden=(16, 16)), draw(30, 5)
    exact = module(x).dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bias = module(x)
        also_from_half = module(x.bfloat16())
    assert bias.phi_q.dtype == bias.phi_k.dtype == also_from_half.phi_q.dtype == torch.bfloat16
    assert (bias.dense(torch.float32) - exact).abs().max() < 0.05 * exact.abs().max()
    bias.dense(torch.float32).square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_compiles_as_one_graph(shared: bool):
    module, x = seeded(5, 2, 4, hidden=(16, 16), shared=shared), draw(2, 30, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).dense(), module(x).dense())
    compiled(x).dense().square().sum().backward()
    assert module.last_q.weight.grad.isfinite().all()


def test_moves_and_copies():
    module, x = seeded(3, 2, 4, hidden=(8,)), draw(6, 3)
    before = module(x).dense()
    other = seeded(3, 2, 4, hidden=(8,), seed=1)
    assert not torch.equal(other(x).dense(), before)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x).dense(), before)
    double = copy.deepcopy(module).double()
    assert double(x.double()).phi_q.dtype == torch.float64
    torch.testing.assert_close(double(x.double()).dense().float(), before)
    assert module.half()(x.half()).phi_q.dtype == torch.float16


def test_deferred_initialisation():
    with torch.device("meta"):
        module = NeuralBias(3, 2, 4, hidden=(8,))
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert 0 < module(draw(50, 3)).check_finite().dense().std() < 0.2


def test_bad_sizes():
    sizes = {"in_features": 3, "num_heads": 2, "rank": 4}
    for name in (*sizes, "in_features_k"):
        for bad in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {bad!r}"):
                NeuralBias(**{**sizes, name: bad})
    with pytest.raises(ValueError, match="hidden must be a positive integer, got 0"):
        NeuralBias(3, 2, 4, hidden=(8, 0))
    with pytest.raises(ValueError, match="in_features=3 and in_features_k=5"):
        NeuralBias(3, 2, 4, in_features_k=5, shared=True)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="init_std"):
            NeuralBias(3, 2, 4, init_std=bad)


def test_bad_features():
    module = NeuralBias(3, 2, 4, hidden=(8,))
    with pytest.raises(ValueError, match=r"x_q must be \[\*batch, length, 3\], got shape \(6, 4\)"):
        module(draw(6, 4))
    with pytest.raises(ValueError, match=r"x_k must be .* got shape \(3,\)"):
        module(draw(6, 3), draw(3))
    with pytest.raises(TypeError, match=r"x_q must be a floating point tensor, got torch\.int64"):
        module(torch.zeros(6, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x_q must be a floating point tensor, got list"):
        module([[0.0, 0.0, 0.0]])
    with pytest.raises(TypeError, match=r"x_k is torch\.float64 and the parameters are torch\.float32"):
        module(draw(6, 3), draw(6, 3).double())
    with pytest.raises(ValueError, match="do not broadcast"):
        module(draw(2, 6, 3), draw(3, 6, 3))
    with pytest.raises(ValueError, match="x_k must be given: keys have 2 features, queries 3"):
        NeuralBias(3, 2, 4, in_features_k=2, hidden=(8,))(draw(6, 3))
    with pytest.raises(ValueError, match=r"x_q must hold at least two tokens, got shape \(1, 3\)"):
        module.standardize(draw(1, 3))
    with pytest.raises(ValueError, match="x_k must be"):
        module.standardize(draw(4, 3), draw(4, 2))
