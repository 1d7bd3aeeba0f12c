"""What the predictor learns: distances of hidden residues, from the sequence and the distances among landmarks.

Four residues of ten, drawn at random, are landmarks; their mutual distances are given. All other pairs are asked
for. This is completion, as from sparse restraints; it is not prediction from the sequence alone, for which some
hundred chains do not suffice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmarks.fields.protein.data import Chain
from torch import Tensor

__all__ = ["BINS", "Example", "Score", "contact_probability", "draw", "example", "score", "task_loss"]

EDGES = torch.arange(4.0, 22.0)
"""Of the bins of distance, in ångströms."""
BINS = len(EDGES) + 1
CONTACT_BINS = 5
"""Those below 8 Å: a contact."""
LANDMARKS = 0.4
NEAREST = 6
"""Offset along the chain from which a pair counts."""


@dataclass(frozen=True)
class Example:
    """Chains of one length: `types [B, N]`; `known`, `target` and `asked`, `[B, N, N]`."""

    types: Tensor
    known: Tensor
    target: Tensor
    asked: Tensor


def example(types: Tensor, places: Tensor, generator: torch.Generator) -> Example:
    """Draw landmarks for `[B, N]` residues at `[B, N, 3]`; the generator is of the CPU."""
    distance = (places[:, :, None] - places[:, None]).norm(dim=-1)
    target = torch.bucketize(distance, EDGES.to(distance.device), right=True)
    landmark = (torch.rand(types.shape, generator=generator) < LANDMARKS).to(types.device)
    both = landmark[:, :, None] & landmark[:, None]
    place = torch.arange(types.shape[1], device=types.device)
    far = (place - place[:, None]).abs() >= NEAREST
    return Example(types, target.masked_fill(~both, BINS), target, ~both & far)


def draw(chains: Sequence[Chain], count: int, length: int, generator: torch.Generator) -> Example:
    """Crops of random chains that are long enough; large families are drawn by the root of their size."""
    fitting = [chain for chain in chains if len(chain.types) >= length]
    sizes = Counter(chain.family for chain in fitting)
    weights = torch.tensor([sizes[chain.family] ** -0.5 for chain in fitting])
    chosen = [fitting[i] for i in torch.multinomial(weights, count, replacement=True, generator=generator).tolist()]
    starts = [int(torch.randint(len(c.types) - length + 1, (), generator=generator)) for c in chosen]
    types = torch.stack([c.types[s : s + length] for c, s in zip(chosen, starts, strict=True)])
    places = torch.stack([c.places[s : s + length] for c, s in zip(chosen, starts, strict=True)])
    return example(types, places, generator)


def task_loss(logits: Tensor, asked: Example) -> Tensor:
    """Cross entropy of the bins, over the pairs that are asked for."""
    return F.cross_entropy(logits[asked.asked].float(), asked.target[asked.asked])


def contact_probability(logits: Tensor) -> Tensor:
    """Of a distance below 8 Å."""
    return logits.float().softmax(-1)[..., :CONTACT_BINS].sum(-1)


@dataclass(frozen=True)
class Score:
    """Of one chain: loss, area under the ROC curve and precision of the N most probable contacts."""

    loss: float
    auc: float
    precision: float


def score(logits: Tensor, asked: Example) -> Score:
    """Judge a batch of one chain, over the hidden pairs."""
    upper = asked.asked & torch.ones_like(asked.asked).triu()
    probability, contact = contact_probability(logits)[upper], asked.target[upper] < CONTACT_BINS
    best = probability.topk(min(asked.types.shape[1], len(probability))).indices
    return Score(
        float(task_loss(logits, asked)), _area(probability.cpu(), contact.cpu()), float(contact[best].float().mean())
    )


def _area(probability: Tensor, contact: Tensor) -> float:
    """Share of pairs (contact, none) that the probability orders rightly, ties by half."""
    _, inverse, counts = probability.double().unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
    positive = int(contact.sum())
    negative = len(contact) - positive
    if not positive or not negative:
        return float("nan")
    return float((rank[contact].sum() - positive * (positive + 1) / 2) / (positive * negative))
