"""A SwinV2-B for 384 pixels with windows of 24 x 24 tokens, with random weights: inference, training, attention alone.

The sizes are those of `microsoft/swinv2-base-patch4-window12to24-192to384-22kto1k-ft`. Two kinds of random weights:
"fresh" is what transformers starts from, whose biases hardly vary; "sharp" has larger weights in the networks of the
biases, so that heads differ as learned ones do. Ranks depend on that, other times do not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.fields.vision import attend as ways
from benchmarks.fields.vision.attend import Added, Attend
from benchmarks.fields.vision.kernels import add_kernels
from benchmarks.fields.vision.record import Record
from benchmarks.fields.vision.small import fill_forms
from benchmarks.graph import captured
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import Swinv2Config, Swinv2Model

import flashbias as fb
from flashbias.biases.regions import shifted_window_regions
from flashbias.factored import FactoredBias
from flashbias.integrations import patch, unpatch
from flashbias.integrations.windows import cosine_operands, sigmoid_table, split_heads

__all__ = ["full"]

Make = Callable[[Added, torch.dtype], Attend]

FRESH_TOL, SHARP_TOL = 0.01, 0.2
"""Tolerances at which (nearly) all layers take factors; at 0.1 the sharp ones stay tables, but for the last stage."""

TAKEN_APART = ("FlexAttention", "exact table", "factors", "no attention")
"""Providers whose kernels are listed one by one."""

RANKS = (16, 32, 64)
"""Of random factors, whose time is that of any factors of their rank."""


@dataclass(frozen=True)
class Size:
    """How large model and batches are."""

    pixels: int = 384
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 24
    batch: int = 64
    train_batch: int = 16


TINY = Size(32, 32, (2, 2), (1, 2), 4, 2, 2)


def full(record: Record) -> None:
    """Inference, attention alone, a training step: the parts that are asked for."""
    size = TINY if record.arguments.small else Size()
    torch.manual_seed(record.arguments.seed)
    with record.device:
        shape: dict[str, Any] = {"image_size": size.pixels, "patch_size": 4, "window_size": size.window}
        shape |= {"embed_dim": size.embed_dim, "depths": list(size.depths), "num_heads": list(size.heads)}
        fresh: Any = Swinv2Model(Swinv2Config(**shape, drop_path_rate=0.0)).eval()
    fresh.requires_grad_(False)
    sharp = _sharpened(copy.deepcopy(fresh))
    images = torch.randn(size.batch, 3, size.pixels, size.pixels, device=record.device)
    record.say(f"SwinV2 of {sum(p.numel() for p in fresh.parameters()):,} parameters")
    parts, bench, compiled = record.arguments.parts, _Inference(record, sharp, images), ways.flex()
    if "full" in parts:
        bench.peers()
        bench.patched("exact table", {})
        bench.patched("factors", {"tol": SHARP_TOL, "tables": "factors"})
        record.write()
        if record.device.type == "cuda":
            bench.peer("FlexAttention", compiled)
        _Inference(record, fresh, images, "fresh").patched("factors", {"tol": FRESH_TOL, "tables": "factors"})
        _summarize(record)
        record.write()
    if "attention" in parts:
        _attention_alone(record, bench.half, size, compiled)
        record.write()
    if "full-step" in parts:
        _training(record, bench.half, images[: size.train_batch].to(record.dtype))
        record.write()


def _summarize(record: Record) -> None:
    """Ratios of the two claims, end to end: over the model as it is, and over the fastest dense kernel."""
    rows = [row for row in record.rows if row["part"] == "full" and row["ms"] != "" and row["status"] == "ok"]
    times = [(str(row["provider"]), str(row["weights"]), float(str(row["ms"]))) for row in rows]
    theirs = {name: ms for name, weights, ms in times if weights == "sharp"}
    dense = [ms for name, ms in theirs.items() if name.startswith(("dense SDPA", "FlexAttention"))]
    for name, weights, ms in times:
        if name in ("exact table", "factors") and "as it is" in theirs and dense:
            key = f"{name}, {weights}"
            best = record.summary.get(key)
            if not isinstance(best, dict) or best["ms"] > ms:
                over = {"over_as_it_is": theirs["as it is"] / ms, "over_best_dense": min(dense) / ms}
                record.summary[key] = {"ms": ms} | {claim: round(ratio, 3) for claim, ratio in over.items()}
    if "no attention" in theirs:
        shares = {name: round(1 - theirs["no attention"] / ms, 3) for name, ms in theirs.items()}
        record.summary["share_of_attention"] = shares


def _sharpened(model: nn.Module) -> nn.Module:
    """As in `benchmarks/decomposition/swin.py`."""
    for name, parameter in model.named_parameters():
        if "continuous_position_bias_mlp" in name:
            nn.init.normal_(parameter, std=0.1 if name.endswith("2.weight") else 0.7)
    return model


# -------------------------------------------------------------------- layers of the model


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers, each with `attention.self`."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ == "Swinv2Layer")


def _added(layer: Any) -> Added:
    """What a layer adds to its scores; gradients reach its network."""
    attention = layer.attention.self
    offsets = sigmoid_table(attention.continuous_position_bias_mlp(attention.relative_coords_table))
    tokens = layer.window_size**2
    bias = offsets[attention.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
    regions = None
    if layer.shift_size > 0:
        sides = (layer.window_size,) * 2, (layer.shift_size,) * 2
        regions = shifted_window_regions(tuple(layer.input_resolution), *sides, offsets.device)
    return Added(bias.contiguous(), regions)


def _set_attention(model: nn.Module, make: Make, learning: bool = False) -> None:
    """Give every attention another way to compute; while learning, its bias is made anew for each call."""
    for _, layer in _layers(model):
        attention = layer.attention.self
        dtype = attention.query.weight.dtype
        made = None if learning else make(_added(layer), dtype)
        attention.forward = partial(_forward, layer, made, lambda added, dtype=dtype: make(added, dtype))
        layer.get_attn_mask = _no_mask


def _forward(layer: Any, made: Attend | None, make: Any, hidden_states: Tensor, *ignored: Any, **options: Any) -> Any:
    """`Swinv2SelfAttention.forward` around any way to attend."""
    attention = layer.attention.self
    projections = (attention.query, attention.key, attention.value)
    query, key, value = (split_heads(project(hidden_states), attention.attention_head_size) for project in projections)
    query, key = cosine_operands(query, key, attention.logit_scale)
    out = (made or make(_added(layer)))(query, key, value)
    return (out.transpose(1, 2).flatten(-2),)


def _no_mask(*ignored: Any, **options: Any) -> None:
    """In place of a layer's `get_attn_mask`: what is added to the scores has it."""


