"""The small model: trained, and compared on held-out months with what needs no model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarks.fields.weather.data import Winds, load
from benchmarks.fields.weather.model import Size, WindModel
from benchmarks.fields.weather.record import Record
from benchmarks.record import Row
from torch import Tensor, nn

from flashbias.factored import FactoredBias

__all__ = ["Study", "train", "with_forms"]

TINY = Size(width=16, heads=2, layers=2)
BATCH = 16
RATE, TABLE_RATE = 1e-3, 1e-2
"""Of the weights, and of the tables, whose entries are each read by few pairs."""

NOISE = 0.3
"""Added to the anomaly while learning, in units of its spread: there are only 95 months."""


@dataclass(frozen=True)
class Study:
    """A model and its data, on one device."""

    winds: Winds
    model: WindModel

    def inputs(self, months: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the model, to predict `months`."""
        before, unit = self.winds.anomaly(months - 1), self.winds.spread
        return before / unit, self.winds.mean(months) / unit, months

    @torch.no_grad()
    def predicted(self, months: Tensor) -> Tensor:
        """`[months, 2, latitudes, longitudes]` in m/s, in float32."""
        self.model.eval()
        correction = torch.cat([self.model(*self.inputs(some)) for some in months.split(BATCH)])
        return self.winds.guess(months) + self.winds.spread * correction

    def tables(self) -> Tensor:
        """`[rows, layers * types * heads]`: what was learned."""
        return torch.cat([attention.bias.weight.detach().flatten(1) for attention in self.model.attentions], 1)

    def score(self, row: Row, predicted: Tensor, months: Tensor) -> None:
        """Fill in the error of a prediction, and how much it varies from month to month."""
        squares = self.winds.errors(predicted, months).square()
        each = squares.mean(1).sqrt()
        row["rmse"] = round(float(squares.mean().sqrt()), 4)
        row["rmse_u"], row["rmse_v"] = (round(float(x), 4) for x in squares.mean(0).sqrt())
        row["spread_over_months"] = round(float(each.std()), 4)


def train(record: Record) -> Study:
    """Train and score."""
    arguments = record.arguments
    winds = load().to(record.device)
    torch.manual_seed(arguments.seed)
    places = winds.field.shape[-2], winds.field.shape[-1]
    model = WindModel(TINY if arguments.small else Size(), places).to(record.device)
    study = Study(winds, model)
    tables = study.tables().numel()
    total = sum(p.numel() for p in model.parameters())
    record.summary |= {"parameters": total, "of_tables": tables, "spread_m_s": round(float(winds.spread), 4)}
    record.say(f"model of {total:,} parameters, {tables:,} of them in tables")
    _steps(record, study)
    record.write()
    _train(record, study)
    record.write()
    _score(record, study)
    record.write()
    return study


def _months(winds: Winds, which: range) -> Tensor:
    return torch.tensor(which, device=winds.field.device)


# -------------------------------------------------------------------- training


def _steps(record: Record, study: Study) -> None:
    """Time a step with the matrix and with the table, and compare their gradients of the tables."""
    months = _months(study.winds, study.winds.taught)[: 2 if record.arguments.small else BATCH]
    expected: Tensor | None = None
    for provider in ("dense SDPA", "exact table"):
        with record.row("step", provider=provider, note="difference: gradients of the tables") as row:
            model = copy.deepcopy(study.model).eval()  # without dropout, so that they can be compared
            for predict in model.predict:
                nn.init.normal_(predict.get_parameter("weight"), generator=_generator(record), std=0.1)
            trial = Study(study.winds, model)

            def step(trial: Study = trial, provider: str = provider) -> Tensor:
                for attention in trial.model.attentions:
                    attention.form = None if provider == "dense SDPA" else attention.bias()
                weights = [attention.bias.weight for attention in trial.model.attentions]
                gradients = torch.autograd.grad(_loss(trial, months, 0.0), weights)
                return torch.cat([gradient.flatten().double() for gradient in gradients])

            gradient = step()
            expected = gradient if expected is None else expected
            difference = float((gradient - expected).norm() / expected.norm())
            row["difference"] = f"{difference:.2e}"
            if not difference < 0.05:
                row["status"] = "wrong"
            record.time(row, step, 0.2)


