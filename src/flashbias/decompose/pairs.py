"""Blocks of pairs on which a student is compared with its teacher, and what their errors add up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flashbias.factored import FactoredBias

__all__ = ["Opened", "Pairs", "RowErrors", "Teacher", "visible_error"]


class Teacher(Protocol):
    """What is to be learned: `teacher(sample, queries, keys)` gives the bias between some tokens of a sample.

    Indices come as `[n]` and `[m]` int64 tensors on the CPU, samples as the dataset gives them. The answer is
    `[*batch, H, n, m]`, on any device, finite; minus infinity marks a pair that attention never reads, and such pairs
    are left out of loss and report. It is called without gradients; put a module with dropout into eval mode first.
    """

    def __call__(self, sample: Any, queries: Tensor, keys: Tensor, /) -> Tensor:
        """Return the bias of the pairs."""
        ...


class Pairs:
    """How student and teacher are asked."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        inputs: Callable[[Any], Any] | None,
        mixed_precision: bool | None,
    ) -> None:
        first = next((p for p in student.parameters() if p.requires_grad and p.numel()), None)
        if first is None:
            raise ValueError("student has no parameter that requires a gradient: there is nothing to train")
        if any(p.dtype == torch.float16 for p in student.parameters() if p.requires_grad):
            raise TypeError("student has parameters in float16, which Adam's steps do not fit: train it in float32")
        self.student, self.teacher, self.device = student, teacher, first.device
        self.inputs = inputs or (lambda sample: sample)
        on_gpu = first.device.type == "cuda"
        if mixed_precision and not on_gpu:
            raise ValueError(f"mixed_precision=True needs the student on a GPU, it is on {first.device}")
        self.mixed_precision = on_gpu if mixed_precision is None else mixed_precision

    def open(self, sample: Any) -> Opened:
        """Call the student on a sample, or find out how to call it on a block of it."""
        args, kwargs = self._arguments(sample)
        student: Any = self.student
        if hasattr(student, "block") and hasattr(student, "lengths"):
            seqlen_q, seqlen_k = student.lengths(*args, **kwargs)
            return Opened(
                self, sample, seqlen_q, seqlen_k, lambda q, k: self._call(student.block, q, k, *args, **kwargs)
            )
        whole = self._call(student, *args, **kwargs)
        return Opened(self, sample, whole.seqlen_q, whole.seqlen_k, lambda q, k: _take(whole, q, k))

    def _arguments(self, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), self.inputs(sample))
        if isinstance(given, Mapping):
            return (), dict(given)
        if isinstance(given, Tensor):
            return (given,), {}
        if isinstance(given, tuple | list):
            return tuple(given), {}
        raise TypeError(f"inputs must give a tensor, a tuple or a mapping, got {type(given).__name__}")

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> FactoredBias:
        reduced = self.mixed_precision and self.student.training
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
            bias = function(*args, **kwargs)
        if not isinstance(bias, FactoredBias):
            raise TypeError(f"student must return a FactoredBias, got {type(bias).__name__}")
        return bias


@dataclass(frozen=True)
class Opened:
    """A sample that student and teacher can be compared on."""

    pairs: Pairs
    sample: Any
    seqlen_q: int
    seqlen_k: int
    ask_student: Callable[[Tensor, Tensor], FactoredBias]

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return error, teacher and what is read, `[*batch, H, n, m]`; the first two are 0 where nothing is read."""
        bias = self.ask_student(queries, keys)
        with torch.autocast(self.pairs.device.type, enabled=False):
            ours = bias.dense(torch.promote_types(bias.phi_q.dtype, torch.float32))
        theirs = self._ask_teacher(queries, keys, ours)
        read = theirs > -math.inf
        return (ours - theirs).masked_fill(~read, 0.0), theirs.masked_fill(~read, 0.0), read

    @torch.no_grad()
    def _ask_teacher(self, queries: Tensor, keys: Tensor, ours: Tensor) -> Tensor:
        theirs = self.pairs.teacher(self.sample, queries, keys)
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
            got = theirs.dtype if isinstance(theirs, Tensor) else type(theirs).__name__
            raise TypeError(f"teacher must return a floating point tensor, got {got}")
        if theirs.shape != ours.shape:
            raise ValueError(
                f"teacher must return [*batch, H, n, m] = {tuple(ours.shape)} as the student does for {len(queries)} "
                f"queries and {len(keys)} keys, got {tuple(theirs.shape)}"
            )
        theirs = theirs.to(ours)
        if not bool((theirs < math.inf).all()):
            bad = int((~(theirs < math.inf)).sum())
            raise ValueError(
                f"teacher returned {bad} values of {theirs.numel()} that are NaN or plus infinity; "
                "values must be finite, or minus infinity for a pair that is never read"
            )
        return theirs


def _take(bias: FactoredBias, queries: Tensor, keys: Tensor) -> FactoredBias:
    """Restrict a bias to some queries and keys."""
    queries, keys = queries.to(bias.device), keys.to(bias.device)
    code_q, code_k = bias.codes() if bias.table is not None else (None, None)
    return replace(
        bias,
        phi_q=bias.phi_q[..., queries, :],
        phi_k=bias.phi_k[..., keys, :],
        code_q=None if code_q is None else code_q[queries],
        code_k=None if code_k is None else code_k[keys],
    )


# ---------------------------------------------------------------- errors


def visible_error(error: Tensor, read: Tensor, gauge: bool) -> Tensor:
    """What softmax sees of errors that are 0 where nothing is read: without the mean of each row."""
    if not gauge:
        return error
    mean = error.sum(-1, keepdim=True) / read.sum(-1, keepdim=True).clamp(min=1)
    return (error - mean).masked_fill(~read, 0.0)


class RowErrors:
    """Errors of some rows, whose keys come block by block. Sums are in float64."""

    def __init__(self) -> None:
        self.high: list[Tensor] = []
        self.low: list[Tensor] = []
        self.sums: list[Tensor] = []

    def add(self, error: Tensor, target: Tensor, read: Tensor) -> None:
        """Take in a block, as `Opened.compare` gives it."""
        error, target = error.double(), target.double()
        self.high.append(error.masked_fill(~read, -math.inf).amax(-1))
        self.low.append(error.masked_fill(~read, math.inf).amin(-1))
        terms = (read.double(), error, error.square(), target, target.square())
        self.sums.append(torch.stack([term.sum(-1) for term in terms]))

    def spread(self) -> Tensor:
        """`max - min` over its keys, for each row that reads any."""
        high, low = torch.stack(self.high).amax(0), torch.stack(self.low).amin(0)
        return (high - low)[high >= low]

    def squares(self, gauge: bool) -> Tensor:
        """`[sum error^2, sum target^2, count]` over all rows, each row about its mean if `gauge`."""
        count, error, error2, target, target2 = torch.stack(self.sums).sum(0)
        if gauge:
            error2 = (error2 - error.square() / count.clamp(min=1)).clamp(min=0)
            target2 = (target2 - target.square() / count.clamp(min=1)).clamp(min=0)
        return torch.stack([error2.sum(), target2.sum(), count.sum()])