def _reset_attention(model: nn.Module) -> None:
    """Also of a model of which only some layers were set."""
    for _, layer in _layers(model):
        layer.attention.self.__dict__.pop("forward", None)
        layer.__dict__.pop("get_attn_mask", None)


# -------------------------------------------------------------------- inference


class _Inference:
    """A model in bfloat16 whose output is compared with that of the same weights in float32 as the library runs it.

    Args:
        record: where rows go.
        model: float32; it stays as it is.
        images: of a batch.
        weights: what rows call them.
    """

    def __init__(self, record: Record, model: nn.Module, images: Tensor, weights: str = "sharp") -> None:
        self.record, self.weights = record, weights
        self.half: Any = copy.deepcopy(model).to(record.dtype)
        self.images = images.to(record.dtype)
        with torch.no_grad():
            rounded: Any = copy.deepcopy(self.half).float()
            self.expected: Tensor = rounded(self.images[:2].float()).last_hidden_state
            self.rounding = self._difference()

    def peers(self) -> None:
        """Everything that needs no compiler."""
        self._run("as it is")
        cudnn, efficient = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
        self.peer("dense SDPA", ways.dense_sdpa(None))
        if self.record.device.type == "cuda":
            self.peer("dense SDPA, efficient", ways.dense_sdpa(efficient))
            self.peer("dense SDPA, cuDNN", ways.dense_sdpa(cudnn))
            self.peer("bias-free, cuDNN", ways.bias_free(cudnn), comparable=False)
        self.peer("bias-free", ways.bias_free(None), comparable=False)
        self.peer("no attention", ways.without, comparable=False)

    def peer(self, provider: str, make: Make, comparable: bool = True) -> None:
        """One way around this library."""
        try:
            with torch.no_grad():
                self._run(provider, lambda: _set_attention(self.half, make), comparable)
        finally:
            _reset_attention(self.half)

    def patched(self, provider: str, options: dict[str, Any]) -> None:
        """This library."""
        with self.record.row("full", provider=provider, weights=self.weights, batch=len(self.images)) as row:
            row["tol"] = options.get("tol", "")
            began = time.perf_counter()
            report = patch(self.half, **options)
            try:
                row["seconds"] = round(time.perf_counter() - began, 2)
                fill_forms(row, report)
                ranks = [entry.rank for entry in report.replaced]
                row["note"] = f"seconds: of patch; ranks of the layers: {' '.join(map(str, ranks))}"
                self._fill(row, comparable=not options)
                self._taken_apart(provider)
            finally:
                unpatch(self.half)

    def _run(self, provider: str, ready: Callable[[], None] | None = None, comparable: bool = True) -> None:
        with self.record.row("full", provider=provider, weights=self.weights, batch=len(self.images)) as row:
            if ready is not None:
                ready()
            self._fill(row, comparable)
        self._taken_apart(provider)

    def _taken_apart(self, provider: str) -> None:
        """Kernel by kernel, for those between which the page has to explain a difference."""
        if provider in TAKEN_APART and self.weights == "sharp":
            with torch.no_grad():
                add_kernels(self.record, provider, self.weights, lambda: self.half(self.images))

    def _fill(self, row: dict[str, object], comparable: bool) -> None:
        with torch.no_grad():
            difference = self._difference()
            row["difference"] = f"{difference:.2e}"
            # Twice the rounding of the model as it is: other orders of summation round otherwise.
            if comparable and not difference <= 2 * self.rounding + 1e-3:
                row["status"] = f"wrong: as it is, bfloat16 differs from float32 by {self.rounding:.2e}"
                return
            self.half(self.images)
            self.record.time(row, lambda: self.half(self.images), 1.0)

    def _difference(self) -> float:
        out = self.half(self.images[:2]).last_hidden_state.float()
        return float((out - self.expected).norm() / self.expected.norm())


