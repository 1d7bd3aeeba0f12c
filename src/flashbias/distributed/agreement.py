"""Do all ranks mean the same call? Asked before anything else is sent.

Every rank sends one header of `HEADER` int64 numbers (under 1 KiB): shapes, dtypes, options, which gradients are
needed, how many tokens it holds, and whether its own checks passed. All compare the same headers, so all raise the same
error. On a GPU reading them waits for the device; a model that has been checked once may switch that off.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flashbias.attention.call import DTYPES, INPUTS, Call, inputs_of
from flashbias.distributed.errors import DisagreementError
from flashbias.distributed.exchange import naming
from flashbias.distributed.tiles import Mask
from flashbias.distributed.topology import STRATEGIES, Circle, Topology, finish
from flashbias.distributed.traffic import record

__all__ = ["HEADER", "Header", "agree", "refuse"]

MAX_DIMS = 8
"""Dimensions of a tensor that a header has room for."""

_SHAPE = 2 + MAX_DIMS
_FIELDS: dict[str, int] = {
    "passed its own checks": 1,
    "tokens": 1,
    "seqlen": 1,
    "documents": 1,
    **dict.fromkeys(INPUTS, _SHAPE),
    "which inputs need gradients": len(INPUTS),
    "window": 2,
    "scale": 1,
    "ranks per head": 1,
    "options": 4,
}
HEADER = sum(_FIELDS.values())
"""Numbers in a header."""


@dataclass(frozen=True)
class Header:
    """What a rank says of its call; one row of numbers, cut into named fields."""

    numbers: tuple[int, ...]

    @classmethod
    def of(
        cls, call: Call, mask: Mask, options: Sequence[int], needs_grad: Sequence[bool], seqlen: int | None = None
    ) -> Header:
        """Describe a checked call.

        Args:
            call: this rank's.
            mask: what is seen, documents included.
            options: four more numbers that must agree: strategy, order, shared gradients, whether deterministic.
            needs_grad: for query, key, value, phi_q, phi_k, table.
            seqlen: of the whole sequence, where it was given.

        Raises:
            TypeError: a tensor of a dtype that no message has.
            ValueError: a tensor of more than `MAX_DIMS` dimensions.
        """
        bias = call.bias
        shapes = [n for name, x in zip(INPUTS, inputs_of(call), strict=True) for n in _shape(name, x)]
        ranks = tuple(bias.ranks) if bias is not None and bias.ranks is not None else ()
        (scale,) = struct.unpack("<q", struct.pack("<d", float(call.scale)))
        window = [-1 if side is None else side for side in (mask.left, mask.right)]
        return cls(
            (
                1,
                call.seqlen_q,
                -1 if seqlen is None else seqlen,
                _digest(mask.documents),
                *shapes,
                *map(int, needs_grad),
                *window,
                scale,
                _digest(ranks),
                *options,
            )
        )

    @classmethod
    def refusal(cls) -> Header:
        """What a rank says whose own checks failed."""
        return cls((0,) * HEADER)

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Numbers by name."""
        result, start = {}, 0
        for name, width in _FIELDS.items():
            result[name] = self.numbers[start : start + width]
            start += width
        return result


def agree(topology: Topology, device: torch.device, describe: Callable[[], Header]) -> list[int]:
    """Exchange headers and compare them.

    Args:
        topology: who takes part.
        device: where messages live.
        describe: makes this rank's header; what it raises is raised here, after the others have been told.

    Returns:
        Tokens of each rank.

    Raises:
        DisagreementError: ranks do not fit together; it names the first that differs from rank 0, and in what.
        RankError: a rank did not answer.
    """
    try:
        own = describe()
    except Exception:
        refuse(topology, device)
        raise
    headers = _gathered(topology, device, own)
    _compare(headers)
    return [header.fields()["tokens"][0] for header in headers]


def refuse(topology: Topology, device: torch.device) -> None:
    """Tell the other ranks, which wait in `agree`, that this one refuses its own arguments.

    Args:
        topology: who takes part.
        device: where messages live.
    """
    _gathered(topology, device, Header.refusal())


