"""Which implementation does a call, and why not the others: `explain`, `implementations`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashbias.attention import hopper, reference, sdpa, triton
from flashbias.attention.call import Call
from flashbias.attention.checks import checked
from flashbias.attention.plan import Plan, plan_call
from flashbias.factored import FactoredBias

__all__ = ["IMPLEMENTATIONS", "KERNELS", "Explanation", "chosen", "explain", "implementations"]

logger = logging.getLogger("flashbias")

KERNELS = {"hopper": hopper, "triton": triton}
"""Implementations that not every machine can run, fastest first."""

IMPLEMENTATIONS = {**KERNELS, "sdpa": sdpa, "reference": reference}
"""The implementations, fastest first."""


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and why not the others.

    Args:
        impl: the implementation that runs.
        reasons: for each implementation None if it could run, else what stands against it.
        plan: predicted times of the bias's form, of a dense bias and of no bias; None where there is no bias, or
            nothing to predict from.
        no_plan: why there is a bias and no plan, else None.
    """

    impl: str
    reasons: dict[str, str | None]
    plan: Plan | None = None
    no_plan: str | None = None

    def __str__(self) -> str:
        """One line for each implementation, the chosen one marked; then the plan, or why there is none."""
        lines = []
        for name, reason in self.reasons.items():
            mark = "->" if name == self.impl else "  "
            lines.append(f"{mark} {name}: {reason or ('chosen' if name == self.impl else 'possible, slower')}")
        if self.plan is not None:
            lines.append(str(self.plan))
        if self.no_plan is not None:
            lines.append(self.no_plan)
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None = None,
    *,
    impl: str = "auto",
    return_lse: bool = False,
    **options: object,
) -> Explanation:
    """Say which implementation `attention` would take for these arguments, why not the others, and what it would cost.

    Where the call has a bias, its time is predicted and set beside that of a dense bias, and of none (`plan`).

    Args:
        query: as in `attention`.
        key: as in `attention`.
        value: as in `attention`.
        bias: a `FactoredBias`; of a `MixedBias`, ask for one of its `parts`.
        impl: "auto", or a name to ask about.
        return_lse: as in `attention`.
        **options: the other keywords of `attention`.

    Returns:
        An `Explanation`; print it.

    Raises:
        NotImplementedError: the named implementation cannot do the call.

    Examples:
        >>> import torch, flashbias as fb
        >>> q = torch.randn(1, 2, 16, 8)
        >>> print(fb.explain(q, q, q).impl)
        sdpa
    """
    defaults: dict[str, object] = {
        "attn_mask": None,
        "is_causal": False,
        "causal_alignment": None,
        "window": None,
        "scale": None,
        "enable_gqa": False,
        "dropout_p": 0.0,
        "deterministic": None,
    }
    unknown = set(options) - set(defaults)
    if unknown:
        raise TypeError(f"explain got unknown keywords {sorted(unknown)}; allowed are {sorted(defaults)}")
    call = checked(query, key, value, bias, return_lse=return_lse, **(defaults | options))  # type: ignore[arg-type]
    chosen = _choose(call, impl)
    plan, no_plan = plan_call(call)
    return replace(chosen, plan=plan, no_plan=no_plan)


def implementations() -> dict[str, str | None]:
    """List the implementations, fastest first, and what keeps each from running on this machine.

    Returns:
        A dict from name to None (it can run) or to the reason why it cannot.

    Examples:
        >>> import flashbias as fb
        >>> fb.implementations()["reference"] is None
        True
    """
    return {name: _unavailable(name) for name in IMPLEMENTATIONS}


def _unavailable(name: str, device: torch.device | None = None) -> str | None:
    return KERNELS[name].unavailable(device) if name in KERNELS else None


def _choose(call: Call, impl: str) -> Explanation:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {sorted(IMPLEMENTATIONS)}, got {impl!r}")
    reasons = {name: _obstacle(name, call) for name in IMPLEMENTATIONS}
    possible = [name for name, reason in reasons.items() if reason is None]
    if possible[:2] == ["hopper", "triton"] and hopper.is_slower(call):
        possible = possible[1:]
    if call.query.device.type == "cpu" and "sdpa" in possible:
        # Kernels run on CPU tensors only through Triton's interpreter, for tests.
        possible = ["sdpa", *(name for name in possible if name != "sdpa")]
    if impl == "auto":
        return Explanation(possible[0], reasons)
    if reasons[impl] is not None:
        raise NotImplementedError(
            f"impl={impl!r} cannot do this call: {reasons[impl]}; impl='auto' would take {possible[0]!r}"
        )
    return Explanation(impl, reasons)


def _obstacle(name: str, call: Call) -> str | None:
    return _unavailable(name, call.query.device) or IMPLEMENTATIONS[name].unsupported(call)


def chosen(call: Call, impl: str) -> str:
    """Name the implementation that does a call.

    As `_choose`, without asking those that cannot change the answer; it asks all where that is to be told.
    """
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        explanation = _choose(call, impl)
        logger.debug("attention %s takes %s\n%s", tuple(call.query.shape), explanation.impl, explanation)
        return explanation.impl
    if impl in IMPLEMENTATIONS and _obstacle(impl, call) is None:
        return impl
    if impl == "auto" and call.query.device.type != "cpu":
        first = next(name for name in IMPLEMENTATIONS if _obstacle(name, call) is None)
        is_overtaken = first == "hopper" and hopper.is_slower(call) and _obstacle("triton", call) is None
        return "triton" if is_overtaken else first
    return _choose(call, impl).impl
