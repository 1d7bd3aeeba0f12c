"""all-mpnet-base-v2: its relative bias through the bucket table, against its own attention, each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.biases import RelativeBuckets

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]

# The second inaugural address of Abraham Lincoln (1865, public domain), most of it.
TEXT = Path(__file__).with_name("lincoln.txt")
SEQLEN = 512
NUM_LAYERS, NUM_HEADS = 12, 12


@dataclass(frozen=True)
class Layer:
    """What one attention layer of the model received and returned, as it ran."""

    q: Tensor  # [1, H, N, 64], not scaled
    k: Tensor
    v: Tensor
    position_bias: Tensor  # [1, H, N, N]
    out: Tensor  # [1, H, N, 64]


@dataclass(frozen=True)
class Run:
    """One forward pass of the model over the text."""

    weight: Tensor  # [32, H]
    layers: list[Layer]


def watch(attention: Any) -> dict[str, Tensor]:
    """Return a record that the next forward pass fills in: q, k, v, position_bias, out."""
    record: dict[str, Tensor] = {}

    def keep_output(name: str) -> Callable[..., None]:
        return lambda _, args, out: record.update({name: out})

    def keep_argument(name: str, position: int) -> Callable[..., None]:
        return lambda _, args: record.update({name: args[position]})

    for name in ("q", "k", "v"):
        getattr(attention, name).register_forward_hook(keep_output(name))
    attention.register_forward_pre_hook(keep_argument("position_bias", 2))
    # What attention returned is what the output projection receives.
    attention.o.register_forward_pre_hook(keep_argument("out", 0))
    return record


@pytest.fixture(scope="module")
def run(mpnet_folder: Path) -> Run:
    from transformers import AutoTokenizer, MPNetModel

    model = MPNetModel.from_pretrained(mpnet_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(mpnet_folder)
    tokens = tokenizer(TEXT.read_text(), truncation=True, max_length=SEQLEN, return_tensors="pt")
    assert tokens["input_ids"].shape == (1, SEQLEN)

    records = [watch(layer.attention.attn) for layer in model.encoder.layer]
    with torch.no_grad():
        model(**tokens)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)

    layers = [
        Layer(*(heads(r[name]) for name in ("q", "k", "v")), r["position_bias"], heads(r["out"])) for r in records
    ]
    return Run(model.encoder.relative_attention_bias.weight.detach(), layers)


@pytest.fixture(scope="module")
def bias(run: Run) -> fb.FactoredBias:
    module = RelativeBuckets(NUM_HEADS)
    module.load_state_dict({"weight": run.weight})
    return module(SEQLEN, SEQLEN)


def test_bias_is_the_models_own_to_the_bit(run: Run, bias: fb.FactoredBias):
    assert run.weight.shape == (32, NUM_HEADS)
    assert run.weight.abs().max() > 1.0
    assert len(run.layers) == NUM_LAYERS
    for layer in run.layers:
        assert torch.equal(bias.dense(), layer.position_bias[0])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("index", range(NUM_LAYERS))
def test_attention_equals_the_models_own(run: Run, bias: fb.FactoredBias, index: int, impl: str):
    layer = run.layers[index]
    with torch.no_grad():
        out = fb.attention(layer.q, layer.k, layer.v, bias, impl=impl)
    torch.testing.assert_close(out, layer.out, rtol=0, atol=1e-5)


def test_without_its_bias_the_model_is_another(run: Run):
    """So that the test above is not passed by attention alone."""
    layer = run.layers[0]
    assert (fb.attention(layer.q, layer.k, layer.v) - layer.out).abs().max() > 0.1
