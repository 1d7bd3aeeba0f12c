"""`LearnedTable`: factors that are trained in place of a learned table, and how they become a table again.

The factors are parameters of a `LowRankBias` that stands beside the table in the model, and the table is frozen. When
the model is taken back, each table moves by the step `t` that least squares finds between the bias of the factors and
what the table gives. Softmax does not see a constant of a row, and factors do not keep it, so rows are centred on both
sides:

    minimise |C (E - A t)|²    E = bias of the factors - bias of the table, A spreads a table over its places
    A' C A t = A' C E          C subtracts the mean of a row

Without C, A' A is how often each entry is read and `t` the mean over the places of an entry. With it that mean is
corrected for constants of rows; of all solutions the smallest is taken, which moves no entry without a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashbias.biases.base import wide_dtype
from flashbias.decompose.bound import certificate, row_spread
from flashbias.decompose.learned import LowRankBias
from flashbias.factored import FactoredBias
from flashbias.integrations.base import SETTINGS, Changes
from flashbias.integrations.factors import Source
from flashbias.integrations.report import WrittenTable

__all__ = ["LearnedTable", "learned_tables", "why_not_learned"]

SUFFIX = "_flashbias_factors"
"""Behind a table's name it is the name of the factors, which appears in `named_parameters` and `state_dict`."""

TABLES = ("attention_biases", "relative_position_bias_table")
"""Names of parameters that are tables; what is made of anything else comes from a network."""

NEGLIGIBLE = 1e-9
"""Eigenvalues below this share of the largest are those of tables that softmax does not see."""


class HasBias(Protocol):
    """What a table is read as."""

    @property
    def bias(self) -> FactoredBias:
        """The bias, as a table."""
        ...


Read = Callable[[], HasBias]
"""Reads the table of an attention as it is now."""


@dataclass
class LearnedTable:
    """Factors as parameters in place of a learned table.

    Args:
        start: the factors that training begins with.
        sources: what they were computed from; the first is the table that the trained factors are written to.
        read: reads the table of the attention.
        window: as in `TableFactors`.
    """

    start: FactoredBias
    sources: list[Source]
    read: Read
    window: tuple[int, int] | None = None

    def register(self, changes: Changes) -> None:
        """Put the factors beside the table, unless another attention with this table has, and freeze the table."""
        owner, leaf = self.sources[0].place()
        if owner._modules.get(leaf + SUFFIX) is None:
            table = getattr(owner, leaf)
            changes.add(owner, leaf + SUFFIX, self._fresh(table.device, wide_dtype(table)).train(owner.training))
            changes.hook(owner.register_load_state_dict_pre_hook(partial(_refuse_a_table_alone, leaf)))
        for source in self.sources:
            changes.freeze(*source.place())

    def factors(self) -> LowRankBias:
        """The module that holds the factors."""
        owner, leaf = self.sources[0].place()
        return getattr(owner, leaf + SUFFIX)

    def current(self, module: nn.Module, device: torch.device) -> FactoredBias:
        """Return the factors as they are now; arguments as of `TableFactors.current`."""
        return self.factors()()

    def check_shape(self, name: str) -> None:
        """Refuse to write to a table that is for other places now.

        Raises:
            RuntimeError: the table has another shape than when the model was patched.
        """
        found, expected = self.sources[0].tensor(), self.sources[0].values.shape
        if found is None or found.shape != expected:
            shape = None if found is None else tuple(found.shape)
            raise RuntimeError(
                f"{name!r} has the shape {shape}, and its factors were learned for {tuple(expected)}: "
                "set the model to the size that it had in patch(), then unpatch it"
            )

    def write(self, name: str, factors: LowRankBias) -> WrittenTable | None:
        """Write the factors to the table, by least squares up to constants of rows.

        Args:
            name: of the table, for the report.
            factors: as they are after training.

        Returns:
            What the table cannot express; None, and a table left to the bit, if nothing has changed since `patch`.
        """
        return None if self._is_untouched(factors) else self.fit(name, factors)

    def fit(self, name: str, factors: LowRankBias) -> WrittenTable:
        """As `write`, for factors of which nothing is known: the table moves to them in any case."""
        owner, leaf = self.sources[0].place()
        table = getattr(owner, leaf)
        with torch.inference_mode(False), torch.no_grad():
            wanted = factors().dense(torch.float64).to(table.device)
            step = _projected(wanted - self._exact(), _places(self.sources, self.read), table.numel())
            table.copy_(table.double() + step.view_as(table))
            # timm's LeViT and TinyViT keep what they have read in evaluation until they are trained again.
            owner.__dict__.get("attention_bias_cache", {}).clear()
            return _written(name, wanted - self._exact())

    def _exact(self) -> Tensor:
        return self.read().bias.dense(torch.float64)

    def _fresh(self, device: torch.device, dtype: torch.dtype) -> LowRankBias:
        return LowRankBias.from_bias(self.start).to(device, dtype)

    def _is_untouched(self, factors: LowRankBias) -> bool:
        """Tell whether both the factors and the tables hold what they held in `patch`."""
        fresh = self._fresh(factors.phi_q.device, factors.phi_q.dtype)
        pairs: list[tuple[Tensor, Tensor]] = [(factors.phi_q, fresh.phi_q), (factors.phi_k, fresh.phi_k)]
        for source in self.sources:
            tensor = source.tensor()
            if tensor is None:
                return False
            pairs.append((tensor, source.values.to(tensor)))
        return all(torch.equal(now, before) for now, before in pairs)


