"""The small model: trained, its tables compressed, its inference timed."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.fields.vision.data import CLASSES, PIXELS, Images, load
from benchmarks.fields.vision.record import Record
from benchmarks.record import Row
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

from flashbias.files import whole_file
from flashbias.integrations import PatchReport, patch, unpatch

__all__ = ["small", "small_speed"]

MEAN, SPREAD = 0.2860, 0.3530
"""Of the pixels of the images to learn from, between 0 and 1."""

SHIFT = 2
"""Largest shift of an image, in pixels, while learning."""

TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.001)


WAYS = {"eager": "as it is", "sdpa": "dense SDPA", "patched": "exact table"}
"""Ways to compute the attention in training, and what rows call them."""


@dataclass(frozen=True)
class Size:
    """How large model, data and batches are."""

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 4)
    heads: tuple[int, ...] = (2, 4)
    window: int = 7
    batch: int = 512
    train_images: int = 60_000
    test_images: int = 10_000
    batches: tuple[int, ...] = (1, 256)
    tolerances: tuple[float, ...] = TOLERANCES


TINY = Size(16, (2, 1), (1, 2), 7, 2, 4, 4, (1,), (0.1,))


def small(record: Record) -> None:
    """Train, compress, time."""
    size = TINY if record.arguments.small else Size()
    train_images, test_images = load()
    train_images = _first(train_images, size.train_images).to(record.device)
    test_images = _first(test_images, size.test_images).to(record.device)
    torch.manual_seed(record.arguments.seed)
    model = _model(size).to(record.device)
    record.say(f"Swin of {sum(p.numel() for p in model.parameters()):,} parameters")
    if record.arguments.weights is None:
        way = _steps(record, model, train_images, size)
        record.write()
        _train(record, model, train_images, way, size)
        record.write()
        _save(record, model)
    else:
        model.load_state_dict(torch.load(record.arguments.weights, map_location=record.device, weights_only=True))
    model.eval()
    _compress(record, model, test_images, size)
    record.write()
    _speed(record, model, test_images, size)
    record.write()


def small_speed(record: Record) -> None:
    """Time the small model again, with the tables that an earlier run has left; times ask for no other weights."""
    size = TINY if record.arguments.small else Size()
    torch.manual_seed(record.arguments.seed)
    model = _model(size)
    _load_tables(record, model)
    pixels = torch.randint(256, (max(size.batches), PIXELS, PIXELS), dtype=torch.uint8)
    images = Images(pixels.to(record.device), torch.zeros(len(pixels), dtype=torch.long))
    _speed(record, model.to(record.device).eval(), images, size)
    record.write()


def _first(images: Images, count: int) -> Images:
    return Images(images.pixels[:count], images.labels[:count])


def _model(size: Size) -> Any:
    """14 x 14 tokens in the first stage, four windows; 7 x 7 in the second, one window."""
    shape: dict[str, Any] = {"image_size": PIXELS, "patch_size": 2, "num_channels": 1, "window_size": size.window}
    shape |= {"embed_dim": size.embed_dim, "depths": list(size.depths), "num_heads": list(size.heads)}
    shape |= {"num_labels": CLASSES, "drop_path_rate": 0.1}
    return SwinForImageClassification(SwinConfig(**shape))


def _input(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[images, 1, 28, 28]`, normalised."""
    return ((pixels.float() / 255 - MEAN) / SPREAD)[:, None].to(dtype)


# -------------------------------------------------------------------- training


def _steps(record: Record, model: Any, images: Images, size: Size) -> str:
    """Time a step of each way; return the fastest whose gradients are those of the model as it is."""
    times: dict[str, float] = {}
    expected: Tensor | None = None
    for way, provider in WAYS.items():
        with record.row("step", provider=provider, batch=size.batch) as row:
            trained = _in_way(copy.deepcopy(model), way)
            gradient = _table_gradients(trained, images, min(32, size.batch))
            if expected is None:
                expected = gradient
            difference = float((gradient - expected).norm() / expected.norm())
            row["difference"] = f"{difference:.2e}"
            row["note"] = "difference: gradients of the tables, first 32 images"
            if not difference < 0.05:
                row["status"] = "wrong"
            optimizer = _optimizer(trained)
            picked = torch.arange(size.batch, device=record.device) % len(images)

            def step(trained: Any = trained, optimizer: Any = optimizer, picked: Tensor = picked) -> None:
                _step(trained, optimizer, images, picked)

            step()
            record.time(row, step, 0.3)
            if row["status"] == "ok":
                times[way] = float(str(row["ms"]))
    if not times:
        raise RuntimeError("no way of training works; see the rows of the part 'step'")
    return min(times, key=lambda way: times[way])


