"""`Pivots`: far from each other, and found fast."""

from __future__ import annotations

import time

import torch

from flashbias.decompose.skeleton import Pivots


def test_each_far_point_is_the_farthest_from_the_centre_and_all_before_it():
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    taken = Pivots(points, torch.Generator().manual_seed(0))
    taken.take(64)
    for count in range(len(taken.far)):
        before = torch.cat([points.mean(0, keepdim=True), points[taken.far[:count]]])
        nearest = torch.cdist(points, before, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        assert float(nearest[taken.far[count]]) >= float(nearest.max()) - 1e-6


def test_a_larger_sample_contains_the_far_points_and_those_that_were_named():
    pivots = Pivots(torch.rand(300, 12), torch.Generator().manual_seed(0))
    few = pivots.take(32)
    pivots.name(torch.tensor([7, 11]))
    assert {7, 11, *few.tolist()} <= set(pivots.take(64).tolist())
    assert torch.equal(pivots.take(300), torch.arange(300))


def test_repeated_points_are_taken_once():
    points = torch.tensor([[0.0], [1.0], [3.0]]).repeat(40, 1)
    pivots = Pivots(points, torch.Generator().manual_seed(0))
    pivots.take(64)
    assert len(pivots.far) == 3


def test_a_thousand_pivots_of_a_large_mesh_cost_seconds():
    points = torch.rand(130_000, 3, generator=torch.Generator().manual_seed(0))
    pivots = Pivots(points, torch.Generator().manual_seed(0))
    before = time.process_time()
    pivots.take(1000)
    assert time.process_time() - before < 3.0
