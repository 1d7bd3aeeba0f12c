"""Teach an earth-specific bias on a made-up globe, and compress it.

    python examples/weather.py [--steps 150]

Pangu-Weather's windows know their latitude. Here the winds do too: what a place feels comes from the west in the
middle latitudes and from the east near the equator, and from farther away the nearer it is to the equator. Attention
without content (queries and keys are zero) has only the bias to learn that with. Its table is exact and trains; after
training the same bias is compressed to factors, each with a bound on the output.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import flashbias as fb

AROUND, HEAD_DIM = 8, 8  # windows around the globe, numbers of a token
TOLERANCES = (0.3, 0.1, 0.03)


def truth(places: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """`[types, tokens, tokens]`: how much of each key a query feels, rows of sum 1."""
    axes = [torch.arange(size) for size in window]
    z, lat, lon = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    shares = []
    for first in range(0, places[1], window[1]):
        degrees = ((first + lat + 0.5) / places[1] - 0.5) * math.pi
        drift = 2 * torch.cos(2 * degrees) - 1  # from the east near the equator, from the west elsewhere
        reach = 1 + torch.cos(degrees)
        east = (lon[None] - lon[:, None]) - drift[:, None]
        apart = (lat[None] - lat[:, None]).square() + (z[None] - z[:, None]).square()
        shares.append((-(east.square() + apart) / reach[:, None] ** 2).softmax(-1))
    return torch.stack(shares)


def main(
    steps: int = 150, places: tuple[int, int, int] = (2, 18, 96), window: tuple[int, int, int] = (2, 6, 12)
) -> str:
    """Teach, compress and return the conclusion."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    types, around = places[1] // window[1], min(AROUND, places[2] // window[2])
    bias = fb.EarthSpecificBias(num_heads=1, windows=(1, types), window=window)
    shares, tokens = truth(places, window), bias.num_tokens
    nothing = torch.zeros(around, types, tokens, HEAD_DIM)
    optimizer = torch.optim.Adam(bias.parameters(), lr=0.1)
    start = time.perf_counter()
    for _ in range(steps):
        values = torch.randn_like(nothing)
        loss = mse_loss(_attend(nothing, values, bias()), shares @ values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{types} types of windows of {tokens} tokens, {steps} steps in {time.perf_counter() - start:.1f} s")
    print(f"numbers of a window: table {bias.num_rows:,}, matrix {tokens**2:,}")
    with torch.no_grad():
        values = torch.randn_like(nothing)
        expected, learned = shares @ values, _attend(nothing, values, bias())
        matrix = bias().dense()
    error = float((learned - expected).norm() / expected.norm())
    print(f"error of the output against the truth: {error:.3f}")
    print(f"{'tolerance':>10}{'rank':>6}{'certificate':>13}{'output moved by':>17}")
    ranks = []
    for tol in TOLERANCES:
        try:
            factors = fb.compress(matrix, tol=tol, table=None, max_rank=tokens)
        except fb.NotLowRankError:
            print(f"{tol:>10g}   no factors keep this at less than the cost of the matrix: stay with the table")
            continue
        assert isinstance(factors, fb.FactoredBias)
        moved = float((_attend(nothing, values, factors) - learned).norm() / learned.norm())
        ranks.append(f"{factors.rank} at {tol:g}")
        print(f"{tol:>10g}{factors.rank:>6}{factors.report.certificate:>13.3f}{moved:>17.3f}")
    conclusion = (
        f"The learned table is {tokens**2 / bias.num_rows:.1f} times smaller than the matrix of a window and exact; as "
        f"factors it needs {' and '.join(ranks) or 'too many'} of {tokens} columns."
    )
    print(f"\n{conclusion}")
    return conclusion


def _attend(queries: Tensor, values: Tensor, bias: fb.FactoredBias) -> Tensor:
    """`[around, types, tokens, head_dim]`; with one head, types stand where heads do."""
    out = fb.attention(queries, queries, values, bias)
    assert isinstance(out, Tensor)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of training (default 150)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    main(arguments.steps)
