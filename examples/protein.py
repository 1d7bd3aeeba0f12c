"""Distil the bias of triangle attention into factors of residues, and compare the outputs.

    python examples/protein.py [--steps 600]

The bias of a pair fades with the distance of its residues, a Gaussian for each head: no formula gives its factors.
Networks that see one residue's place at a time are taught it on pieces of a real protein (PDB entry 2XHE), turned at
random, and judged on a part of the chain that was not taught.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashbias as fb
from flashbias.demo.protein import crystal
from flashbias.integrations.protein import triangle_attention

HEADS, HEAD_DIM = 4, 16
REACH, STRENGTH = torch.tensor([2.5, 3.5, 5.0, 7.0]), 4.0  # nanometres, and the bias of a residue to itself
RANKS = (4, 8, 16)


def pair_bias(places: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """`[H, n, m]` between some residues at `[N, 3]`: head h attends to what is within REACH[h], and fades smoothly."""
    distance = (places[queries, None] - places[keys]).norm(dim=-1)
    return STRENGTH * torch.exp(-((distance / REACH[:, None, None]).square()))


def windows(places: Tensor, residues: int, count: int) -> list[Tensor]:
    """Windows of the chain at random, each about its centre and turned at random, in nanometres."""
    starts = torch.randint(len(places) - residues + 1, (count,)).tolist()
    turns = torch.linalg.qr(torch.randn(count, 3, 3)).Q
    cut = [places[start : start + residues] for start in starts]
    return [(window - window.mean(0)) @ turn / 10 for window, turn in zip(cut, turns, strict=True)]


def main(steps: int = 600, residues: int = 96) -> str:
    """Teach three ranks and return the conclusion."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chain = torch.from_numpy(crystal()).float()[:566]  # Unc18
    taught, held_out = windows(chain[:420], residues, 400), windows(chain[420:], residues, 16)
    every = torch.arange(residues)
    q, k, v = torch.randn(3, 1, residues, HEADS, residues, HEAD_DIM)
    print(f"{len(taught)} windows of {residues} residues taught, {len(held_out)} held out; {steps} steps")
    print(f"{'rank':>6}{'seconds':>10}{'error of the bias':>20}{'error of the output':>22}")
    errors = {}
    for rank in RANKS:
        torch.manual_seed(0)
        student = fb.NeuralBias(in_features=3, num_heads=HEADS, rank=rank, hidden=(64, 64))
        start = time.perf_counter()
        report = fb.distill(
            student,
            pair_bias,
            taught,
            held_out=held_out,
            steps=steps,
            lr=1e-2,
            decay_every=max(1, steps // 60),
        )
        with torch.no_grad():
            matrix = pair_bias(held_out[0], every, every)
            expected = scaled_dot_product_attention(q, k, v, attn_mask=matrix)
            out = triangle_attention(q, k, v, student(held_out[0][None]))
        assert isinstance(out, Tensor)
        errors[rank] = float((out - expected).norm() / expected.norm())
        seconds = time.perf_counter() - start
        print(f"{rank:>6}{seconds:>10.1f}{report.best.relative_error:>20.3f}{errors[rank]:>22.3f}")
    best = min(errors, key=lambda rank: errors[rank])
    conclusion = (
        f"On residues that were not taught, triangle attention with factors of rank {best} differs by "
        f"{errors[best]:.1%} from that with the matrix; a head stores {2 * best} numbers for each "
        f"residue in place of {residues}."
    )
    print(f"\n{conclusion}")
    return conclusion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each distillation (default 600)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    main(arguments.steps)
