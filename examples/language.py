"""Patch three language models and see what changes: not the output and not the gradients, but memory and time.

    python examples/language.py [--tokens 2048]

The models are random and small, of transformers' own classes: nothing is downloaded. Each reads a padded batch, first
as transformers made it, then patched. Memory is what torch's tensors hold at the same time, beyond the model; what a
kernel uses inside is not seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BloomConfig, BloomModel, MPNetConfig, MPNetModel, T5Config, T5EncoderModel

from flashbias.integrations import patch

HEADS, HEAD_DIM, LAYERS, VOCABULARY = 4, 32, 2, 500
WIDTH = HEADS * HEAD_DIM


def t5(tokens: int) -> nn.Module:
    """Relative buckets: an exact table."""
    shape: dict[str, Any] = {
        "d_model": WIDTH,
        "d_kv": HEAD_DIM,
        "d_ff": 2 * WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    }
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **shape))


def mpnet(tokens: int) -> nn.Module:
    """Relative buckets too, which transformers computes for every sentence of the batch."""
    shape: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    shape |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": tokens + 2}
    shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MPNetModel(MPNetConfig(vocab_size=VOCABULARY, **shape), add_pooling_layer=False)


def bloom(tokens: int) -> nn.Module:
    """ALiBi: exact factors of rank 1."""
    return BloomModel(BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS))


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that are made inside and alive together, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it has made."""
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for made in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if made.data_ptr() not in known:
                self.alive[made.data_ptr()] = StorageWeakRef(made), made.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@dataclass
class Measured:
    """One model, one way of attending."""

    out: Tensor
    gradient: Tensor
    seconds: float
    mebibytes: float


def padded_batch(tokens: int) -> dict[str, Tensor]:
    """Two sentences, of which the second is a quarter shorter."""
    attention_mask = torch.ones(2, tokens, dtype=torch.long)
    attention_mask[1, tokens * 3 // 4 :] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (2, tokens)), "attention_mask": attention_mask}


def read(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of all tokens that are no padding."""
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def measure(model: nn.Module, batch: dict[str, Tensor], short: dict[str, Tensor]) -> Measured:
    """Read the batch twice, for the time and for the memory; learn from a short one."""
    model.zero_grad()
    read(model, short).square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    with torch.no_grad():
        with PeakMemory() as memory:
            read(model, batch)
        start = time.perf_counter()
        out = read(model, batch)
        seconds = time.perf_counter() - start
    return Measured(out, gradient, seconds, memory.peak / 2**20)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def compare(make: Callable[[int], nn.Module], tokens: int) -> tuple[Measured, Measured]:
    """Measure a model before and after `patch`."""
    torch.manual_seed(0)
    model, batch, short = make(tokens), padded_batch(tokens), padded_batch(64)
    before = measure(model, batch, short)
    print(patch(model), end="\n\n")
    return before, measure(model, batch, short)


def main(tokens: int = 2048) -> str:
    """Compare the three models and return the conclusion."""
    torch.set_num_threads(1)
    results = {make.__name__: compare(make, tokens) for make in (t5, mpnet, bloom)}
    print(f"inference, 2 x {tokens:,} tokens, {LAYERS} layers, one CPU thread; gradients of a step at 64 tokens")
    print(f"{'model':8}{'time':>10}{'patched':>10}{'memory':>12}{'patched':>12}{'output':>12}{'gradients':>12}")
    for name, (before, after) in results.items():
        print(
            f"{name:8}{before.seconds:>8.2f} s{after.seconds:>8.2f} s{before.mebibytes:>8.0f} MiB"
            f"{after.mebibytes:>8.0f} MiB{difference(after.out, before.out):>12.0e}"
            f"{difference(after.gradient, before.gradient):>12.0e}"
        )
    worst = max(difference(after.out, before.out) for before, after in results.values())
    saved = [before.mebibytes / after.mebibytes for before, after in results.values()]
    faster = [before.seconds / after.seconds for before, after in results.values()]
    conclusion = (
        f"At {tokens:,} tokens the patched models give the same output (largest relative difference {worst:.0e}) in "
        f"{min(saved):.1f} to {max(saved):.1f} times less memory, {min(faster):.1f} to {max(faster):.1f} times as fast."
    )
    print(f"\n{conclusion}")
    return conclusion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the batch, at least 64 (default 2048)")
    arguments = parser.parse_args()
    if arguments.tokens < 64:
        parser.error(f"--tokens must be at least 64, got {arguments.tokens}")
    main(arguments.tokens)
