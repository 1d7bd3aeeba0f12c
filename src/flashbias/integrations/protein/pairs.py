"""What families share whose bias is a linear map of the pairs: factors made in the forward pass, or the model's own.

Such a bias is another one for each protein and each layer, so there is nothing to factor beforehand. Once patched, an
attention makes its bias with the model's own layers and compresses it. Where no factors keep the tolerance at less than
the cost of a dense kernel, and where the bias needs a gradient, the model's own forward runs, with the arguments that
it was given: its result is then that of the unpatched model to the bit. `pair_bias_calls` says how often either
happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashbias.decompose.report import NotLowRankError, Report
from flashbias.factored import FactoredBias
from flashbias.integrations.base import SETTINGS, Changes, Family, Options, Plan, known_class
from flashbias.integrations.call import Settings, call, settings_of
from flashbias.integrations.protein.triangle import compressed
from flashbias.integrations.report import AttentionEntry

__all__ = ["PairCalls", "PairFamily", "TriangleFamily", "attend", "factors_for", "own_forward", "pair_bias_calls"]

NOTE = "the model's own code where no factors keep tol, or the bias needs a gradient"


@dataclass
class PairCalls:
    """How the calls of one patched attention went.

    Args:
        factored: calls with factors.
        dense: calls of the model's own code.
        rank: the largest rank of the factors so far.
        certificate: the largest bound on what they do to the output, as in `PatchReport`.
        reason: why the last dense call was one.
    """

    factored: int = 0
    dense: int = 0
    rank: int = 0
    certificate: float = 0.0
    reason: str = ""


@dataclass
class PairSettings(Settings):
    """`Settings` of an attention whose bias is compressed in the forward pass.

    Args:
        name: of the attention within the model that was patched.
        tol: as in `patch`.
        reuse: keep the last bias, and what was found for it: the steps of a diffusion read one bias many times.
        calls: what has happened so far.
    """

    name: str = field(kw_only=True)
    tol: float = field(kw_only=True)
    reuse: bool = field(default=False, kw_only=True)
    calls: PairCalls = field(default_factory=PairCalls, kw_only=True)
    # The bias and the visible keys of the last compression, its factors, and why there are none.
    last: tuple[Tensor, Tensor | None, FactoredBias | None, str] | None = field(default=None, kw_only=True, repr=False)


def pair_bias_calls(model: nn.Module) -> dict[str, PairCalls]:
    """Say how the calls of a patched model went: how many had factors, how many took the model's own code, and why.

    `patch` cannot know beforehand whether a bias of the pairs has factors: each protein has others. Use this after a
    forward pass.

    Args:
        model: a patched Boltz, OpenFold3 or Protenix, or a module that contains one.

    Returns:
        For each attention whose bias is compressed in the forward pass, under the name that it has in the report, its
        counts since `patch`.

    Raises:
        ValueError: the model has no such attention.
    """
    settings = [module.__dict__.get(SETTINGS) for module in model.modules()]
    found = {noted.name: noted.calls for noted in settings if isinstance(noted, PairSettings)}
    if not found:
        raise ValueError(f"model has no patched attention with a bias of its pairs, got {type(model).__name__}")
    return found


# -------------------------------------------------------------------- one call


@torch.compiler.disable()
def factors_for(
    module: nn.Module, bias: Tensor, keep: Tensor | None, batch: Sequence[int], head_dim: int, *, needs_grad: bool
) -> FactoredBias | None:
    """Factors of the bias of one call, None where the model's own code has to run.

    Args:
        module: the attention, patched.
        bias: `[*batch or 1, H, N, M]`.
        keep: booleans that broadcast to the scores, True where a key is seen.
        batch: the batch dimensions of the queries.
        head_dim: width of the queries.
        needs_grad: whether the inputs of the attention need gradients.

    Raises:
        ValueError: the bias is not finite where it is read.
    """
    settings: PairSettings = settings_of(module)
    if bias.requires_grad and torch.is_grad_enabled():
        return _counted(settings.calls, None, "the bias needs a gradient")
    # Lower precision would void the bound, and factors of inference mode could not be kept for other calls.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(bias.device.type, enabled=False):
        bias = bias.detach().to(torch.promote_types(bias.dtype, torch.float32))
        if _is_last(settings.last, bias, keep):
            assert settings.last is not None
            return _counted(settings.calls, *settings.last[2:])
        factors, reason = None, ""
        try:
            # A mask that hides nothing would ask for weighted fits, which are slower.
            hidden = None if keep is None or bool(keep.all()) else keep
            factors = compressed(bias, hidden, settings.tol, batch, head_dim, needs_grad=needs_grad)
        except NotLowRankError as refusal:
            reason = _why_not(refusal.report, settings.tol)
        if settings.reuse:
            settings.last = (bias.clone(), None if keep is None else keep.clone(), factors, reason)
        return _counted(settings.calls, factors, reason)


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: FactoredBias, keep: Tensor | None, head_dim: int
) -> Tensor:
    """Attend with factors: q, k, v `[*batch, H, N, D]`, not scaled, to `[*batch, N, H, D]`."""
    return call(module, q, k, v, bias, scale=1.0 / math.sqrt(head_dim), dropout_p=0.0, attn_mask=keep)


def own_forward(module: nn.Module, *args: Any, **options: Any) -> Any:
    """Run the model's own forward. `patch` has made sure that it is that of the class."""
    return type(module).forward(module, *args, **options)


