"""The earth-specific bias: its published index, the types of windows in the head dimension, sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashbias as fb
from flashbias.biases.earth import EarthSpecificBias

PANGU = (2, 6, 12)
sides = st.integers(1, 4)


def matrices(module: EarthSpecificBias) -> Tensor:
    """`[types, H, N, N]`: what the published formula reads, pair by pair."""
    pressure, latitude, longitude = module.window
    places = list(itertools.product(range(pressure), range(latitude), range(longitude)))
    out = torch.empty(module.num_types, module.num_heads, len(places), len(places), dtype=module.weight.dtype)
    for (i, (zi, yi, xi)), (j, (zj, yj, xj)) in itertools.product(enumerate(places), enumerate(places)):
        row = (zi + pressure * zj) * (2 * longitude - 1) * latitude**2
        row += (yi + latitude * yj) * (2 * longitude - 1) + xi - xj + longitude - 1
        out[:, :, i, j] = module.weight.detach()[row]
    return out


@given(window=st.tuples(sides, sides, sides), windows=st.tuples(sides, sides), num_heads=st.integers(1, 3))
def test_equals_the_published_index(window: tuple[int, int, int], windows: tuple[int, int], num_heads: int) -> None:
    module = EarthSpecificBias(num_heads, windows, window)
    found = module().dense().unflatten(0, (module.num_types, num_heads))
    if module.num_tokens <= 16:
        assert torch.equal(found, matrices(module))
    # Every parameter is read, and no entry but parameters: what pads the table to an odd length is not.
    assert set(found.flatten().tolist()) == set(module.weight.flatten().tolist())


def test_sizes_of_pangu_weather() -> None:
    module = EarthSpecificBias(num_heads=6)
    assert module.weight.shape == (3312, 124, 6)
    assert module.num_tokens == 144
    bias = module()
    assert bias.shape == (744, 144, 144)
    assert bias.rank == 0
    assert bias.nbytes < 744 * 144 * 144 * 4 / 6


def test_pangu_window_pair_by_pair() -> None:
    module = EarthSpecificBias(2, (1, 1), PANGU)
    assert torch.equal(module().dense(), matrices(module)[0])


def test_pressure_and_latitude_are_absolute_and_longitude_is_relative() -> None:
    module = EarthSpecificBias(1, (1, 1), (2, 3, 4))
    dense = module().dense()[0].reshape(2, 3, 4, 2, 3, 4)
    assert torch.equal(dense[:, :, 1:, :, :, 1:], dense[:, :, :-1, :, :, :-1])
    assert not torch.equal(dense[:, 1:, :, :, 1:], dense[:, :-1, :, :, :-1])
    assert not torch.equal(dense[1, :, :, 1], dense[0, :, :, 0])


def test_exact_rank_is_that_of_the_window() -> None:
    """Why the family is a table: factors of a matrix of this kind save nothing."""
    matrix = EarthSpecificBias(1, (1, 1), (2, 3, 4))().dense(torch.float64)[0]
    assert int(torch.linalg.matrix_rank(matrix)) == 24


def test_attention_of_all_types_at_once() -> None:
    torch.manual_seed(0)
    module = EarthSpecificBias(2, (2, 2), (2, 2, 3)).double()
    with torch.no_grad():
        module.weight.mul_(50)
    q, k, v = torch.randn(3, 2, 3, 4, 2, 12, 5, dtype=torch.float64)  # batch, longitudes, types, heads, tokens, d
    bias = module()
    out = fb.attention(*(x.flatten(-4, -3) for x in (q, k, v)), bias).unflatten(-3, (4, 2))
    expected = (q @ k.mT / 5**0.5 + matrices(module)).softmax(-1) @ v
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-12)

    upstream = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, module.weight, upstream)
    dense = bias.dense().detach().unflatten(0, (4, 2)).requires_grad_()
    (of_matrix,) = torch.autograd.grad((q @ k.mT / 5**0.5 + dense).softmax(-1) @ v, dense, upstream)
    (wanted,) = torch.autograd.grad(module().dense().unflatten(0, (4, 2)), module.weight, of_matrix)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-12)


@pytest.mark.interpreter
def test_kernels_read_negative_codes() -> None:
    torch.manual_seed(0)
    module = EarthSpecificBias(2, (1, 2), (2, 3, 12))
    with torch.no_grad():
        module.weight.mul_(50)
    q, k, v = torch.randn(3, 1, 4, 72, 16)
    results = []
    for impl in ("triton", "reference"):
        out = fb.attention(q, k, v, module(), impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), module.weight)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5 * float(wanted.detach().abs().max()))


def test_some_types() -> None:
    module = EarthSpecificBias(3, (2, 3), (1, 2, 2))
    types = torch.tensor([4, 1])
    whole = module().dense().unflatten(0, (6, 3))
    assert torch.equal(module(types=types).dense(), whole[types].flatten(0, 1))


def test_tables_of_low_rank_are_compressed_with_a_certificate() -> None:
    """The second form: smooth tables, as training makes them, in factors for all types and heads."""
    module = EarthSpecificBias(2, (1, 2), PANGU)
    rows = torch.linspace(-1.0, 1.0, 23).square()  # of the difference of longitudes alone
    with torch.no_grad():
        module.weight.copy_(-rows.repeat(144)[:, None, None] * torch.tensor([[1.0, 2.0], [0.5, 0.25]]))
    matrix = module().dense()
    bias = fb.compress(matrix, tol=1e-3, table=None)
    assert isinstance(bias, fb.FactoredBias)
    assert bias.rank <= 3
    assert bias.report.certificate <= 1e-3
    q, k, v = torch.randn(3, 4, 144, 8)
    out, exact = fb.attention(q, k, v, bias), fb.attention(q, k, v, module())
    diameter = (v[:, :, None] - v[:, None]).norm(dim=-1).amax((1, 2))
    assert bool(((out - exact).norm(dim=-1) <= (1e-3 * diameter + 1e-5)[:, None]).all())


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        module = EarthSpecificBias(2, (1, 2), (2, 2, 3))
    module.to_empty(device="cpu")
    module.reset_parameters()
    fresh = EarthSpecificBias(2, (1, 2), (2, 2, 3))
    for name in ("code_q", "code_k"):
        assert torch.equal(module.get_buffer(name), fresh.get_buffer(name))


@pytest.mark.parametrize("window", [(6, 12), (2, 6, 0), (2, 6, 12, 1), (2.0, 6, 12), 6])
def test_bad_windows(window: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="window must be 3 positive integers"):
        EarthSpecificBias(2, window=window)


@pytest.mark.parametrize("windows", [(4,), (0, 31), (4, 31, 1)])
def test_bad_numbers_of_windows(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="windows must be 2 positive integers"):
        EarthSpecificBias(2, windows)
