"""`PatchReport`: what was done, or would be done, to every attention of a model that is known to carry a bias.

`UnpatchReport`: what was written to its tables when that was taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["AttentionEntry", "PatchReport", "UnpatchReport", "WrittenTable"]


@dataclass(frozen=True)
class AttentionEntry:
    """One attention of a model.

    Args:
        name: its module's name within the model.
        family: the family that it belongs to.
        status: "replaced"; "left", for one that stays as it was; "unsupported", for one that keeps `patch` from
            touching the model at all.
        form: what its bias became, in words; empty unless replaced.
        rank: columns of its factors; None unless replaced. An exact table has rank 0.
        certificate: bound on how far the output may move, relative to the diameter of the values that a query
            sees. 0.0 for exact forms; None unless replaced.
        note: why it was left or is unsupported, or anything else worth knowing.
    """

    name: str
    family: str
    status: Literal["replaced", "left", "unsupported"]
    form: str = ""
    rank: int | None = None
    certificate: float | None = None
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, or what `supports` expects of it. Print it, or walk over its entries.

    Args:
        model: name of the model's class.
        entries: one for each attention of a known family, in the order of the model's modules.

    Examples:
        >>> from flashbias.integrations import AttentionEntry, PatchReport
        >>> entry = AttentionEntry("block.0", "T5", "replaced", "exact table", 0, 0.0)
        >>> print(PatchReport("T5EncoderModel", (entry,)))
        T5EncoderModel: 1 attention replaced, 0 left, 0 unsupported
        attention  family  status    form         rank  certificate  note
        block.0    T5      replaced  exact table     0        exact
    """

    model: str
    entries: tuple[AttentionEntry, ...]

    def __iter__(self) -> Iterator[AttentionEntry]:
        """Walk over the entries."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of attentions of a known family."""
        return len(self.entries)

    @property
    def replaced(self) -> tuple[AttentionEntry, ...]:
        """The attentions that are factored now."""
        return self._having("replaced")

    @property
    def left(self) -> tuple[AttentionEntry, ...]:
        """The attentions that stay as they were; each says why in its note."""
        return self._having("left")

    @property
    def unsupported(self) -> tuple[AttentionEntry, ...]:
        """The attentions whose configuration is not supported; each says why in its note."""
        return self._having("unsupported")

    @property
    def certificate(self) -> float:
        """The largest certificate of all replaced attentions; 0.0 if every form is exact."""
        return max((entry.certificate or 0.0 for entry in self.replaced), default=0.0)

    def __str__(self) -> str:
        """One line for the model and one for each attention."""
        count = len(self.replaced)
        head = (
            f"{self.model}: {count} attention{'' if count == 1 else 's'} replaced, "
            f"{len(self.left)} left, {len(self.unsupported)} unsupported"
        )
        if not self.entries:
            return head
        rows = [("attention", "family", "status", "form", "rank", "certificate", "note"), *map(_cells, self.entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        justify = (str.ljust, str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
        lines = ("  ".join(j(c, w) for j, c, w in zip(justify, row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([head, *lines])

    def _having(self, status: str) -> tuple[AttentionEntry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)


@dataclass(frozen=True)
class WrittenTable:
    """A table that trained factors were written to, and what it cannot express of them.

    The residual is the bias of the factors minus that of the table, as the table is afterwards, rounding included.

    Args:
        name: of the table's parameter within the model.
        residual: root mean square of the residual, in units of the scores. Constants of rows, which softmax does not
            see, are taken off.
        certificate: bound on how far the residual moves the output of the attention, relative to the diameter of the
            values that a query sees.
    """

    name: str
    residual: float
    certificate: float


@dataclass(frozen=True)
class UnpatchReport:
    """What `unpatch` wrote to the tables of a model. Print it, or walk over its entries.

    Args:
        model: name of the model's class.
        entries: one for each table that trained factors were written to; none where nothing was trained as factors.

    Examples:
        >>> from flashbias.integrations import UnpatchReport, WrittenTable
        >>> print(UnpatchReport("SwinModel", (WrittenTable("block.0.table", 0.0123, 0.004),)))
        SwinModel: 1 table written
        table          residual  certificate
        block.0.table   1.2e-02      4.0e-03
    """

    model: str
    entries: tuple[WrittenTable, ...] = ()

    def __iter__(self) -> Iterator[WrittenTable]:
        """Walk over the entries."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of tables that were written."""
        return len(self.entries)

    @property
    def certificate(self) -> float:
        """The largest certificate of all tables; 0.0 if none was written."""
        return max((entry.certificate for entry in self.entries), default=0.0)

    def __str__(self) -> str:
        """One line for the model and one for each table."""
        head = f"{self.model}: {len(self)} table{'' if len(self) == 1 else 's'} written"
        if not self.entries:
            return head
        width = max(len("table"), *(len(entry.name) for entry in self.entries))
        lines = [f"{entry.name:{width}}  {entry.residual:8.1e}  {entry.certificate:11.1e}" for entry in self.entries]
        return "\n".join([head, f"{'table':{width}}  residual  certificate", *lines])


def _cells(entry: AttentionEntry) -> tuple[str, ...]:
    rank = "" if entry.rank is None else str(entry.rank)
    return entry.name, entry.family, entry.status, entry.form, rank, _bound(entry.certificate), entry.note


def _bound(certificate: float | None) -> str:
    if certificate is None:
        return ""
    return "exact" if certificate == 0.0 else f"{certificate:.1e}"
