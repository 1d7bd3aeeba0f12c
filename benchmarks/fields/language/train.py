"""The GPT trained twice, with a dense bias and factored, from one seed and on the same batches; and read further."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from benchmarks.fields.language.data import load
from benchmarks.fields.language.model import GPT, Form, Shape
from benchmarks.fields.language.results import Results
from torch import Tensor

__all__ = ["Plan", "train"]

BITS = 1 / math.log(2)
"""Of a natural logarithm."""

FORMS: tuple[Form, ...] = ("dense", "factored")
"""The slower first: if time ends it early, the other takes as many steps."""

FURTHER = (1, 2, 4)


@dataclass(frozen=True)
class Plan:
    """Sizes of the training.

    Args:
        shape: of the GPT.
        length: of a text that it reads in training.
        batch: texts in a step.
        steps: how many.
        every: steps between two rows.
        held_out: bytes that are scored afterwards.
        group: bytes that follow one another and share a row of the part `position`.
    """

    shape: Shape = field(default_factory=Shape)
    length: int = 1024
    batch: int = 32
    steps: int = 1000
    every: int = 10
    held_out: int = 2**20
    group: int = 256

    @classmethod
    def small(cls) -> Plan:
        """For a CPU."""
        return cls(Shape(32, 2, 4), length=64, batch=4, steps=30, every=5, held_out=2**11, group=64)


@dataclass
class Trained:
    """A GPT after its training, with the loss of each step and the time between rows."""

    model: GPT
    losses: Tensor
    step_seconds: list[float] = field(default_factory=list)


def train(results: Results) -> None:
    """Train both, compare their curves, and score what they read beyond the length of training."""
    arguments = results.arguments
    plan = Plan.small() if arguments.small else Plan()
    steps = arguments.steps or plan.steps
    text = load()
    data, held_out = text.train.to(results.device), text.held_out.to(results.device)
    parameters = sum(p.numel() for p in GPT(plan.shape, "factored").parameters())
    results.summary |= {"parameters": parameters, "train_bytes": len(data), "held_out_bytes": len(held_out)}
    results.say(f"{parameters:,} parameters, {len(data):,} bytes to learn from, {steps} steps")
    found: dict[Form, Trained] = {}

    def train_one(form: Form) -> None:
        most = min([steps, *(len(other.losses) for other in found.values())])
        found[form] = run(results, plan, form, data, most)
        report_training(results, plan, form, found[form])

    for form in FORMS:
        results.attempt("train", lambda results, form=form: train_one(form), provider=form)
    if len(found) == len(FORMS):
        dense, factored = (smoothed(found[form].losses, plan.every) for form in FORMS)
        apart = (dense[: len(factored)] - factored).abs()
        results.summary["curves_apart_at_most"] = round(float(apart.max()), 5)
    score(results, plan, found, held_out)


def run(results: Results, plan: Plan, form: Form, data: Tensor, steps: int) -> Trained:
    """Train one; it ends early where `--seconds` are over."""
    arguments, device = results.arguments, results.device
    model = GPT(plan.shape, form).draw_parameters(arguments.seed).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=1.0, betas=(0.9, 0.95), fused=device.type == "cuda", eps=1e-8
    )
    losses = torch.full((steps,), torch.nan, device=device)
    trained = Trained(model, losses)
    began = marked = time.perf_counter()
    done = 0
    for step, (read, wanted) in enumerate(batches(plan, data, steps, arguments.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(read).flatten(0, 1).float(), wanted.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        done = step + 1
        if done % plan.every == 0:
            shown = float(losses[step]) * BITS  # also waits for the device
            now = time.perf_counter()
            trained.step_seconds.append((now - marked) / plan.every)
            marked = now
            if done % (10 * plan.every) == 0:
                results.say(f"{form}: step {done}, {shown:.3f} bits per byte, {now - began:.1f} s")
            if now - began > arguments.seconds:
                break
    trained.losses = losses[:done].cpu() * BITS
    if not bool(trained.losses.isfinite().all()):
        raise FloatingPointError(f"the {form} training gave a loss that is not finite")
    return trained


def parameter_groups(model: GPT) -> list[dict[str, object]]:
    """Matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int) -> float:
    """Rises to 1e-3 over the first tenth, at most 100 steps, then falls along a cosine to a tenth of that."""
    rise = min(100, max(1, steps // 10))
    if step < rise:
        return 1e-3 * (step + 1) / rise
    return 1e-3 * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def batches(plan: Plan, data: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What is read and what comes next, `[batch, length]` each; the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed + 1)
    starts = torch.randint(len(data) - plan.length, (steps, plan.batch, 1), generator=generator).to(data.device)
    within = torch.arange(plan.length + 1, device=data.device)
    for start in starts:
        taken = data[start + within].long()
        yield taken[:, :-1], taken[:, 1:]


def report_training(results: Results, plan: Plan, form: Form, trained: Trained) -> None:
    """A row for some steps each."""
    means = smoothed(trained.losses, plan.every)
    for index, (loss, seconds) in enumerate(zip(means.tolist(), trained.step_seconds, strict=True)):
        step = (index + 1) * plan.every
        results.add("train", quiet=True, provider=form, seqlen=plan.length, step=step, loss=f"{loss:.5f}",
                    ms=f"{1000 * seconds:.3f}")  # fmt: skip
    median = float(torch.tensor(trained.step_seconds).median())
    last = float(trained.losses[-10 * plan.every :].mean())
    results.summary |= {f"{form}_step_ms": round(1000 * median, 3), f"{form}_last_loss": round(last, 4)}
    results.summary["steps"] = len(trained.losses)
    results.say(f"{form}: {1000 * median:.1f} ms a step, {last:.4f} bits per byte at the end")


def smoothed(losses: Tensor, every: int) -> Tensor:
    """Means of steps that follow one another."""
    return losses[: len(losses) // every * every].reshape(-1, every).mean(1)


# -------------------------------------------------------------------- beyond the length of training


def score(results: Results, plan: Plan, found: dict[Form, Trained], held_out: Tensor) -> None:
    """Score the same held-out bytes at each length: windows of one length divide those of the next."""
    longest = plan.length * FURTHER[-1]
    count = min(plan.held_out, len(held_out) - 1) // longest * longest
    if not count:
        raise ValueError(f"held-out text of {len(held_out)} bytes is shorter than a window of {longest}")
    read = held_out[: count + 1]
    for form, trained in found.items():
        for attention in FORMS:
            results.attempt(
                "held-out",
                lambda results, form=form, attention=attention, model=trained.model: score_one(
                    results, plan, model, read, form, attention
                ),
                provider=form,
                attention=attention,
            )


def score_one(results: Results, plan: Plan, trained: GPT, text: Tensor, form: Form, attention: Form) -> None:
    """Rows of what was trained in one form and is read through one attention."""
    reader = GPT(plan.shape, attention).to(results.device)
    reader.load_state_dict(trained.state_dict())
    losses = torch.empty(0)
    for times in FURTHER:
        length = times * plan.length
        losses = byte_losses(reader, text, plan, length)
        mean = float(losses.mean())
        results.add("held-out", provider=form, attention=attention, seqlen=length, loss=f"{mean:.5f}")
        if attention == form:
            results.summary[f"{form}_held_out_{times}x"] = round(mean, 4)
    if attention == form:
        for index, loss in enumerate(losses.mean(0).unflatten(0, (-1, plan.group)).mean(1).tolist()):
            results.add("position", quiet=True, provider=form, attention=attention, seqlen=losses.shape[1],
                        step=index * plan.group, loss=f"{loss:.5f}")  # fmt: skip


@torch.no_grad()
def byte_losses(model: GPT, text: Tensor, plan: Plan, length: int) -> Tensor:
    """Bits of each byte, `[windows, length]`, given those before it in its window."""
    read, wanted = (part.long().unflatten(0, (-1, length)) for part in (text[:-1], text[1:]))
    at_once = max(1, plan.batch * plan.length // length)
    found = []
    for given, target in zip(read.split(at_once), wanted.split(at_once), strict=True):
        with torch.autocast(text.device.type, dtype=torch.bfloat16, enabled=text.device.type == "cuda"):
            logits = model(given)
        found.append(F.cross_entropy(logits.mT.float(), target, reduction="none"))
    return torch.cat(found).cpu() * BITS
