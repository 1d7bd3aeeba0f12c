"""Factors of a function of coordinates, against the matrix that it never forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from flashbias.decompose import NotLowRankError
from flashbias.decompose.blocks import BlockFunction
from flashbias.decompose.bound import spread_allowed
from flashbias.decompose.cross import _Search, compress_function
from flashbias.decompose.probe import Goal


def points(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / 0.5)


def matern(x: Tensor, y: Tensor) -> Tensor:
    distance = 3**0.5 * torch.cdist(x, y)
    return (1 + distance) * torch.exp(-distance)


def distance(x: Tensor, y: Tensor) -> Tensor:
    return -torch.cdist(x, y)


@pytest.mark.parametrize(("f", "most"), [(gaussian, 30), (matern, 30), (distance, 110)])
def test_every_entry_is_within_the_tolerance(f: Callable[[Tensor, Tensor], Tensor], most: int):
    x = points(900)
    bias = compress_function(f, x, tol=0.05)
    true = f(x.double(), x.double())
    error = (bias.dense(torch.float64)[0] - true).abs().max()
    # The check of fresh entries is an estimate: what it has not seen may be a little worse.
    assert error <= 1.1 * 0.05 * (true.max() - true.min())
    assert bias.rank <= most
    assert bias.report.is_met and bias.report.evaluations < 20 * 900 * 900


def test_as_many_columns_as_were_needed_are_enough():
    """One of them is the shift: where columns are short, room must be left for it."""
    needed = compress_function(distance, points(300), tol=0.05).report
    assert needed.shifts[0] != 0
    bias = compress_function(distance, points(300), tol=0.05, max_rank=needed.ranks[0])
    assert bias.report.is_met and bias.rank <= needed.ranks[0]


def test_a_limit_that_leaves_no_room_for_a_shift_is_used_up():
    """Rank 3, and nothing left for a constant."""
    x = points(400)
    assert compress_function(lambda a, b: a @ b.mT, x, tol=0.001, max_rank=3).rank == 3


@pytest.mark.parametrize(("sharpness", "named"), [(0.0, False), (50.0, True)])
def test_only_rows_that_stand_out_are_sampled_for_it(sharpness: float, named: bool):
    """A kink that every row has crowds the sample nowhere; what is sharp in a corner does."""

    def f(a: Tensor, b: Tensor) -> Tensor:
        near, others = (torch.exp(-8 * y.square().sum(-1)) for y in (a, b))
        return distance(a, b) + sharpness * near[:, None] * others * torch.cos(40 * torch.cdist(a, b))

    x = points(2000)
    search = _Search(BlockFunction(f, x, x, 1), Goal(0.01, "range", False, None, 1 << 30), torch.Generator())
    search.name_worst(*search.choose(search.skeleton(128)), count=16)
    assert bool(len(search.pivots_q.named)) == named


def test_what_is_sharp_in_one_place_is_found():
    """Between a few points in a corner, and nowhere else."""
    x = points(800)

    def f(a: Tensor, b: Tensor) -> Tensor:
        near, others = (torch.exp(-30 * y.square().sum(-1)) for y in (a, b))
        return gaussian(a, b) + near[:, None] * others * torch.cos(40 * torch.cdist(a, b))

    bias = compress_function(f, x, tol=0.05)
    error = (bias.dense(torch.float64)[0] - f(x.double(), x.double())).abs().max()
    assert error <= 1.5 * bias.report.limits[0]


def test_queries_and_keys_may_differ_and_heads_have_their_own_rank():
    x, y = points(400), points(600, seed=1)
    scales = torch.tensor([0.5, 4.0])[:, None, None]

    def f(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() * scales.to(a.dtype))

    bias = compress_function(f, x, y, tol=0.02, num_heads=2)
    assert bias.shape == (2, 400, 600)
    assert bias.report.ranks[0] < bias.report.ranks[1]
    torch.testing.assert_close(bias.dense(), f(x, y), rtol=0, atol=0.025)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("offset", "slope"), [(0.0, 0.0), (50.0, 0.0), (0.0, 300.0)])
@pytest.mark.parametrize(("relative_to", "gauge"), [("output", None), ("output", False), ("range", True)])
def test_errors_up_to_a_constant_of_the_row(
    relative_to: Literal["output", "range"], gauge: bool | None, offset: float, slope: float, dtype: torch.dtype
):
    """Smooth functions have singular values down to rounding, where constants of rows must not come in again."""

    def f(a: Tensor, b: Tensor) -> Tensor:
        return gaussian(a, b) + offset + slope * a[:, :1]

    x = points(700).to(dtype)
    bias = compress_function(f, x, tol=0.02, relative_to=relative_to, gauge=gauge)
    error = bias.dense(torch.float64)[0] - f(x.double(), x.double())
    spread = error.amax(-1) - error.amin(-1)
    allowed = spread_allowed(0.02) if relative_to == "output" else 2 * bias.report.limits[0]
    assert float(spread.max()) <= 1.1 * allowed
    assert bias.rank <= 40


def test_what_is_zero_but_in_one_row():
    """The rows that are looked at first say nothing of how large the others are."""

    def f(a: Tensor, b: Tensor) -> Tensor:
        return (a > 0.9999).to(a.dtype) * torch.sin(30 * b.mT)

    x = torch.linspace(0, 1, 700, dtype=torch.float64)[:, None]
    bias = compress_function(f, x, tol=0.01)
    assert bias.rank == 1 and bias.report.value_range[0] == pytest.approx(2.0, abs=0.01)
    torch.testing.assert_close(bias.dense()[0], f(x, x).float(), rtol=0, atol=0.02)


def test_rounding_that_takes_too_much_is_said_at_once():
    x = points(300).double()
    with pytest.raises(
        NotLowRankError, match=r"float32 factors cannot hold f so well: .* subtract a constant"
    ) as caught:
        compress_function(lambda a, b: 1e6 + gaussian(a, b), x, tol=1e-3)
    assert not caught.value.report.is_met
    assert compress_function(gaussian, x, tol=1e-3).report.is_met


def test_the_function_is_asked_for_thin_blocks_only():
    asked: list[int] = []

    def f(a: Tensor, b: Tensor) -> Tensor:
        asked.append(len(a) * len(b))
        return gaussian(a, b)

    compress_function(f, points(6000), tol=0.05)
    assert max(asked) <= 6000 * 1100


def test_noise_is_refused():
    def noise(a: Tensor, b: Tensor) -> Tensor:
        return torch.sin(1e5 * (a @ b.mT))

    with pytest.raises(NotLowRankError, match="not of low rank"):
        compress_function(noise, points(500), tol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tol": 0.0}, "tol must be"),
        ({"tol": 1.5}, "tol must be"),
        ({"q_coords": torch.zeros(5)}, "q_coords"),
        ({"f": lambda a, b: torch.full((len(a), len(b)), torch.nan)}, "finite"),
        ({"f": lambda a, b: torch.full((len(a), len(b)), 1e39, dtype=torch.float64)}, "finite in float32"),
        ({"f": lambda a, b: torch.zeros(3, 4)}, "f must return|shape"),
    ],
)
def test_bad_input(change: dict[str, object], message: str):
    arguments: dict[str, object] = {"f": gaussian, "q_coords": points(50), "tol": 0.05} | change
    with pytest.raises((ValueError, TypeError), match=message):
        compress_function(arguments["f"], arguments["q_coords"], tol=arguments["tol"])  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_factors_and_touches_no_other():
    before = torch.get_rng_state()
    first, again = (compress_function(gaussian, points(300), tol=0.05, seed=3) for _ in range(2))
    assert torch.equal(first.phi_q, again.phi_q) and torch.equal(first.phi_k, again.phi_k)
    assert torch.equal(torch.get_rng_state(), before)
