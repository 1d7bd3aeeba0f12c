"""The frozen cases: shapes, ranks and biases taken from real models, and inputs drawn for them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flashbias.biases.alibi import Alibi
from flashbias.biases.distance import SquaredDistance
from flashbias.factored import FactoredBias

__all__ = ["CASES", "Case", "Inputs", "case_names", "find_cases", "flatten"]

BiasKind = Literal["low-rank", "alibi", "distance"]

SMALL_SEQLEN, SMALL_BATCH, SMALL_HEADS, SMALL_HEAD_DIM = 72, 3, 2, 32


@dataclass(frozen=True)
class Case:
    """One problem that every provider is timed on: self-attention of `[*batch, H, N, head_dim]`.

    Args:
        name: as it stands in the CSV.
        batch: leading batch dimensions; two of them for triangle attention, `(1, rows)`.
        num_heads: H.
        seqlen: N, of queries and of keys.
        head_dim: width of query, key and value.
        rank: width R of the factors.
        bias: `low-rank`: normal factors in the dtype of the queries, so that b has variance 1;
            `alibi`: float32 ALiBi factors, frozen; `distance`: float32 factors of a squared distance between
            points of the unit cube, with a positive weight for every query.
        is_causal: whether keys after the query are hidden.
        shared: whether one bias serves the whole batch (factors `[1, …, H, N, R]`).
        tags: where the shape comes from.
    """

    name: str
    batch: tuple[int, ...]
    num_heads: int
    seqlen: int
    head_dim: int
    rank: int
    bias: BiasKind = "low-rank"
    is_causal: bool = False
    shared: bool = False
    tags: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Softmax scale, head_dim ** -0.5."""
        return self.head_dim**-0.5

    @property
    def learns_bias(self) -> bool:
        """Whether the factors take a gradient in `fwdbwd`; ALiBi is frozen."""
        return self.bias != "alibi"

    @property
    def shape(self) -> str:
        """Shape for a table: `BxHxNxD`, rank, causal or shared where so."""
        dims = "×".join(str(n) for n in (*self.batch, self.num_heads, self.seqlen, self.head_dim))
        notes = [f"R{self.rank}"] + ["causal"] * self.is_causal + ["bias shared over the batch"] * self.shared
        return f"{dims} {', '.join(notes)}"

    def small(self) -> Case:
        """The same kind of problem, small enough for a CPU; its name ends in `@small`."""
        return replace(
            self,
            name=f"{self.name}@small",
            batch=tuple(min(n, SMALL_BATCH) for n in self.batch),
            num_heads=min(self.num_heads, SMALL_HEADS),
            seqlen=min(self.seqlen, SMALL_SEQLEN + self.seqlen % 2),
            head_dim=min(self.head_dim, SMALL_HEAD_DIM),
        )

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
        """Draw fresh random inputs; the same seed gives the same values on the same kind of device.

        Args:
            dtype: of query, key, value and of low-rank factors.
            device: where they are drawn.
            seed: of the run; each case mixes its name in.
        """
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        tokens = (*self.batch, self.num_heads, self.seqlen, self.head_dim)
        query, key, value, dout = (normal(*tokens) for _ in range(4))
        slopes = None
        if self.bias == "low-rank":
            lead = (1,) * len(self.batch) if self.shared else self.batch
            # Each factor has variance R^-1/2, so that b, a sum of R products, has variance 1.
            phi_q, phi_k = (
                normal(*lead, self.num_heads, self.seqlen, self.rank).mul_(self.rank**-0.25) for _ in range(2)
            )
        elif self.bias == "alibi":
            phi_q, phi_k, slopes = self._alibi_factors(device)
        else:
            phi_q, phi_k = self._distance_factors(generator, device)
        return Inputs(self, query, key, value, dout, phi_q, phi_k, slopes)

    def _alibi_factors(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 factors `[1, …, H, N, 2]`, `[1, …, 1, N, 2]` and slopes `[H]`."""
        alibi = Alibi(self.num_heads)
        bias = alibi(seqlen_q=self.seqlen, seqlen_k=self.seqlen, device=device)
        return *self._unbatched(bias), alibi.slopes.to(device)

    def _distance_factors(self, generator: torch.Generator, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Float32 factors of −w ‖x_i − x_j‖², with x uniform in the unit cube and w uniform in 1 … 3."""
        points = torch.rand(self.seqlen, self.rank - 2, generator=generator, device=device)
        weight = 1 + 2 * torch.rand(self.num_heads, self.seqlen, generator=generator, device=device)
        return self._unbatched(SquaredDistance(self.num_heads)(points, weight=weight))

    def _unbatched(self, bias: FactoredBias) -> tuple[Tensor, Tensor]:
        """The factors with a leading 1 for every batch dimension."""
        lead = (1,) * len(self.batch)
        phi_q, phi_k = (phi.reshape(*lead, *phi.shape[-3:]).contiguous() for phi in (bias.phi_q, bias.phi_k))
        return phi_q, phi_k


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one case is computed from. Nothing here requires a gradient; providers make leaves of their own.

    `query, key, value, dout` are `[*batch, H, N, d]` and contiguous; `phi_q, phi_k` are
    `[*batch or 1, H or 1, N, R]`; `slopes` is `[H]` float32 for ALiBi, else None.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    phi_q: Tensor
    phi_k: Tensor
    slopes: Tensor | None = None

    def flat(self) -> Inputs:
        """The same values with one batch dimension, `[B, H, N, d]`, as other libraries take them (views)."""
        names = ("query", "key", "value", "dout", "phi_q", "phi_k")
        return replace(self, **{name: flatten(getattr(self, name)) for name in names})


def flatten(tensor: Tensor) -> Tensor:
    """`[*batch, H, N, d]` to `[B, H, N, d]`."""
    return tensor.reshape(-1, *tensor.shape[-3:])


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("full-128", (1,), 16, 8192, 128, 16, tags=("bias of its own for every sequence",)),
        Case("full-64", (1,), 16, 8192, 64, 16, tags=("bias of its own for every sequence",)),
        Case("full-32", (2,), 4, 8192, 32, 8, tags=("bias of its own for every sequence",)),
        Case("alibi-128-4k", (4,), 32, 4096, 128, 2, "alibi", True, True, ("7B language model, training",)),
        Case(
            "alibi-128-16k",
            (1,),
            32,
            16384,
            128,
            2,
            "alibi",
            True,
            True,
            ("7B language model, long context",),
        ),
        Case(
            "alibi-64-8k",
            (1,),
            25,
            8192,
            64,
            2,
            "alibi",
            True,
            True,
            ("GPT-2 1.5B, heads of one of two ranks",),
        ),
        Case("swin-576", (1024,), 4, 576, 32, 16, shared=True, tags=("SwinV2-B at 384 px, stage 1, batch 64",)),
        Case("swin-49", (4096,), 4, 49, 32, 16, shared=True, tags=("Swin at 224 px, stage 1, batch 64",)),
        Case("triangle-512", (1, 512), 4, 512, 32, 32, shared=True, tags=("AlphaFold 3 triangle attention",)),
        Case("triangle-1024", (1, 1024), 4, 1024, 32, 32, shared=True, tags=("AlphaFold 3 triangle attention",)),
        Case(
            "mesh-32k",
            (1,),
            8,
            32186,
            16,
            5,
            "distance",
            shared=True,
            tags=("PDE solver on a car's surface",),
        ),
    )
}


def case_names() -> list[str]:
    """Names of the frozen cases, in the order in which they run."""
    return list(CASES)


def find_cases(names: Iterable[str | Case], small: bool = False, known: Mapping[str, Case] = CASES) -> list[Case]:
    """Look cases up by name.

    Args:
        names: names of known cases, or cases, which pass through.
        small: take the small version of each.
        known: cases by name; default the frozen ones.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    found = []
    for name in names:
        if isinstance(name, str) and name not in known:
            raise ValueError(f"unknown case {name!r}; cases are {', '.join(known)}")
        found.append(known[name] if isinstance(name, str) else name)
    if not found:
        raise ValueError(f"no case given; cases are {', '.join(known)}")
    return [case.small() for case in found] if small else found
