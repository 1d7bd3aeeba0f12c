"""Patch a Swin Transformer and see what changes: not the output and not the gradients, but memory.

    python examples/vision.py [--pixels 192]

The model is random and small, of transformers' own classes: nothing is downloaded. It looks at the same images twice,
first as transformers made it, then patched. Every second layer shifts its windows; their masks become factors too.
Memory is what torch's tensors hold at the same time, beyond the model; what a kernel uses inside is not seen.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SwinConfig, SwinModel

from flashbias.integrations import patch

IMAGES, PATCH, WINDOW = 2, 2, 12


def swin(pixels: int) -> nn.Module:
    """Two stages of two layers; windows of 144 tokens, every second layer shifted by half a window."""
    shape: dict[str, Any] = {"image_size": pixels, "patch_size": PATCH, "window_size": WINDOW, "drop_path_rate": 0.0}
    model = SwinModel(SwinConfig(**shape, embed_dim=48, depths=[2, 2], num_heads=[3, 6]))
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    return model.eval()


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
    """One way of attending."""

    out: Tensor
    gradient: Tensor
    seconds: float
    mebibytes: float


def measure(model: nn.Module, images: Tensor) -> Measured:
    """Look at the images for the gradients, for the memory and for the time."""
    model.zero_grad()
    model(images[:1]).last_hidden_state.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    with torch.no_grad():
        with PeakMemory() as memory:
            model(images)
        start = time.perf_counter()
        out = model(images).last_hidden_state
        seconds = time.perf_counter() - start
    return Measured(out, gradient, seconds, memory.peak / 2**20)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def main(pixels: int = 192) -> str:
    """Compare the model with itself and return the conclusion."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images = swin(pixels), torch.randn(IMAGES, 3, pixels, pixels)
    before = measure(model, images)
    print(patch(model), end="\n\n")
    after = measure(model, images)
    output, gradients = difference(after.out, before.out), difference(after.gradient, before.gradient)
    print(f"inference, {IMAGES} images of {pixels} x {pixels} pixels, windows of {WINDOW**2} tokens, one CPU thread")
    print(f"{'':12}{'time':>10}{'memory':>12}{'output':>12}{'gradients':>12}")
    print(f"{'as it was':12}{before.seconds:>8.2f} s{before.mebibytes:>8.1f} MiB")
    print(f"{'patched':12}{after.seconds:>8.2f} s{after.mebibytes:>8.1f} MiB{output:>12.0e}{gradients:>12.0e}")
    conclusion = (
        f"The patched Swin gives the same output (largest relative difference {output:.0e}) with "
        f"{before.mebibytes / after.mebibytes:.2f} times less memory, "
        f"{before.seconds / after.seconds:.2f} times as fast, on this CPU."
    )
    print(f"\n{conclusion}")
    return conclusion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=192, help="side of the images, at least 48 (default 192)")
    arguments = parser.parse_args()
    if arguments.pixels < 2 * PATCH * WINDOW:
        parser.error(f"--pixels must be at least {2 * PATCH * WINDOW}, got {arguments.pixels}")
    main(arguments.pixels)