def _in_way(model: Any, way: str) -> Any:
    model.train()
    if way == "patched":
        patch(model)
    else:
        model.set_attn_implementation(way)
    return model


def _table_gradients(model: Any, images: Images, count: int) -> Tensor:
    """Without dropping any path, so that the ways can be compared."""
    model.eval()
    loss = _loss(model, _input(images.pixels[:count]), images.labels[:count])
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    gradients = torch.autograd.grad(loss, tables)
    model.train()
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay; biases, norms and tables do not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "bias_table" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() <= 1 or "bias_table" in name]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


def _loss(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=pixels.is_cuda):
        logits = model(pixels).logits
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def _step(model: Any, optimizer: torch.optim.Optimizer, images: Images, picked: Tensor) -> Tensor:
    loss = _loss(model, _augmented(_input(images.pixels[picked])), images.labels[picked])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _augmented(images: Tensor) -> Tensor:
    """Each image shifted by up to two pixels along both axes, half of them mirrored."""
    count, device = len(images), images.device
    black = (0 - MEAN) / SPREAD
    padded = F.pad(images[:, 0], (SHIFT,) * 4, value=black)
    rows, columns = torch.randint(2 * SHIFT + 1, (2, count, 1), device=device) + torch.arange(PIXELS, device=device)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]][:, None]


def _train(record: Record, model: Any, images: Images, way: str, size: Size) -> None:
    """Train in one way; fewer epochs than asked for where the time would not do."""
    (measured,) = (row for row in record.rows if row["part"] == "step" and row["provider"] == WAYS[way])
    steps_each = len(images) // size.batch
    affordable = int(record.arguments.seconds / (steps_each * float(str(measured["ms"])) / 1000))
    epochs = max(1, min(record.arguments.epochs, affordable))
    steps = epochs * steps_each
    record.say(f"training {WAYS[way]}: {epochs} epochs of {steps_each} steps")
    _in_way(model, way)
    optimizer = _optimizer(model)
    began = time.perf_counter()
    for epoch in range(epochs):
        with record.row("train", provider=WAYS[way], batch=size.batch, note=f"epoch {epoch + 1} of {epochs}") as row:
            order = torch.randperm(len(images), device=record.device)
            losses = []
            for step in range(steps_each):
                _set_rate(optimizer, epoch * steps_each + step, steps)
                losses.append(_step(model, optimizer, images, order[step * size.batch : (step + 1) * size.batch]))
            row["loss"] = round(float(torch.stack(losses).mean()), 4)
            row["seconds"] = round(time.perf_counter() - began, 2)
    record.summary |= {"trained": WAYS[way], "epochs": epochs, "train_seconds": round(time.perf_counter() - began, 1)}
    if way == "patched":
        unpatch(model)


