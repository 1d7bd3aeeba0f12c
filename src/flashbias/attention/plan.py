"""`plan`: predicted times of the forms that a bias can have, before anything is factored.

The model and its coefficients are in `coefficients/`; here its predictions are compared: for a call (`plan`), for
one head (`HeadCosts`, by which a form is chosen head by head), and for what `explain` was asked (`plan_call`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from flashbias.attention import packing
from flashbias.attention.call import Call
from flashbias.attention.coefficients import FORMS, Coefficients, Device, NoCoefficientsError, smallest
from flashbias.attention.workload import TableSize, Training, Workload

__all__ = ["HeadCosts", "Plan", "Prediction", "plan", "plan_call", "predict_ms"]


def predict_ms(
    workload: Workload,
    form: str,
    *,
    ranks: int | Sequence[int] | None = None,
    table: TableSize | int | None = None,
    device: Device = None,
) -> float:
    """Predict the time of attention with its bias in one form.

    Formula: `c_launch + sum_h sum_f c_f * x_f(head h)`, for the provider of the form that it makes fastest.

    Args:
        workload: the attention.
        form: "factored", "table", "table+factored", "dense" or "bias-free".
        ranks: rank of the factors, one integer or one for each head; needed by the forms with factors.
        table: its size, needed by the forms with a table.
        device: as in `plan`.

    Returns:
        Milliseconds; infinite where no provider can hold the dense bias.

    Raises:
        ValueError: an unknown form; ranks or a table that the form needs are missing.
        NoCoefficientsError: nothing was measured from which it could be predicted.

    Examples:
        >>> w = Workload(num_heads=16, seqlen_q=8192, seqlen_k=8192, head_dim=64)
        >>> predict_ms(w, "factored", ranks=16, device="h200") < predict_ms(w, "dense", device="h200")
        True
    """
    return _predict(Coefficients.of(device), workload, form, _checked_ranks(ranks, workload), _checked_table(table)).ms


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one form, in milliseconds, and the provider that it is predicted for (None: out of reach)."""

    form: str
    provider: str | None
    ms: float


def _predict(
    coefficients: Coefficients,
    workload: Workload,
    form: str,
    ranks: tuple[int, ...] | None,
    table: TableSize | None,
) -> Prediction:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if "factored" in form and ranks is None:
        raise ValueError(f"form {form!r} needs ranks")
    if "table" in form and table is None:
        raise ValueError(f"form {form!r} needs a table")
    used_ranks = ranks if ranks is not None and "factored" in form else (0,) * workload.num_heads
    model, ms = coefficients.fastest(form, workload, used_ranks, table if "table" in form else None)
    return Prediction(form, None if model is None else model.provider, ms)


def _checked_ranks(ranks: int | Sequence[int] | None, workload: Workload) -> tuple[int, ...] | None:
    if ranks is None:
        return None
    given = (ranks,) if isinstance(ranks, int) else tuple(ranks)
    if len(given) not in (1, workload.num_heads):
        raise ValueError(f"ranks must be one integer or {workload.num_heads}, one for each head, got {len(given)}")
    for rank in given:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"ranks must be integers >= 0, got {rank!r}")
    return given * workload.num_heads if len(given) == 1 else given


def _checked_table(table: TableSize | int | None) -> TableSize | None:
    return TableSize(table) if isinstance(table, int) else table


