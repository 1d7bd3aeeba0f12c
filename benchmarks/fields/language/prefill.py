"""BLOOM and MPT of transformers read a prompt, as they are and patched: time, memory, and the next tokens.

Four layers of the shapes of BLOOM-1b7 and MPT-1b, with random weights. The output layer is not tied to the embedding:
with random weights a tied one would predict the token that was read. Next tokens and logits of both are compared with
those of the same weights in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.fields.language.results import Results
from torch import Tensor, nn

from flashbias.bench.measure import measure

__all__ = ["prefill"]


@dataclass(frozen=True)
class Size:
    """Of a model and its prompt."""

    width: int = 2048
    heads: int = 16
    layers: int = 4
    vocabulary: int = 32_000
    tokens: int = 4096


SMALL = Size(32, 4, 2, 100, 48)


def prefill(results: Results) -> None:
    """Measure both models."""
    size = SMALL if results.arguments.small else Size()
    for name, make in (("BLOOM", bloom), ("MPT", mpt)):
        results.attempt("prefill", lambda results, name=name, make=make: read(results, name, make, size), case=name)


def bloom(size: Size) -> nn.Module:
    """ALiBi in the dtype of the model."""
    from transformers import BloomConfig, BloomForCausalLM

    shape: dict[str, Any] = {"hidden_size": size.width, "n_head": size.heads, "n_layer": size.layers}
    return BloomForCausalLM(BloomConfig(vocab_size=size.vocabulary, tie_word_embeddings=False, **shape))


def mpt(size: Size) -> nn.Module:
    """ALiBi in float32."""
    from transformers import MptConfig, MptForCausalLM

    shape: dict[str, Any] = {"d_model": size.width, "n_heads": size.heads, "n_layers": size.layers}
    shape |= {"max_seq_len": size.tokens}
    return MptForCausalLM(MptConfig(vocab_size=size.vocabulary, tie_word_embeddings=False, **shape))


@torch.no_grad()
def read(results: Results, name: str, make: Callable[[Size], nn.Module], size: Size) -> None:
    """One model: exact in float32, then as it is, then patched."""
    from flashbias.integrations import patch

    device, seed = results.device, results.arguments.seed
    torch.manual_seed(seed)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = make(size).eval().to(dtype)
        prompt = torch.randint(size.vocabulary, (1, size.tokens))
    exact = logits_of(copy.deepcopy(model).to(torch.float64 if device.type == "cpu" else torch.float32), prompt)
    for provider in ("eager", "patched"):
        if provider == "patched":
            report = patch(model)
            assert len(report.replaced) == size.layers, str(report)
        logits = logits_of(model, prompt)
        off = float((logits - exact).norm() / exact.norm())
        same = float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
        found = measure(lambda: model(prompt, use_cache=True, logits_to_keep=1), device,
                        budget_s=0.02 if results.arguments.small else 1.0, min_repetitions=2)  # fmt: skip
        results.add(
            "prefill", case=name, provider=provider, seqlen=size.tokens, ms=f"{found.median_ms:.4f}",
            p10_ms=f"{found.p10_ms:.4f}", p90_ms=f"{found.p90_ms:.4f}",
            peak_mib="" if found.peak_mib is None else f"{found.peak_mib:.1f}",
            error=f"{off:.2e}", agreement=f"{same:.5f}",
        )  # fmt: skip
        results.summary[f"{name}_{provider}_ms"] = round(found.median_ms, 3)
        results.summary[f"{name}_{provider}_same"] = round(same, 5)


def logits_of(model: nn.Module, prompt: Tensor) -> Tensor:
    """For every position, in float32."""
    return model(prompt, use_cache=False).logits.float()
