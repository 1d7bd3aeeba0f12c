"""FlashBias: Fast Computation of Attention with Bias.

https://arxiv.org/abs/2505.12044: factored biases add by standing side by side.

    b[h, i, j]  = sum_t b_t[h, i, j]
    phi_q[h, i] = [phi_q_1[h, i], phi_q_2[h, i], …]
    phi_k[h, j] = [phi_k_1[h, j], phi_k_2[h, j], …]
    table       = the sum of the terms' tables, if they are read with the same codes
    rank        = the sum of the ranks
    exactness   : that of the terms; a sum of tables is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from flashbias.biases.alibi import Alibi
from flashbias.biases.base import About, Bias, Example
from flashbias.biases.buckets import RelativeBuckets, relative_bucket
from flashbias.factored import FactoredBias

__all__ = ["Sum"]


class Sum(Bias):
    """Several families that are called alike, as one module.

    Formula: `b = b_1 + b_2 + …`.

    Each term receives the same arguments. For terms that take different ones, call each by itself and add
    the results: `alibi(N, M) + distance(x)`.

    Args:
        terms: at least one bias module; all with the same number of heads.

    Raises:
        TypeError: a term is no bias module.
        ValueError: no terms, or different numbers of heads.

    Examples:
        >>> import flashbias as fb
        >>> bias = fb.biases.Sum(fb.Alibi(8), fb.RelativeBuckets(8))(seqlen_q=64, seqlen_k=64)
        >>> bias.rank, bias.table.shape
        (2, torch.Size([8, 257]))

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, section 3.
    """

    about = About(
        title="FlashBias: Fast Computation of Attention with Bias",
        url="https://arxiv.org/abs/2505.12044",
        formula="b_1 + b_2 + …",
        rank="the sum of the ranks",
        exactness="that of the terms; a sum of tables is rounded once",
        bound=2.0**-22,
    )

    def __init__(self, *terms: Bias) -> None:
        for term in terms:
            if not isinstance(term, Bias):
                raise TypeError(f"terms must be biases, got {type(term).__name__}")
        heads = {term.num_heads for term in terms}
        if len(heads) != 1:
            raise ValueError(f"terms must be biases with one number of heads, got {sorted(heads)}")
        super().__init__(heads.pop())
        self.terms = nn.ModuleList(terms)

    def forward(self, *args: Any, **kwargs: Any) -> FactoredBias:
        """Call every term with the arguments, and add.

        Args:
            args: passed on.
            kwargs: passed on.

        Returns:
            The sum; `FactoredBias.__add__` says which tables can be added.
        """
        return reduce(add, (term(*args, **kwargs) for term in self.terms))

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Low rank and a table; two tables of different width."""
        seqlen_q, seqlen_k = 11, 13

        def build(bias: Sum, queries: range, keys: range) -> FactoredBias:
            return bias(len(queries), len(keys), queries.start, keys.start)

        def dense(bias: Sum) -> Tensor:
            alibi, buckets = cast(Alibi, bias.terms[0]), cast(RelativeBuckets, bias.terms[1])
            step = torch.arange(seqlen_k)[None, :] - torch.arange(seqlen_q)[:, None]
            line = alibi.slopes.cpu().double()[:, None, None] * (-step.abs() if alibi.symmetric else step)
            bucket = relative_bucket(step, buckets.num_buckets, buckets.max_distance)
            return line + buckets.weight.double().cpu()[bucket].permute(2, 0, 1)

        return [
            Example(name, cls(alibi, RelativeBuckets(4, 8, 6)), seqlen_q, seqlen_k, build, dense)
            for name, alibi in (
                ("low-rank-and-table", Alibi(4)),
                ("two-tables", Alibi(4, symmetric=True)),
            )
        ]