@dataclass(frozen=True)
class Plan:
    """Predicted times of the forms that a bias can have; `print` it.

    Attributes:
        workload: what was asked for.
        device: name of the device.
        predictions: one for each form, in the order of `FORMS`.
        ranks: of the factors, one for each head, None if none were given.
        table: its size, None if none was given.
        break_even_rank: largest rank, the same in every head, at which factors take no longer than the dense
            bias; 0 if not even rank 1 does; None where nothing was measured to compare.
        provisional: whether a part of the coefficients rests on something else than the benchmarks.
    """

    workload: Workload
    device: str
    predictions: tuple[Prediction, ...]
    ranks: tuple[int, ...] | None
    table: TableSize | None
    break_even_rank: int | None
    provisional: bool

    @property
    def best(self) -> str:
        """The form of the bias with the smallest predicted time."""
        return min((p for p in self.predictions if p.form != "bias-free"), key=lambda p: p.ms).form

    def ms(self, form: str) -> float:
        """Predicted milliseconds of a form.

        Raises:
            KeyError: the form is not among the predictions.
        """
        return {p.form: p.ms for p in self.predictions}[form]

    def __str__(self) -> str:
        """A line for the workload, one for each form, and a sentence."""
        names = [self._name(p.form) for p in self.predictions]
        width = max(map(len, names))
        lines = [self._title()]
        for name, p in zip(names, self.predictions, strict=True):
            mark = "->" if p.form == self.best else "  "
            time = f"{p.ms:9.4g} ms" if math.isfinite(p.ms) else "out of reach"
            lines.append(f"{mark} {name:{width}} {time:>12}  {p.provider or ''}".rstrip())
        return "\n".join([*lines, self._sentence()])

    def _title(self) -> str:
        w = self.workload
        passes = {"none": "forward", "frozen": "forward and backward, bias frozen", "bias": "forward and backward"}
        parts = [f"{w.batch}×{w.num_heads}×{w.seqlen_q}×{w.seqlen_k}, head_dim {w.head_dim}"]
        parts += ["causal"] * w.is_causal + [str(w.dtype).removeprefix("torch."), passes[w.training]]
        return f"predicted for {', '.join(parts)}, on {self.device}{' (provisional)' if self.provisional else ''}:"

    def _name(self, form: str) -> str:
        parts = []
        if form.startswith("table") and self.table is not None:
            parts.append(f"{self.table.entries} entries")
        if form.endswith("factored") and self.ranks is not None:
            low, high = min(self.ranks), max(self.ranks)
            parts.append(f"rank {high}" if low == high else f"ranks {low}…{high}")
        if form == "dense":
            parts.append(f"{self.workload.matrix_bytes / 2**20:.4g} MiB")
        return f"{form} ({', '.join(parts)})" if parts else form

    def _sentence(self) -> str:
        times = {p.form: p.ms for p in self.predictions if p.form != "bias-free"}
        rivals = [form for form in times if (form == "dense") != (self.best == "dense")]
        rival = min(rivals, key=lambda form: times[form], default=None)
        sentence = f"{self.best.capitalize()} is best"
        if rival is not None and math.isfinite(times[rival]):
            sentence += f", {times[rival] / times[self.best]:.3g} times as fast as {rival}"
        if self.break_even_rank is None or not math.isfinite(times.get("dense", 0.0)):
            return f"{sentence}."
        if self.break_even_rank == 0:
            return f"{sentence}; no rank is as fast as a dense bias."
        return f"{sentence}; factors are no slower than a dense bias up to rank {self.break_even_rank} in every head."


def plan(
    workload: Workload,
    *,
    ranks: int | Sequence[int] | None = None,
    table: TableSize | int | None = None,
    device: Device = None,
    forms: Iterable[str] | None = None,
) -> Plan:
    """Compare the forms that a bias can have by their predicted time.

    Formula: as in `predict_ms`. Use it before a bias is factored, to see which rank would pay; it computes nothing but
    a few sums and takes milliseconds.

    Args:
        workload: the attention.
        ranks: rank of the factors, one integer or one for each head; None if factors are no choice.
        table: size of the relative table (an integer for its number of entries); None if it is no choice.
        device: name of a device with coefficients ("h200", "cpu"), a `torch.device`, or the path of a file that
            `flashbias bench --calibrate` wrote. Default: the current GPU, else the CPU.
        forms: which of `FORMS` to compare; default: all that `ranks` and `table` allow. With both, each is
            also compared alone: give `("table+factored", "dense")` where the bias needs the two together.

    Returns:
        The plan; its `best` names a form, its `str` is a table.

    Raises:
        ValueError: ranks or a table that do not fit the workload, an unknown form, or one that lacks them.
        NoCoefficientsError: the device, the dtype or the kind of training was not measured.

    Examples:
        >>> w = Workload(num_heads=16, seqlen_q=8192, seqlen_k=8192, head_dim=64)
        >>> p = plan(w, ranks=16, device="h200")
        >>> p.best
        'factored'
        >>> p.ms("factored") < p.ms("dense")
        True

    Reference:
        The trade between columns of factors and bytes of a matrix: "FlashBias: Fast Computation of Attention with
        Bias", https://arxiv.org/abs/2505.12044, section 3.
    """
    coefficients = Coefficients.of(device)
    checked_ranks, checked_table = _checked_ranks(ranks, workload), _checked_table(table)
    if forms is None:
        possible = {"factored": ranks, "table": table, "table+factored": None if table is None else ranks}
        forms = [form for form in FORMS if possible.get(form, True) is not None]
    forms = list(forms)
    if not set(forms) - {"bias-free"}:
        raise ValueError(f"forms must name a form that a bias can have, of {', '.join(FORMS[:-1])}; got {forms}")
    predictions = tuple(_predict(coefficients, workload, form, checked_ranks, checked_table) for form in forms)
    return Plan(
        workload,
        coefficients.device,
        predictions,
        checked_ranks,
        checked_table,
        _break_even_rank(coefficients, workload),
        coefficients.is_provisional,
    )