def _set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Rise over the first twentieth, then fall along a cosine."""
    warm = max(1, steps // 20)
    rise, fall = min(1.0, (step + 1) / warm), 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * rise * fall


def _save(record: Record, model: nn.Module) -> None:
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with whole_file(record.arguments.out / "vision.pt") as part:
        torch.save(state, part)


# -------------------------------------------------------------------- compressed tables


def _compress(record: Record, model: Any, images: Images, size: Size) -> None:
    """Accuracy and logits in float32, of the model as it is and patched in all ways."""
    _save_tables(record, model)
    expected: Tensor | None = None
    with record.row("compress", provider="as it is") as row:
        model.set_attn_implementation("eager")
        expected = _logits(model, images)
        row["accuracy"] = _accuracy(expected, images)
        record.summary["test_accuracy"] = row["accuracy"]
    if expected is None:
        return
    with record.row("compress", provider="exact table") as row:
        _compare(row, *_patched(model, {}), images, expected)
    for tol in size.tolerances:
        with record.row("compress", provider="factors", tol=tol) as row:
            began = time.perf_counter()
            patched, report = _patched(model, {"tol": tol, "tables": "factors"})
            row["seconds"] = round(time.perf_counter() - began, 3)
            _compare(row, patched, report, images, expected)
            record.rows += [_layer_row(row, entry) for entry in report]


def _patched(model: Any, options: dict[str, Any]) -> tuple[Any, PatchReport]:
    patched = copy.deepcopy(model)
    return patched, patch(patched, **options)


def _layer_row(row: Row, entry: Any) -> Row:
    about: Row = {"layer": entry.name, "form": entry.form, "rank": entry.rank, "note": entry.note}
    about["certificate"] = "" if entry.certificate is None else f"{entry.certificate:.3e}"
    return {**dict.fromkeys(row, ""), "part": "layer", "tol": row["tol"], **about, "status": entry.status}


def _compare(row: Row, model: Any, report: PatchReport, images: Images, expected: Tensor) -> None:
    logits = _logits(model, images)
    row["accuracy"] = _accuracy(logits, images)
    row["difference"] = f"{float((logits - expected).abs().max()):.2e}"
    row["note"] = f"difference: largest of a logit; logits span {float(expected.max() - expected.min()):.1f}"
    fill_forms(row, report)


def fill_forms(row: Row, report: PatchReport) -> None:
    """What became of the tables: how many layers have which form, the largest rank, the largest certificate."""
    forms = sorted({entry.form for entry in report.replaced})
    row["form"] = " and ".join(f"{sum(e.form == form for e in report.replaced)} {form}" for form in forms)
    row["rank"] = max((entry.rank or 0 for entry in report.replaced), default=0)
    row["certificate"] = f"{report.certificate:.3e}"


@torch.no_grad()
def _logits(model: Any, images: Images) -> Tensor:
    return torch.cat([model(_input(pixels)).logits.float() for pixels in images.pixels.split(500)])


def _accuracy(logits: Tensor, images: Images) -> float:
    """In per cent."""
    return round(100 * float((logits.argmax(-1) == images.labels).double().mean()), 2)


def _save_tables(record: Record, model: nn.Module) -> None:
    """The learned tables, `[H, 2 window - 1, 2 window - 1]` each."""
    tables = {}
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            side = math.isqrt(len(parameter))
            tables[name] = parameter.detach().float().cpu().mT.reshape(-1, side, side).numpy().astype(np.float16)
    with whole_file(record.arguments.out / "vision.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **tables)  # pyright: ignore[reportArgumentType]


def _load_tables(record: Record, model: nn.Module) -> None:
    """The inverse of `_save_tables`.

    Raises:
        FileNotFoundError: nothing was saved.
    """
    path = record.arguments.out / "vision.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path}, which holds the learned tables, is missing: run the part 'small' first")
    with np.load(path) as saved, torch.no_grad():
        for name in saved.files:
            model.get_parameter(name).copy_(torch.from_numpy(saved[name]).flatten(1).mT)


# -------------------------------------------------------------------- speed


def _speed(record: Record, model: Any, images: Images, size: Size) -> None:
    """Inference in half precision; factors at the smallest tolerance at which every layer takes factors."""
    tol = _tolerance_of_factors(record)
    half = copy.deepcopy(model).to(record.dtype)
    ways: dict[str, dict[str, Any] | str] = {"as it is": "eager", "dense SDPA": "sdpa", "exact table": {}}
    if tol is not None:
        ways["factors"] = {"tol": tol, "tables": "factors"}
    record.summary["speed_tol"] = tol
    for batch in size.batches:
        pixels = _input(images.pixels[:batch], record.dtype)
        expected = torch.tensor(torch.nan)
        for provider, how in ways.items():
            with record.row("speed", provider=provider, batch=batch, tol=tol if provider == "factors" else "") as row:
                timed = copy.deepcopy(half)
                if isinstance(how, str):
                    timed.set_attn_implementation(how)
                else:
                    fill_forms(row, patch(timed, **how))
                with torch.no_grad():
                    logits = timed(pixels).logits.float()
                    if provider == "as it is":
                        expected = logits
                    row["difference"] = f"{float((logits - expected).norm() / expected.norm()):.2e}"
                    row["note"] = "difference: logits against those as it is, norms"
                    record.time(row, lambda timed=timed, pixels=pixels: timed(pixels), 0.5)


def _tolerance_of_factors(record: Record) -> float | None:
    """The smallest tolerance at which no layer stays a table; None if there is none."""
    layers = [row for row in record.rows or record.earlier if row["part"] == "layer"]
    tolerances = sorted({float(str(row["tol"])) for row in layers})
    for tol in tolerances:
        if all(row["form"] == "factors" for row in layers if float(str(row["tol"])) == tol):
            return tol
    return None