def _gathered(topology: Topology, device: torch.device, own: Header) -> list[Header]:
    """The headers of all ranks, in the order of shards."""
    rows = torch.tensor([own.numbers], dtype=torch.int64, device=device)
    for circle in (topology.ulysses, topology.ring):
        if circle.size > 1:
            rows = _gather(circle, rows).flatten(0, 1)
    return [Header(tuple(row)) for row in rows.tolist()]


def _gather(circle: Circle, rows: Tensor) -> Tensor:
    """`[size, *rows.shape]`. Where a backend can tell which message is missing, every pair has one of its own."""
    record("agreement", (circle.size - 1) * rows.numel() * rows.element_size())
    everyone = tuple(peer for peer in range(circle.size) if peer != circle.rank)
    if dist.get_backend(circle.group) != "gloo":
        with naming(circle, everyone, "agreement"):
            return circle.gather(rows)
    result = torch.stack([rows] * circle.size)
    with naming(circle, everyone, "agreement"):
        received = {peer: dist.irecv(result[peer], group=circle.group, group_src=peer) for peer in everyone}
        sent = {peer: dist.isend(rows, group=circle.group, group_dst=peer) for peer in everyone}
    for works in (received, sent):
        for peer, work in works.items():
            with naming(circle, (peer,), "agreement"):
                finish(work)
    return result


def _compare(headers: Sequence[Header]) -> None:
    tables = [header.fields() for header in headers]
    refused = tuple(rank for rank, table in enumerate(tables) if not table["passed its own checks"][0])
    if refused:
        raise DisagreementError(
            f"rank {refused[0]} refused its own arguments (its error says why), so no rank can attend", ranks=refused
        )
    for name in _FIELDS:
        if name == "tokens":
            continue
        odd = tuple(rank for rank, table in enumerate(tables) if table[name] != tables[0][name])
        if odd:
            found, expected = (_spoken(name, tables[rank][name]) for rank in (odd[0], 0))
            raise DisagreementError(f"{name}: rank {odd[0]} has {found} where rank 0 has {expected}", ranks=odd)


def _shape(name: str, x: Tensor | None) -> tuple[int, ...]:
    """dtype, number of dimensions, sizes; the number of tokens is left open."""
    if x is None:
        return (-1,) * _SHAPE
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() > MAX_DIMS:
        raise ValueError(f"{name} must have at most {MAX_DIMS} dimensions, got shape {tuple(x.shape)}")
    sizes = list(x.shape)
    if name != "table":
        sizes[-2] = -1
    return (DTYPES.index(x.dtype), x.dim(), *sizes, *(0,) * (MAX_DIMS - x.dim()))


def _digest(numbers: Sequence[int] | None) -> int:
    """A number that differs where sequences do, for all practical purposes; the same in every process."""
    if numbers is None:
        return -1
    digest = len(numbers)
    for n in numbers:
        digest = (digest * 1_000_003 + n) % (2**61 - 1)
    return digest


def _spoken(name: str, numbers: tuple[int, ...]) -> str:
    """Numbers of a field in words."""
    if name in INPUTS:
        if numbers[1] < 0:
            return "none"
        sizes = ", ".join("tokens" if n < 0 else str(n) for n in numbers[2 : 2 + numbers[1]])
        return f"[{sizes}] in {DTYPES[numbers[0]]}"
    if name == "scale":
        return repr(struct.unpack("<d", struct.pack("<q", numbers[0]))[0])
    if name == "which inputs need gradients":
        return str([tensor for tensor, needs in zip(INPUTS, numbers, strict=True) if needs])
    if name == "seqlen":
        return "none" if numbers[0] < 0 else str(numbers[0])
    if name == "window":
        return str(tuple(None if n < 0 else n for n in numbers))
    if name == "options":
        return f"strategy {STRATEGIES[numbers[0]]!r} and (order, shared gradients, deterministic) {numbers[1:]}"
    return "others" if name in ("documents", "ranks per head") else str(numbers)