def _refuse_a_table_alone(leaf: str, owner: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Before a state_dict is loaded: a table would be loaded, and the factors that stand for it would stay.

    Without this, `strict=False` would ignore the table in silence. `others` ends with the messages of the errors.
    """
    table = prefix + leaf
    if table in state and f"{table}{SUFFIX}.phi_q" not in state:
        others[-1].append(
            f"{table!r} is trained as factors in this model, and the state_dict has the table alone, as an unpatched "
            "model saves it: unpatch(model), load, and patch it again."
        )


def learned_tables(model: nn.Module) -> dict[str, LearnedTable]:
    """Find the learned tables of a patched model, each once, by the names of their parameters."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, LearnedTable] = {}
    for module in model.modules():
        factors = getattr(module.__dict__.get(SETTINGS), "factors", None)
        if isinstance(factors, LearnedTable):
            owner, leaf = factors.sources[0].place()
            found.setdefault(f"{names[owner]}.{leaf}".lstrip("."), factors)
    return found


def why_not_learned(sources: list[Source], read: Read) -> str | None:
    """Say why trained factors could not be written back to this table, None if they can be.

    Args:
        sources: what it is made of.
        read: reads it.
    """
    if any(source.place()[1] not in TABLES for source in sources):
        return "made by a network, no learned table: stays, and trains through the network"
    places, drawn = _places(sources, read), torch.rand_like(sources[0].values, dtype=torch.float64)
    with _holding(sources, drawn):
        values = read().bias.dense(torch.float64)
    if bool(((places < 0) | (places >= drawn.numel())).any()) or not torch.equal(values, drawn.flatten()[places]):
        return "stretched by the model even for images of its own size, so the table stays, and trains"
    return None


# -------------------------------------------------------------------- from factors to a table


def _places(sources: list[Source], read: Read) -> Tensor:
    """Which entry of the first source each pair reads, `[H, N, M]`: its table is filled with numbers, and read."""
    values = sources[0].values
    numbers = torch.arange(values.numel(), dtype=torch.float64, device=values.device).view(values.shape)
    with _holding(sources, numbers):
        return read().bias.dense(torch.float64).long()


@contextmanager
def _holding(sources: list[Source], values: Tensor) -> Iterator[None]:
    """Put values in place of the first source and zeros in place of the others, and the parameters back."""
    places = [source.place() for source in sources]
    before = [owner._parameters[leaf] for owner, leaf in places]
    try:
        for number, (owner, leaf) in enumerate(places):
            tensor = before[number]
            assert tensor is not None, leaf
            held = values if number == 0 else torch.zeros_like(tensor, dtype=torch.float64)
            owner._parameters[leaf] = nn.Parameter(held.to(tensor.device), requires_grad=False)
        yield
    finally:
        for (owner, leaf), parameter in zip(places, before, strict=True):
            owner._parameters[leaf] = parameter


def _projected(error: Tensor, places: Tensor, size: int) -> Tensor:
    """The smallest step of a table that brings it closest to the factors, up to constants of rows.

    Args:
        error: bias of the factors minus that of the table, `[H, N, M]`.
        places: which entry each pair reads, `[H, N, M]`; no two heads share one.
        size: number of entries.

    Returns:
        `[size]`; 0 where nothing is read.
    """
    step = error.new_zeros(size)
    known, inverse = error.new_empty(0), error.new_empty(0)
    for head, read in zip(error - error.mean(-1, keepdim=True), places, strict=True):
        entries, local = read.unique(return_inverse=True)
        if not torch.equal(local, known):  # heads differ in their entries, hardly ever in how these are laid out
            known, inverse = local, _inverse(local, len(entries))
        sums = error.new_zeros(len(entries)).index_add(0, local.flatten(), head.flatten())
        step[entries] = inverse @ sums
    return step


def _inverse(local: Tensor, size: int) -> Tensor:
    """Pseudoinverse of `A' C A` for one head, `[size, size]`, from which entry each pair reads, `[N, M]`."""
    reads = torch.zeros(len(local), size, dtype=torch.float64, device=local.device)
    reads.scatter_add_(1, local, torch.ones_like(local, dtype=torch.float64))
    normal = reads.sum(0).diag() - reads.mT @ reads / local.shape[1]
    return torch.linalg.pinv(normal, rtol=NEGLIGIBLE, hermitian=True)


def _written(name: str, error: Tensor) -> WrittenTable:
    """Measure what is left, rounding to the table's dtype included."""
    centred = error - error.mean(-1, keepdim=True)
    return WrittenTable(name, float(centred.square().mean().sqrt()), float(certificate(row_spread(error)).max()))
