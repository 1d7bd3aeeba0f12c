"""Prices that stay what they are: in place of measured coefficients, so that choices do not move with these."""

from __future__ import annotations

import torch

from flashbias.attention.workload import Workload


class FixedPrices:
    """Stands in for `HeadCosts`: factors pay up to rank M/2 in bfloat16 and M/4 in float32, and a table pays.

    A score costs 128, an entry of a matrix as much again, an entry of a table 40; along a line only those near the
    diagonal are read.
    """

    device = "a made-up device"

    def __init__(self, workload: Workload, device: object = None) -> None:
        self.workload = workload
        self.pairs = 1e-6 * workload.batch * workload.seqlen_q * workload.seqlen_k
        self.column = (256 if workload.factor_dtype == torch.bfloat16 else 512) / workload.seqlen_k

    def factored(self, rank: int) -> float:
        return self.pairs * (128 + rank * self.column)

    def table(self, entries: int, local: bool = True, half_width: int | None = None, rank: int = 0) -> float:
        share = 1.0
        if local:
            assert half_width is not None
            share = min(1.0, (2 * half_width + 1) / self.workload.seqlen_k)
        return self.factored(rank) + self.pairs * 40 * share

    def dense(self) -> float:
        return self.pairs * (128 + 128 * self.workload.biases / self.workload.batch)