# -------------------------------------------------------------------- a training step


def _training(record: Record, model: Any, images: Tensor) -> None:
    """Forward and backward to every parameter, in half precision."""
    model.requires_grad_(True)
    exact = "exact table"
    # The one kernel on a GPU that gives a gradient to the matrix.
    backend = SDPBackend.EFFICIENT_ATTENTION if record.device.type == "cuda" else None
    peers: dict[str, Make | None] = {"as it is": None, "dense SDPA": ways.dense_sdpa(backend), exact: None}
    peers["bias-free"] = ways.bias_free(None)
    expected: Tensor | None = None
    with torch.no_grad():
        probe = torch.randn_like(model(images).last_hidden_state.float())

    def step() -> list[Tensor | None]:
        loss = (model(images).last_hidden_state.float() * probe).mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    def network_gradient(grads: list[Tensor | None]) -> Tensor:
        found = zip(model.named_parameters(), grads, strict=True)
        return torch.cat(
            [g.flatten().double() for (n, _), g in found if g is not None and "continuous_position_bias_mlp" in n]
        )

    def compare(row: dict[str, object], grads: list[Tensor | None]) -> None:
        nonlocal expected
        gradient = network_gradient(grads)
        expected = gradient if expected is None else expected
        row["difference"] = f"{float((gradient - expected).norm() / expected.norm()):.2e}"
        row["note"] = "difference: gradients of the networks of the biases, both of this dtype"

    for provider, make in peers.items():
        about = {"weights": "sharp", "batch": len(images)}
        try:
            is_ready = False
            with record.row("full-step", provider=provider, **about) as row:
                if provider == exact:
                    patch(model)
                elif make is not None:
                    _set_attention(model, make, learning=True)
                is_ready = True
                grads = step()
                if provider != "bias-free":
                    compare(row, grads)
                record.time(row, step, 0.5)
            # As it is, the model makes masks on the host.
            if record.device.type == "cuda" and provider != "as it is" and is_ready:
                with record.row("full-step", provider=f"{provider}, CUDA graph", **about) as row:
                    replay, grads = captured(step)
                    replay()
                    if provider != "bias-free":
                        compare(row, grads)
                    record.time(row, replay, 0.5)
                    row["peak_mib"] = ""  # what it uses was allocated when it was captured
                    del replay, grads
        finally:
            if provider == exact:
                unpatch(model)
            elif make is not None:
                _reset_attention(model)
    model.requires_grad_(False)


