"""The mesh field: bodies are read, the charges solve their equation, all ways agree, and a run leaves its files."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.fields import mesh
from benchmarks.fields.mesh import bodies, charges, speed, train
from benchmarks.fields.mesh.bodies import HELD_OUT, TRAINED, read_triangles, spread
from benchmarks.fields.mesh.solver import WAYS, Solver, Way

from flashbias.bench.measure import Measurement

SQUARE = np.array([[[0, 0, 0], [2, 0, 0], [2, 1, 0]], [[0, 0, 0], [2, 1, 0], [0, 1, 0]]], float)
"""A rectangle of 2 by 1, as two triangles."""


def _wavefront() -> bytes:
    return b"v 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//1 3//1 4//1\n"


def _text_stl() -> bytes:
    lines = [f"vertex {x} {y} {z}" for x, y, z in SQUARE.reshape(-1, 3)]
    return "\n".join(["solid square", "facet normal 0 0 1", *lines, "endsolid"]).encode()


def _binary_stl() -> bytes:
    records = np.zeros(2, np.dtype([("vectors", "<f4", (4, 3)), ("attribute", "<u2")]))
    records["vectors"][:, 1:] = SQUARE
    return bytes(80) + (2).to_bytes(4, "little") + records.tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.obj.gz", _wavefront()), ("a.stl.gz", _text_stl()), ("b.stl.gz", _binary_stl())],
    ids=["wavefront", "text-stl", "binary-stl"],
)
def test_triangles_are_read(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert np.array_equal(read_triangles(tmp_path / name), SQUARE)


def test_points_are_spread_evenly_by_area():
    points = spread(SQUARE, 4000)
    assert points.shape == (4000, 3) and not points[:, 2].any()
    assert (points >= 0).all() and (points[:, :2] <= [2, 1]).all()
    quarters, *_ = np.histogram2d(points[:, 0], points[:, 1], bins=2)
    assert np.abs(quarters / 1000 - 1).max() < 0.15  # five standard deviations


def _sphere(count: int, seed: int = 0) -> torch.Tensor:
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return points / points.norm(dim=-1, keepdim=True)


def test_induced_charges_solve_their_equation():
    generator = torch.Generator().manual_seed(0)
    sample = charges.Clouds(_sphere(300)[None], 2, 200, generator).draw(3, generator)
    points, sigma = sample.points.double(), sample.density.double()
    distance = (torch.cdist(points, points).square() + charges.SOFTENING**2).sqrt()
    total = sample.potential + (sigma[:, None] / distance).mean(-1) + charges.COAT * sigma
    assert total.std(-1).max() < 1e-5  # in units of the outer potential
    assert sigma.mean(-1).abs().max() < 1e-5


def test_a_turned_cloud_has_the_same_charges():
    turn = charges.rotations(1, torch.Generator().manual_seed(3))[0]
    assert torch.allclose(turn @ turn.T, torch.eye(3), atol=1e-6)
    clouds = [
        charges.Clouds((_sphere(64) @ turned)[None], 1, 64, torch.Generator().manual_seed(0))
        for turned in (torch.eye(3), turn)
    ]
    potential = clouds[0].points[..., 0]
    one, other = (charges.induced(cloud.operators, potential) for cloud in clouds)
    assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))


def _solve(who: str, points: torch.Tensor) -> tuple[torch.Tensor, Solver]:
    torch.manual_seed(0)
    solver = Solver(WAYS[who], 32, 2, layers=2, hidden=32)
    return solver(points, points[..., 0]), solver


def test_all_ways_give_the_same_density():
    points = _sphere(40)[None]
    with torch.no_grad():
        found = {who: _solve(who, points)[0] for who in WAYS}
    exact = found.pop("matrix")
    assert (found.pop("no bias") - exact).norm() > 0.01 * exact.norm()
    for who, out in found.items():
        assert (out - exact).norm() < 1e-5 * exact.norm(), who


def test_learned_ways_have_the_gradients_of_factors():
    points = _sphere(40)[None]
    grads = {}
    for who in ("factors", "matrix, learned", "matrix"):
        out, solver = _solve(who, points)
        out.square().sum().backward()
        grads[who] = {name: p.grad for name, p in solver.named_parameters()}
    name = "layers.0.attention.weight.weight"
    assert grads["matrix"][name] is None
    assert torch.allclose(grads["factors"][name], grads["matrix, learned"][name], rtol=1e-3, atol=1e-6)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Arguments of a run on spheres, at a size that takes a second."""
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path))
    points = {name: _sphere(100, seed).numpy() for seed, name in enumerate((*TRAINED, *HELD_OUT, bodies.VERTICES))}
    np.savez(tmp_path / "mesh.npz", allow_pickle=False, **points)
    monkeypatch.setattr(train, "SMALL", train.Plan(points=24, each=1, batch=2, steps=2, width=16, heads=2, layers=1))
    monkeypatch.setattr(speed, "SMALL", speed.Sizes(car=40, motorbike=None, learned=16, layers=2, fewer=1))
    monkeypatch.setattr(speed, "measure", lambda call, *_, **__: call() is None or Measurement(1.0, 1.0, 1.0, 2.0, 1))
    parser = argparse.ArgumentParser()
    mesh.add_arguments(parser)
    common = {"out": tmp_path / "out", "picture": tmp_path / "mesh.png", "device": "cpu", "threads": 1, "seed": 0}
    run = {"small": True, "fetch": False, "commit": "none", "load": 0.0, "started": "now", "subcommand": "mesh"}
    return argparse.Namespace(**vars(parser.parse_args([])), **common, **run)


def test_a_run_leaves_rows_fields_and_picture(tiny: argparse.Namespace):
    mesh.run(tiny)
    with (tiny.out / "mesh.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {row["part"] for row in rows}
    assert parts == {
        *("curve", "body", "solver-32k", "solver-131k", "attention-32k", "solver-4k", "solver-32k-learned"),
    }
    failed = [row for row in rows if row["status"].startswith("error")]
    assert all(row["who"].startswith("flex") and "backward on CPU" in row["status"] for row in failed)
    assert all(float(row["difference"]) < 0.02 for row in rows if row["difference"])
    assert {row["body"] for row in rows if row["part"] == "body"} == set(HELD_OUT)
    summary = json.loads((tiny.out / "mesh.json").read_text())["summary"]
    assert summary["steps"] == 2 and summary["solver-32k training, 2 layers, matrix over factors, median_ms"] == 1.0
    with np.load(tiny.out / "mesh.npz") as kept:
        assert kept["points"].shape == (3, 24, 3) and kept["no bias"].shape == (3, 24)
    assert tiny.picture.stat().st_size > 10_000


def test_what_fails_is_a_row_and_the_others_go_on(tiny: argparse.Namespace, monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(WAYS, "matrix", Way(lambda points: points, fails))
    monkeypatch.setattr(train, "Clouds", fails)
    mesh.run(tiny)
    with (tiny.out / "mesh.csv").open(newline="") as file:
        status = {(row["part"], row["who"], row["pass"]): row["status"] for row in csv.DictReader(file)}
    assert status["solver-32k", "matrix", "inference"] == "error: RuntimeError: no such kernel"
    assert status["train", "", ""] == "error: RuntimeError: no such kernel"
    assert status["solver-32k", "factors", "training"] == "ok"