def _break_even_rank(coefficients: Coefficients, workload: Workload) -> int | None:
    """Largest rank at which factored <= dense; beyond the rank that has most products, time only grows."""

    def ms(form: str, rank: int) -> float:
        return _predict(coefficients, workload, form, (rank,) * workload.num_heads, None).ms

    try:
        dense = ms("dense", 0)
        ms("factored", 1)
    except NoCoefficientsError:
        return None
    largest = min(workload.seqlen_q, workload.seqlen_k)  # no bias has more
    low, high = min(packing.SIX_UP_TO_RANK + 1, largest), largest
    if ms("factored", low) > dense:
        return next((rank for rank in range(low - 1, 0, -1) if ms("factored", rank) <= dense), 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ms("factored", middle) <= dense else (low, middle - 1)
    return low


class HeadCosts:
    """What one head adds to the time of a call in each form, for choosing a form head by head.

    The launch, which all heads share, is left out. Of this library's implementations the fastest that can do the head
    counts, whatever the other heads need.

    Args:
        workload: the attention; its `num_heads` decides which dense provider is fastest.
        device: as in `plan`.

    Raises:
        NoCoefficientsError: the device, the dtype or the kind of training was not measured.

    Examples:
        >>> costs = HeadCosts(Workload(num_heads=16, seqlen_q=8192, seqlen_k=8192, head_dim=64), "h200")
        >>> costs.factored(4) <= costs.factored(64)
        True
    """

    def __init__(self, workload: Workload, device: Device = None) -> None:
        coefficients = Coefficients.of(device)
        heads = (0,) * workload.num_heads
        self.workload = workload
        self.device = coefficients.device
        self._ours = coefficients.candidates("factored", workload)
        self._dense = coefficients.fastest("dense", workload, heads, None)[0]

    def factored(self, rank: int) -> float:
        """Milliseconds of a head with factors of this rank (0: no bias at all)."""
        return self._own(rank, None)

    def table(self, entries: int, local: bool = True, half_width: int | None = None, rank: int = 0) -> float:
        """Milliseconds of a head with a relative table, and factors of a rank beside it; see `TableSize`."""
        return self._own(rank, TableSize(entries, local, half_width))

    def dense(self) -> float:
        """Milliseconds of a head whose bias is a dense matrix; infinite where no provider can hold it."""
        return math.inf if self._dense is None else self._dense.head_ms(self.workload)

    def _own(self, rank: int, table: TableSize | None) -> float:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"rank must be an integer >= 0, got {rank!r}")
        able = (model for model in self._ours if model.can_take(self.workload, (rank,), table))
        return smallest(able, lambda model: model.head_ms(self.workload, rank, table))[1]


# -------------------------------------------------------------------- for `explain`


def plan_call(call: Call) -> tuple[Plan | None, str | None]:
    """Plan a checked call.

    Args:
        call: the request.

    Returns:
        The plan and None, or None and what keeps one from being made (None again where there is no bias).
    """
    bias = call.bias
    if bias is None or call.is_empty:
        return None, None
    uncounted = {
        "a mask": call.attn_mask is not None,
        "a window": call.is_banded and not call.is_causal,
        "dropout": call.dropout_p > 0,
        "packed sequences": call.varlen is not None,
    }
    if found := [name for name, is_there in uncounted.items() if is_there]:
        return None, f"no predicted time: the planner does not count {' and '.join(found)}"
    table = None
    if bias.table is not None:
        local = all(bool((code.diff() == 1).all()) for code in bias.codes())
        table = TableSize(bias.table.shape[1], local)
    form = "+".join(["table"] * (table is not None) + ["factored"] * (bias.rank > 0))
    ranks = None if bias.rank == 0 else bias.ranks or bias.rank
    try:
        found_plan = plan(
            _workload_of(call), ranks=ranks, table=table, device=call.query.device, forms=(form, "dense", "bias-free")
        )
    except NoCoefficientsError as error:
        return None, f"no predicted time: {error}"
    return found_plan, None


def _workload_of(call: Call) -> Workload:
    bias = call.bias
    assert bias is not None
    tokens = (call.query, call.key, call.value)
    training: Training = "none"
    if call.needs_grad():
        training = "bias" if bias.requires_grad else "frozen"
    return Workload(
        num_heads=call.num_heads,
        seqlen_q=call.seqlen_q,
        seqlen_k=call.seqlen_k,
        head_dim=call.query.shape[-1],
        head_dim_v=call.value.shape[-1],
        batch=math.prod(torch.broadcast_shapes(*(x.shape[:-3] for x in tokens))),
        is_causal=call.is_causal,
        shared_bias=math.prod(bias.batch_shape),
        training=training,
        dtype=call.query.dtype,
        factor_dtype=torch.promote_types(bias.phi_q.dtype, bias.phi_k.dtype),
        causal_alignment="bottom_right" if call.bottom_right else "top_left",
    )