# -------------------------------------------------------------------- attention alone


def _attention_alone(record: Record, model: Any, size: Size, compiled: Make) -> None:
    """Of the first layer, its shifted neighbour, and the first of the deepest stage with the whole window."""
    layers = [layer for _, layer in _layers(model)]
    deep = next(layer for layer in layers[2 * len(size.depths) :: -1] if layer.window_size == size.window)
    chosen = {"stage 1": layers[0], "stage 1, shifted": layers[1], "deep stage": deep}
    for name, layer in chosen.items():
        with torch.no_grad():
            added = _added(layer)
            inputs = _operands(layer, size.batch, record)
            few = added.windows * min(2, size.batch)
            expected = ways.eager(added, torch.float32)(*(x[:few].float() for x in inputs))
            for provider, prepare in _ways_alone(record, added, compiled).items():
                about = {"provider": provider, "weights": "sharp", "layer": name, "batch": len(inputs[0])}
                with record.row("attention", **about) as row:
                    made, row["rank"], row["certificate"] = prepare()
                    run = made(added, record.dtype)
                    difference = float((run(*inputs)[:few].float() - expected).norm() / expected.norm())
                    row["difference"] = f"{difference:.2e}"
                    record.time(row, lambda run=run, inputs=inputs: run(*inputs), 0.2)


def _operands(layer: Any, batch: int, record: Record) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries and keys on the sphere, `[images * windows, H, N, head_dim]`."""
    attention = layer.attention.self
    windows = (layer.input_resolution[0] // layer.window_size) ** 2
    shape = (batch * windows, attention.num_attention_heads, layer.window_size**2, attention.attention_head_size)
    query, key, value = (torch.randn(shape, device=record.device, dtype=record.dtype) for _ in range(3))
    return *cosine_operands(query, key, attention.logit_scale), value


def _ways_alone(record: Record, added: Added, compiled: Make) -> dict[str, Callable[[], tuple[Make, Any, Any]]]:
    """Each provider, with what it takes to prepare it, its rank and its certificate."""

    def peer(make: Make) -> Callable[[], tuple[Make, Any, Any]]:
        return lambda: (make, "", "")

    def form(**options: Any) -> tuple[Make, Any, Any]:
        bias = fb.compress(added.bias.float().cpu(), **options)
        assert isinstance(bias, FactoredBias)
        return ways.ours(bias.to(record.device)), bias.rank, f"{bias.report.certificate:.3e}"

    def random(rank: int) -> tuple[Make, Any, Any]:
        shape = (*added.bias.shape[:2], rank)
        # In the dtype that `compress` takes where it keeps the promise.
        phi_q, phi_k = ((torch.randn(shape, device=record.device) / rank**0.5).to(record.dtype) for _ in range(2))
        return ways.ours(FactoredBias(phi_q, phi_k)), rank, ""

    found = {"as it is": peer(ways.eager), "dense SDPA": peer(ways.dense_sdpa(None))}
    if record.device.type == "cuda":
        found["dense SDPA, efficient"] = peer(ways.dense_sdpa(SDPBackend.EFFICIENT_ATTENTION))
        found["dense SDPA, cuDNN"] = peer(ways.dense_sdpa(SDPBackend.CUDNN_ATTENTION))
        found["bias-free, flash"] = peer(ways.bias_free(SDPBackend.FLASH_ATTENTION))
        found["bias-free, cuDNN"] = peer(ways.bias_free(SDPBackend.CUDNN_ATTENTION))
        found["FlexAttention"] = peer(compiled)
    found["bias-free"] = peer(ways.bias_free(None))
    found["exact table"] = partial(form, table="exact")
    found[f"factors, tol {SHARP_TOL:g}"] = partial(form, tol=SHARP_TOL, table=None)
    for rank in RANKS:
        found[f"random factors, rank {rank}"] = partial(random, rank)
    return found
