"""`Report`: what was found out about a bias, head by head, and `NotLowRankError`, which carries one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["HeadReport", "NotLowRankError", "Report"]


class NotLowRankError(ValueError):
    """No representation keeps the tolerance at a cost below that of the dense bias.

    Args:
        message: what was asked for, and the best that can be had.
        report: the report of the attempt, as `compress` or `compress_function` would have attached it.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class HeadReport:
    """What was found out about one head.

    Args:
        head: its number; of a batch of biases, counted through.
        form: "low rank", "table", "table + low rank" or "dense".
        rank: columns of the factors; for a head that has no form, the largest rank that was tried.
        certificate: bound on the change of the output relative to the diameter of the values; of a head without a
            form, the best that was reached.
        cost_ms: predicted time of the form.
        dense_ms: predicted time of a dense kernel.
        extent: largest spread of a row of the bias: how far it can move one score against another.
        energy: share of the squared entries, rows centred, that is kept; a diagnostic, no promise.
        certificates: rank to certificate, for the ranks that were tried without a table.
    """

    head: int
    form: str
    rank: int
    certificate: float
    cost_ms: float
    dense_ms: float
    extent: float
    energy: float
    certificates: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `compress` found, and what it promises.

    Args:
        tol: bound that was asked for.
        shape: of the bias, `[*batch, H, N, M]`.
        heads: one entry per head.
        codes: what the table is read by, in words; "" without one.
        table_entries: length T of the table; 0 without one.
        factor_dtype: dtype of the factors.
        break_even_rank: largest rank at which factors are predicted to cost no more than the dense bias.
        device: whose measured times the predictions are made from.
        certified_for: "every query, key and value" or "probabilities like the calibration's".
        seconds: how long it took.
    """

    tol: float
    shape: tuple[int, ...]
    heads: tuple[HeadReport, ...]
    codes: str
    table_entries: int
    factor_dtype: str
    break_even_rank: int
    device: str
    certified_for: str
    seconds: float

    @property
    def certificate(self) -> float:
        """The worst head's."""
        return max((h.certificate for h in self.heads), default=0.0)

    @property
    def cost_ms(self) -> float:
        """Predicted time of all heads, in the forms chosen."""
        return sum(h.cost_ms for h in self.heads)

    @property
    def dense_ms(self) -> float:
        """Predicted time of all heads with a dense bias."""
        return sum(h.dense_ms for h in self.heads)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each head."""
        return tuple(h.rank for h in self.heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for a file."""
        plain = asdict(self)
        plain["shape"] = list(self.shape)
        plain["heads"] = [asdict(h) for h in self.heads]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Report:
        """Read back what `to_dict` wrote, also after a detour through JSON.

        Args:
            plain: the fields.

        Returns:
            A report equal to the one written.

        Raises:
            ValueError: a field is missing, unknown, or of another kind.
        """
        try:
            heads = tuple(
                HeadReport(**{**h, "certificates": {int(rank): value for rank, value in h["certificates"].items()}})
                for h in plain["heads"]
            )
            return cls(**{**plain, "shape": tuple(plain["shape"]), "heads": heads})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"these are not the fields of a report: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        """One line for all, one for each head."""
        forms = sorted({h.form for h in self.heads})
        table = f", table of {self.table_entries} entries read by {self.codes}" if self.table_entries else ""
        lines = [
            f"bias {'×'.join(map(str, self.shape))}, tol {self.tol:g}: {' and '.join(forms)}{table}",
            f"certificate {self.certificate:.2g} for {self.certified_for}; predicted {self.cost_ms:.3g} ms against "
            f"{self.dense_ms:.3g} dense ({self.device}; break-even rank {self.break_even_rank})",
            f"{'head':>5} {'form':<17} {'rank':>4} {'certificate':>11} {'energy':>8} {'extent':>7} {'cost/dense':>10}",
        ]
        for h in self.heads:
            ratio = h.cost_ms / h.dense_ms if h.dense_ms else float("nan")
            lines.append(
                f"{h.head:>5} {h.form:<17} {h.rank:>4} {h.certificate:>11.2g} "
                f"{h.energy:>8.4f} {h.extent:>7.3g} {ratio:>10.2f}"
            )
        return "\n".join(lines)
