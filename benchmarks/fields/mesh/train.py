"""Two solvers from one seed, with the bias and without, on bodies that neither has seen."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.fields.mesh.bodies import HELD_OUT, TRAINED, surfaces
from benchmarks.fields.mesh.charges import Clouds, Sample
from benchmarks.fields.mesh.evidence import Evidence
from benchmarks.fields.mesh.solver import WAYS, Solver
from torch import Tensor

from flashbias.files import whole_file

__all__ = ["Plan", "train"]

COMPARED = ("factors", "no bias")
RATE = 2e-3
CURVE = 20
"""Rows of a training curve."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a training.

    Args:
        points: of a cloud.
        each: clouds of each body to train on, and of each held-out one.
        batch: clouds of a step.
        steps: at most.
        width: of the solver.
        heads: of the solver.
        layers: of the solver.
    """

    points: int
    each: int
    batch: int
    steps: int
    width: int
    heads: int
    layers: int


FULL = Plan(points=2048, each=8, batch=8, steps=1500, width=128, heads=8, layers=4)
SMALL = Plan(points=256, each=2, batch=2, steps=40, width=32, heads=4, layers=2)


def train(evidence: Evidence) -> None:
    """Train the pairs, and test each model on every held-out body."""
    arguments, device = evidence.arguments, evidence.device
    plan = SMALL if arguments.small else FULL
    generator = _generator(device, 0)
    trained, held_out = (
        Clouds(surfaces(list(names)).to(device), plan.each, plan.points, generator) for names in (TRAINED, HELD_OUT)
    )
    test = held_out.sample(torch.arange(len(held_out.points), device=device), _generator(device, 1))
    scale = float(trained.draw(64, generator).density.std())
    evidence.say(f"{len(trained.points)} clouds of {plan.points} points, and their solution operators")
    steps = _affordable(plan, arguments.steps or plan.steps, trained, scale, arguments.seconds / 2 / arguments.seeds)
    fields: dict[str, Tensor] = {}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for who in COMPARED:
            torch.manual_seed(seed)
            model = Solver(WAYS[who], plan.width, plan.heads, plan.layers, 2 * plan.width).to(device)
            fit(model, trained, scale, steps, plan.batch, seed, evidence, who)
            fields[who] = predict(model, test, plan.batch) * scale
            errors = relative_errors(fields[who], test.density).view(len(HELD_OUT), -1).mean(-1).tolist()
            for body, error in zip(HELD_OUT, errors, strict=True):
                about = {"who": who, "body": body, "points": plan.points, "layers": plan.layers}
                evidence.add(part="body", relative_error=error, seed=seed, step=steps, **about)
            evidence.write()
    _summarise(evidence, steps)
    evidence.write()
    _keep(evidence, {"points": held_out.points, "true": test.density, **fields}, plan.each)


def fit(
    model: Solver, clouds: Clouds, scale: float, steps: int, batch: int, seed: int, evidence: Evidence, who: str
) -> None:
    """Minimise the square error of the density; each seed draws the same clouds and charges for every model."""
    generator = _generator(evidence.device, seed + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    every, errors = max(1, steps // CURVE), []
    for step in range(1, steps + 1):
        errors.append(_step(model, clouds.draw(batch, generator), scale, optimizer))
        schedule.step()
        if step % every == 0:
            error = float(torch.stack(errors).mean().sqrt())
            evidence.add(part="curve", who=who, seed=seed, step=step, relative_error=error)
            errors.clear()


def predict(model: Solver, test: Sample, batch: int) -> Tensor:
    """Densities of all test clouds `[B, N]`, in units of the training's scale."""
    with torch.no_grad(), _half(test.points.device):
        parts = zip(test.points.split(batch), test.potential.split(batch), strict=True)
        return torch.cat([model(points, potential).float() for points, potential in parts])


def relative_errors(found: Tensor, true: Tensor) -> Tensor:
    """Of each cloud, the error's norm as a part of the density's."""
    return (found - true).norm(dim=-1) / true.norm(dim=-1)


def _step(model: Solver, sample: Sample, scale: float, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step; returns the mean square error as a part of the density's mean square, without waiting for it."""
    target = sample.density / scale
    with _half(target.device):
        found = model(sample.points, sample.potential)
    loss = (found.float() - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach() / target.square().mean()


def _affordable(plan: Plan, steps: int, clouds: Clouds, scale: float, seconds: float) -> int:
    """As many steps as fit into the seconds, timed with a model that is thrown away."""
    device = clouds.points.device
    model = Solver(WAYS["factors"], plan.width, plan.heads, plan.layers, 2 * plan.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = _generator(device, 0)
    some = 20 if device.type == "cuda" else 2
    for _ in range(some):
        _step(model, clouds.draw(plan.batch, generator), scale, optimizer).item()
    start = time.perf_counter()
    for _ in range(some):
        last = _step(model, clouds.draw(plan.batch, generator), scale, optimizer)
    last.item()
    return max(2, min(steps, int(seconds * some / (time.perf_counter() - start))))


def _summarise(evidence: Evidence, steps: int) -> None:
    rows = [row for row in evidence.rows if row["part"] == "body"]
    evidence.summary["steps"] = steps
    for who in COMPARED:
        errors = [float(str(row["relative_error"])) for row in rows if row["who"] == who]
        evidence.summary[f"relative_error_{who.replace(' ', '_')}"] = round(statistics.fmean(errors), 4)


def _keep(evidence: Evidence, arrays: dict[str, Tensor], each: int) -> None:
    """`mesh.npz`: the first cloud of each held-out body, as the body stands, its true field and those computed last."""
    kept = {name: array[::each].cpu().numpy().astype(np.float32) for name, array in arrays.items()}
    with whole_file(evidence.arguments.out / "mesh.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **kept)


def _half(device: torch.device) -> torch.autocast:
    """Bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