def _generator(record: Record) -> torch.Generator:
    return torch.Generator(record.device).manual_seed(record.arguments.seed)


def _loss(study: Study, months: Tensor, noise: float) -> Tensor:
    """Mean square error of the prediction in units of the spread, weighted by area."""
    anomaly, climatology, _ = study.inputs(months)
    anomaly = anomaly + noise * torch.randn_like(anomaly)
    with torch.autocast("cuda", torch.bfloat16, enabled=anomaly.is_cuda):
        found = study.model(anomaly, climatology, months)
    expected = (study.winds.field[months] - study.winds.guess(months)) / study.winds.spread
    return ((found - expected).square() * study.winds.weights).mean()


def _train(record: Record, study: Study) -> None:
    """Keep the epoch that does best on the months of the validation."""
    arguments, model = record.arguments, study.model
    tables = [attention.bias.weight for attention in model.attentions]
    known = {id(table) for table in tables}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": others, "lr": RATE, "weight_decay": 0.1}]
    groups += [{"params": tables, "lr": TABLE_RATE, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    epochs = arguments.epochs or (1 if arguments.small else 60)
    taught, validation = _months(study.winds, study.winds.taught), _months(study.winds, study.winds.validation)
    if arguments.small:
        taught = taught[:BATCH]
    steps = epochs * math.ceil(len(taught) / BATCH)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_over(steps))
    best, kept, kept_epoch = math.inf, copy.deepcopy(model.state_dict()), 0
    began = time.perf_counter()
    for epoch in range(1, epochs + 1):
        if time.perf_counter() - began > arguments.seconds:
            record.say(f"no time for more than {epoch - 1} of {epochs} epochs")
            break
        with record.row("train", provider="dense SDPA", epoch=epoch) as row:
            model.train()
            losses = []
            for months in taught[torch.randperm(len(taught), device=taught.device)].split(BATCH):
                loss = _loss(study, months, NOISE)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
                losses.append(loss.detach())
            row["loss"] = round(float(torch.stack(losses).mean()), 4)
            study.score(row, study.predicted(validation), validation)
            row["seconds"] = round(time.perf_counter() - began, 2)
            row["note"] = "rmse: of the months of the validation"
        if float(str(row["rmse"] or "inf")) < best:
            best, kept, kept_epoch = float(str(row["rmse"])), copy.deepcopy(model.state_dict()), epoch
    model.load_state_dict(kept)
    record.summary |= {"epochs": epochs, "kept_epoch": kept_epoch}
    record.summary["train_seconds"] = round(time.perf_counter() - began, 1)


def _rate_over(steps: int) -> Callable[[int], float]:
    """Rise over the first tenth, then fall along a cosine."""
    warm = max(1, steps // 10)
    return lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


# -------------------------------------------------------------------- held-out months


def _score(record: Record, study: Study) -> None:
    winds, months = study.winds, _months(study.winds, study.winds.held_out)
    baselines: dict[str, Callable[[], Tensor]] = {
        "persistence": lambda: winds.field[months - 1],
        "climatology": lambda: winds.mean(months),
        "damped anomaly": lambda: winds.guess(months),
        "model": lambda: study.predicted(months),
    }
    for provider, predict in baselines.items():
        with record.row("score", provider=provider) as row:
            study.score(row, predict(), months)
            record.summary[f"rmse {provider}"] = row["rmse"]
    with record.row("score", provider="model, exact table", note="difference: fields, largest, m/s") as row:
        expected = study.predicted(months)
        found = with_forms(study, [attention.bias().detach() for attention in study.model.attentions], months)
        row["difference"] = f"{float((found - expected).abs().max()):.2e}"
        study.score(row, found, months)


def with_forms(study: Study, forms: Sequence[FactoredBias | Tensor], months: Tensor) -> Tensor:
    """What the model predicts with other forms of its biases."""
    try:
        for attention, form in zip(study.model.attentions, forms, strict=True):
            attention.form = form.to(study.winds.field.device)
        return study.predicted(months)
    finally:
        for attention in study.model.attentions:
            attention.form = None
