"""Train the predictor with dense biases, give its triangle attentions factors, and judge both on chains held out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from benchmarks.fields.protein.data import Chain
from benchmarks.fields.protein.model import Predictor, Student, materialised, residue_features
from benchmarks.fields.protein.task import BINS, Example, Score, draw, example, score, task_loss
from benchmarks.record import say
from torch import Tensor, nn

from flashbias.decompose.distill import distill

__all__ = ["SMALL", "Plan", "Study"]

Curve = list[tuple[int, float]]
Lessons = list[list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Plan:
    """Sizes of the study; seconds bound what a slow machine does."""

    channels: int = 64
    heads: int = 4
    blocks: int = 2
    batch: int = 8
    crops: tuple[int, ...] = (64, 96, 128, 128)
    longest: int = 256
    steps: int = 3000
    seconds: float = 45.0
    # Rank, and reach of the table.
    # Rank, and reach of the table.
    variants: tuple[tuple[int, int], ...] = ((32, 0), (8, 32), (32, 32))
    sketches: tuple[int, ...] = (16, 32, 64)
    taught: int = 256
    distill_steps: int = 600
    tune_steps: int = 120
    tune_seconds: float = 4.0
    hidden: tuple[int, ...] = (128, 128)


SMALL = Plan(
    channels=16, heads=2, blocks=1, batch=2, crops=(32,), longest=64, steps=20, variants=((4, 0), (4, 8)),
    sketches=(4,), taught=4, distill_steps=20, tune_steps=3, hidden=(32,),
)  # fmt: skip


@dataclass
class Study:
    """The model, its chains, and what was learned on the way."""

    plan: Plan
    train: Sequence[Chain]
    held_out: Sequence[Chain]
    device: torch.device
    seed: int = 0
    curve: Curve = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with an untrained model."""
        torch.manual_seed(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.train = [chain.to(self.device) for chain in self.train]
        self.held_out = [chain.to(self.device) for chain in self.held_out]
        self.model = Predictor(BINS, self.plan.channels, self.plan.heads, self.plan.blocks).to(self.device)
        self.tests = [self._test(index, chain) for index, chain in enumerate(self.held_out)]

    def learn(self) -> Curve:
        """Train the model with dense biases."""
        plan = self.plan
        self.curve = self._optimise(list(self.model.parameters()), 1e-3, plan.steps, plan.seconds, "dense")
        return self.curve

    @torch.no_grad()
    def evaluate(self) -> Score:
        """Means over the chains held out."""
        self.model.eval()
        scores = []
        for test in self.tests:
            with self._precision():
                logits = self.model(test.types, test.known)
            scores.append(score(logits, test))
        return Score(
            statistics.fmean(s.loss for s in scores),
            statistics.fmean(s.auc for s in scores if s.auc == s.auc),
            statistics.fmean(s.precision for s in scores),
        )

    @torch.no_grad()
    def logits(self, index: int) -> tuple[Example, Tensor]:
        """A chain held out, and what the model says of it."""
        self.model.eval()
        test = self.tests[index]
        with self._precision():
            return test, self.model(test.types, test.known).float()

    @contextmanager
    def without_bias(self) -> Iterator[None]:
        """Leave the bias out of all triangle attentions."""
        for triangle in self.model.triangles():
            triangle.form = "none"
        yield
        for triangle in self.model.triangles():
            triangle.form = "matrix"

    @contextmanager
    def truncated(self, rank: int) -> Iterator[None]:
        """Replace each matrix by its best factors of a rank, of its rows without their means: what the rank allows."""
        for triangle in self.model.triangles():
            triangle.attend = partial(_truncated, rank=rank)
        yield
        for triangle in self.model.triangles():
            triangle.attend = materialised

    @contextmanager
    def sketched(self, rank: int) -> Iterator[None]:
        """Let sketches of the pairs stand for the biases."""
        for triangle in self.model.triangles():
            triangle.sketch, triangle.form = rank, "factors"
        yield
        for triangle in self.model.triangles():
            triangle.sketch, triangle.form = 0, "matrix"

    @contextmanager
    def with_factors(self, students: Sequence[Student], dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Let networks stand for the biases, their factors rounded to `dtype`."""
        for triangle, student in zip(self.model.triangles(), students, strict=True):
            triangle.student, triangle.form, triangle.factor_dtype = student, "factors", dtype
        yield
        for triangle in self.model.triangles():
            triangle.student, triangle.form, triangle.factor_dtype = None, "matrix", torch.float32

    # ---------------------------------------------------------------- factors

    def lessons(self) -> Lessons:
        """For each attention, features `[1, N, F]` and the bias `[1, H, N, N]` of some chains: samples of `distill`."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        longest = max(self.plan.crops)
        train = [draw(self.train, 1, longest, generator) for _ in range(self.plan.taught)]
        return [list(samples) for samples in zip(*(self._lesson(one) for one in train), strict=True)]

    @torch.no_grad()
    def _lesson(self, one: Example) -> list[tuple[Tensor, Tensor]]:
        seen: list[Tensor] = []
        self.model.eval()
        self.model(one.types, one.known, seen)  # float32: the bias as it is
        return [
            (residue_features(z, triangle.to_bias), triangle.matrix(z).float())
            for z, triangle in zip(seen, self.model.triangles(), strict=True)
        ]

    def distil(self, rank: int, reach: int, lessons: Lessons) -> tuple[list[Student], list[float]]:
        """A student for each attention, and its relative error on crops that it was not taught."""
        students, errors = [], []
        for triangle, samples in zip(self.model.triangles(), lessons, strict=True):
            torch.manual_seed(self.seed)
            student = triangle.new_student(rank, self.plan.hidden, reach)
            student.networks.standardize(torch.cat([features for features, _ in samples]))
            report = distill(
                student,
                lambda sample, queries, keys: sample[1][:, :, queries][..., keys],
                samples,
                inputs=lambda sample: sample[0],
                steps=self.plan.distill_steps,
                lr=2e-3,
                decay=0.95,
                decay_every=max(1, self.plan.distill_steps // 60),
                eval_every=self.plan.distill_steps,
                mixed_precision=False,
                seed=self.seed,
            )
            students.append(student)
            errors.append(report.best.relative_error)
        return students, errors

    def tune(self, students: Sequence[Student]) -> Curve:
        """Move the networks of the factors, and nothing else, by the loss of the task."""
        weights = [p for student in students for p in student.parameters()]
        self.model.requires_grad_(False)
        with self.with_factors(students):
            for weight in weights:
                weight.requires_grad_(True)
            curve = self._optimise(weights, 5e-4, self.plan.tune_steps, self.plan.tune_seconds, "factors")
        self.model.requires_grad_(True)
        return curve

    # ---------------------------------------------------------------- steps

    def _optimise(self, weights: list[nn.Parameter], lr: float, steps: int, seconds: float, what: str) -> Curve:
        """Adam, the rate rising over the first twentieth and then falling to nothing with the time that is left."""
        optimizer = torch.optim.Adam(weights, lr)
        began, curve = time.perf_counter(), []
        self.model.train()
        for step in range(steps):
            if step == 1:
                began = time.perf_counter()  # the first step compiles
            spent = max(step / steps, (time.perf_counter() - began) / seconds)
            if spent >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 20 * spent + 0.02) * (1 - spent)
            length = self.plan.crops[step % len(self.plan.crops)]
            batch = draw(self.train, self.plan.batch, length, self.generator)
            with self._precision():
                logits = self.model(batch.types, batch.known)
            loss = task_loss(logits, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            if step % max(1, steps // 100) == 0 or step + 1 == steps:
                curve.append((step, loss.item()))
                if len(curve) % 10 == 1:
                    say(f"  {what}: step {step}, loss {curve[-1][1]:.3f}, {time.perf_counter() - began:.0f} s")
        return curve

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def _test(self, index: int, chain: Chain) -> Example:
        """The middle of a chain; lengths are multiples of 16, so that kernels are compiled for few of them."""
        length = min(self.plan.longest, len(chain.types) // 16 * 16)
        start = (len(chain.types) - length) // 2
        generator = torch.Generator().manual_seed(1000 + index)
        types, places = (x[None, start : start + length] for x in (chain.types, chain.places))
        return example(types, places, generator)


def _truncated(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rank: int) -> Tensor:
    assert bias is not None
    centred = bias.float() - bias.float().mean(-1, keepdim=True)
    with torch.autocast(q.device.type, enabled=False):
        left, size, right = torch.svd_lowrank(centred, q=rank + 8, niter=4)
        kept = (left[..., :rank] * size[..., None, :rank]) @ right[..., :rank].mT
    return materialised(q, k, v, kept.to(q.dtype))
