"""A near field and factors: what it can hold exactly, and that it is better than either."""

from __future__ import annotations

import pytest
import torch
from tests.decompose.problems import causal, gaussian, generator, noise, spiked, toeplitz
from torch import Tensor

from flashbias.decompose.relative import codes_of_positions
from flashbias.decompose.split import split
from flashbias.decompose.svd import centre_rows, truncated_svd


def line(n: int, m: int | None = None):
    return codes_of_positions(torch.arange(n), torch.arange(m or n))


def error(b: Tensor, half_width: int, rank: int, mask: Tensor | None = None, **options: float) -> Tensor:
    """What is left, rows centred."""
    codes = line(*b.shape)
    table, factors = split(b, codes, half_width, rank, generator=generator(), mask=mask, **options)
    assert table.shape == (2 * half_width + 1,)
    assert factors.rank == min(rank, *b.shape)
    rest = b - table[codes.index(half_width)] - factors.dense()
    if mask is None:
        return centre_rows(rest)
    return centre_rows(rest, mask.double()).masked_fill(~mask, 0.0)


def test_a_spike_on_something_of_low_rank_is_held_exactly():
    b = spiked(64).double()
    assert float(error(b, 4, 4).abs().max()) < 1e-2 * float(b.abs().max())
    # … which no SVD of that rank comes near.
    alone = centre_rows(b) - truncated_svd(centre_rows(b), 4, generator()).dense()
    assert float(alone.abs().max()) > 0.5


def test_a_short_table_alone_is_held_exactly():
    difference = torch.arange(40) - torch.arange(40)[:, None]
    b = toeplitz(7)[3].double()[difference.clamp(-3, 3) + 3]
    assert float(error(b, 3, 1, patience=0.0, max_rounds=500).abs().max()) < 1e-3 * float(b.abs().max())


@pytest.mark.parametrize("half_width", [1, 5])
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (18, 30), (30, 18)])
def test_is_no_worse_than_factors_alone(n: int, m: int, rank: int, half_width: int):
    b = noise(n, m).double()
    alone = centre_rows(b) - truncated_svd(centre_rows(b), rank, generator()).dense()
    both = error(b, half_width, rank, patience=0.0, max_rounds=400)
    assert float(both.norm()) <= 1.01 * float(alone.norm())


def test_more_rounds_are_never_worse():
    b = (spiked(48) + 0.3 * noise(48)).double()
    errors = [float(error(b, 3, 4, patience=0.0, max_rounds=rounds).norm()) for rounds in (1, 3, 10, 50)]
    assert errors == sorted(errors, reverse=True)


def test_under_a_mask_only_what_is_read_is_fitted():
    mask = causal(48)
    b = spiked(48).double()
    wild = torch.where(mask, b, 1e3 * noise(48).double())
    left = error(wild, 4, 4, mask)
    assert float(left[mask].abs().max()) < 0.05 * float(b.abs().max())


def test_rows_that_read_nothing_stay_finite():
    mask = causal(20)
    mask[4] = False
    assert bool(torch.isfinite(error(gaussian(20).double(), 2, 2, mask)).all())


def test_same_source_of_chance_same_result():
    b = noise(30).double()
    first, again = (split(b, line(30), 2, 3, generator=generator(7)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].left, again[1].left)


def test_its_input_is_left_alone():
    b, mask = noise(20).double(), causal(20)
    before = b.clone()
    split(b, line(20), 2, 3, generator=generator(), mask=mask)
    assert torch.equal(b, before) and torch.equal(mask, causal(20))