def _counted(calls: PairCalls, factors: FactoredBias | None, reason: str) -> FactoredBias | None:
    if factors is None:
        calls.dense, calls.reason = calls.dense + 1, reason
        return None
    assert isinstance(factors.report, Report)
    calls.factored += 1
    calls.rank = max(calls.rank, *factors.report.ranks)
    calls.certificate = max(calls.certificate, factors.report.certificate)
    return factors


def _is_last(last: tuple[Any, ...] | None, bias: Tensor, keep: Tensor | None) -> bool:
    """Compare values: identities and versions are not to be had in inference mode."""
    return last is not None and _same(last[0], bias) and _same(last[1], keep)


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.device == y.device and x.dtype == y.dtype and torch.equal(x, y)


def _why_not(report: Report, tol: float) -> str:
    if report.break_even_rank < 1:
        return "not even one column costs less than the bias as it is"
    return f"no factors keep {tol:g} up to rank {report.break_even_rank}, where they stop paying"


# -------------------------------------------------------------------- families


class PairFamily(Family, register=False):
    """A family whose bias is compressed in the forward pass.

    Attributes:
        inner: name of the submodule that attends, "" for the attention itself.
        inner_classes: full names of the classes that it may have.
        hooked: name of the submodule whose forward is replaced.
        windows: full names of classes inside of which attention is over windows of atoms and stays as it is.
    """

    inner: ClassVar[str] = ""
    inner_classes: ClassVar[tuple[str, ...]] = ()
    hooked: ClassVar[str] = ""
    windows: ClassVar[tuple[str, ...]] = ()
    forward: ClassVar[Callable[..., Any]]

    def is_reused(self, attention: Any) -> bool:
        """Tell whether this attention sees the same bias in many calls."""
        return False

    def plan(self, name: str, attention: nn.Module, options: Options) -> Plan:
        """Compress its bias in the forward pass."""
        entry = AttentionEntry(name, self.name, "replaced", "factors per call", None, options.tol, NOTE)
        settings = PairSettings(options.impl, name=name, tol=options.tol, reuse=self.is_reused(attention))

        def apply(changes: Changes) -> None:
            module = attention.get_submodule(self.hooked)
            changes.set(module, SETTINGS, settings)
            changes.set(module, "forward", partial(self.forward, module))

        return Plan(entry, apply)

    def plan_within(self, model: nn.Module, name: str, attention: nn.Module, options: Options) -> Plan:
        """Leave windows of atoms: a few dozen queries and keys have nothing that factors could save."""
        parts = name.split(".")
        around = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts)))
        if any(known_class(module, self.windows) is not None for module in around):
            note = "windows of atoms, too small for factors"
            return Plan(AttentionEntry(name, self.name, "left", note=note))
        return self.plan(name, attention, options)

    def unsupported(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Refuse what attends if it is not the package's own."""
        if not self.inner:
            return None
        inner = attention.get_submodule(self.inner)
        known = known_class(inner, self.inner_classes)
        if known is None:
            return f"its {self.inner!r} is a {type(inner).__name__}, not one of {', '.join(self.inner_classes)}"
        if type(inner).forward is not known.forward:
            return f"its {self.inner!r} is a {type(inner).__name__}, which overrides the forward of {known.__name__}"
        if "forward" in inner.__dict__:
            return f"the forward of its {self.inner!r} was already replaced on the instance"
        return None


class TriangleFamily(PairFamily, register=False):
    """Triangle attention as OpenFold has written it, and the packages that descend from it."""

    inner = "mha"

    @staticmethod
    def forward(triangle: Any, x: Tensor, mask: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        """`TriangleAttention.forward` with factors; without a choice of chunks and kernels, which they do not need."""
        out = triangle_forward(triangle, triangle.linear, x, mask)
        return own_forward(triangle, x, mask, *args, **options) if out is None else out


def triangle_forward(
    triangle: Any, projection: nn.Module, x: Tensor, mask: Tensor | None, transpose_bias: bool = False
) -> Tensor | None:
    """Triangle attention over pairs `[*, I, J, C]`; None where the model's own code has to run.

    Args:
        triangle: the attention, patched: `layer_norm`, `starting` and `mha` are read.
        projection: the layer of it that makes the bias.
        x: `[*, I, J, C]`.
        mask: `[*, I, J]`, 1 where a pair is valid.
        transpose_bias: exchange queries and keys in the bias.
    """
    if not triangle.starting:
        x, mask = x.transpose(-2, -3), None if mask is None else mask.transpose(-1, -2)
    x, mha = triangle.layer_norm(x), triangle.mha
    bias = projection(x).movedim(-1, -3).unsqueeze(-4)
    bias = bias.mT if transpose_bias else bias
    keep = None if mask is None else (mask == 1)[..., None, None, :]
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    factors = factors_for(triangle, bias, keep, x.shape[:-2], mha.c_hidden, needs_grad=needs_grad)
    if factors is None:
        return None
    q, k, v = mha._prep_qkv(x, x, apply_scale=False)
    out = mha._wrap_up(attend(triangle, q, k, v, factors, keep, mha.c_hidden), x)
    return out if triangle.starting else out.transpose(-2, -3)
