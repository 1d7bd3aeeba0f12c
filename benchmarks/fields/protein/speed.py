"""Time and memory of triangle attention and of a Pairformer block, by what computes the attention."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from benchmarks.fields.protein.block import Pairformer
from benchmarks.fields.protein.model import Attend, Form, materialised, rounded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashbias as fb
from flashbias.bench.measure import Measurement, measure
from flashbias.integrations.protein import triangle_attention

__all__ = ["SMALL_SHAPES", "Prepared", "Provider", "Shapes", "Timing", "providers", "timings"]

Scope = Literal["triangle", "attentions", "block"]

TOLERANCE = 0.05
"""Relative difference from materialised scores in bfloat16 beyond which a time is not taken."""


@dataclass(frozen=True)
class Shapes:
    """AlphaFold 3's widths; tokens with the passes that are timed at each number of them."""

    channels: int = 128
    single: int = 384
    heads: int = 4
    single_heads: int = 16
    rank: int = 32
    tokens: tuple[tuple[int, tuple[str, ...]], ...] = ((512, ("forward", "forward+backward")), (1218, ("forward",)))


SMALL_SHAPES = Shapes(16, 24, 2, 2, 4, ((24, ("forward", "forward+backward")),))


@dataclass(frozen=True)
class Provider:
    """One way to compute attention.

    Args:
        name: of the row.
        form: of the bias.
        triangle: attention along rows; not read where the bias comes as factors.
        tokens: attention of single tokens; likewise.
        gradient: whether the bias may take a gradient.
        reach: of a table beside the factors of the triangle attentions; 0 for none.
        sketch: factors are sketched from the pairs, of this multiple of the rank; 0 for those of networks.
        factor_dtype: to which factors are rounded.
    """

    name: str
    form: Form
    triangle: Attend
    tokens: Attend
    gradient: bool = True
    reach: int = 0
    sketch: int = 0
    factor_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Timing:
    """What one provider took; `difference` is that of its result from the same sum with materialised scores."""

    scope: Scope
    provider: str
    tokens: int
    direction: str
    status: str
    measurement: Measurement | None = None
    difference: float | None = None


# -------------------------------------------------------------------- providers


def providers(device: torch.device) -> list[Provider]:
    """Those that this machine has, in the order in which they run."""
    found = [
        Provider("factors", "factors", materialised, materialised),
        Provider("factors, bfloat16", "factors", materialised, materialised, factor_dtype=torch.bfloat16),
        Provider("table + factors", "factors", materialised, materialised, reach=32),
        Provider("sketched factors", "factors", materialised, materialised, sketch=1),
        Provider("sketched factors, twice the rank", "factors", materialised, materialised, sketch=2),
        Provider("open code", "matrix", materialised, materialised),
        Provider("no bias (flashbias)", "none", _ours_without, _ours_without),
        Provider("no bias (SDPA)", "none", _sdpa, _sdpa),
    ]
    if device.type != "cuda":
        return [*found, Provider("SDPA", "matrix", _sdpa, _sdpa)]
    efficient = functools.partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION)
    cudnn = functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)
    found += [
        Provider("SDPA efficient", "matrix", efficient, efficient),
        Provider("SDPA cuDNN", "matrix", cudnn, efficient, gradient=False),
        Provider("FlexAttention", "matrix", _flex, efficient),
    ]
    if importlib.util.find_spec("cuequivariance_torch"):
        found.append(Provider("cuEquivariance", "matrix", _cuequivariance, efficient))
    return found


def _ours_without(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    out = fb.attention(q, k, v)
    assert isinstance(out, Tensor)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: SDPBackend | None = None) -> Tensor:
    """On `[B · rows, H, N, D]`; a bias of one batch is shared by all rows without a copy."""
    lead = q.shape[:-3]
    flat = (x.flatten(0, -4) for x in (q, k, v))
    # A kernel that is asked for by name takes rows of unit stride only.
    mask = None if bias is None else bias.flatten(0, -4).contiguous()
    if backend is None:
        return F.scaled_dot_product_attention(*flat, attn_mask=mask).unflatten(0, lead)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*flat, attn_mask=mask).unflatten(0, lead)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor) -> Tensor:
        def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + matrix[h, i, j]

        out = flex_attention(q, k, v, score_mod=add)
        assert isinstance(out, Tensor)
        return out

    return torch.compile(run, dynamic=False, fullgraph=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None and bias.shape[:2] == (1, 1)
    return _compiled_flex()(*(x[0].contiguous() for x in (q, k, v)), bias[0, 0].contiguous())[None]


def _cuequivariance(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    kernel = importlib.import_module("cuequivariance_torch").triangle_attention
    return kernel(*(x.contiguous() for x in (q, k, v)), bias.float(), scale=q.shape[-1] ** -0.5)


# -------------------------------------------------------------------- what is timed


@dataclass(frozen=True)
class Prepared:
    """All that a call needs.

    Args:
        forward: the outputs.
        expected: the same with materialised scores.
        shared: leaves that both have; gradients to them are compared too.
        own: leaves besides, such as factors or parameters.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    expected: Callable[[], tuple[Tensor, ...]]
    shared: tuple[Tensor, ...]
    own: tuple[Tensor, ...] = ()

    def run(self, grads: bool) -> tuple[Tensor | None, ...]:
        """The region that is timed."""
        return _pass(self.forward, (*self.shared, *self.own), grads)

    def difference(self, grads: bool) -> float:
        """The largest relative difference, by the root of the sum of squares, of outputs and shared gradients."""
        expected = _pass(self.expected, self.shared, grads)
        return max(_relative(a, b) for a, b in zip(self.run(grads), expected, strict=False) if a is not None)


def _pass(
    forward: Callable[[], tuple[Tensor, ...]], leaves: tuple[Tensor, ...], grads: bool
) -> tuple[Tensor | None, ...]:
    if not grads:
        with torch.no_grad():
            return forward()
    outs = forward()
    # The inputs serve as gradients of the outputs: they are as large, and random.
    found = torch.autograd.grad(outs, leaves, tuple(x.detach() for x in leaves[: len(outs)]), allow_unused=True)
    return *(out.detach() for out in outs), *found


def _relative(a: Tensor, b: Tensor | None) -> float:
    assert b is not None
    return float((a.float() - b.float()).norm() / b.float().norm())


def timings(shapes: Shapes, device: torch.device, seed: int = 0, budget_s: float = 0.12) -> Iterator[Timing]:
    """All of them, the largest first: triangle attention, the three attentions of a block, the block."""
    for tokens, directions in reversed(shapes.tokens):
        for scope in ("triangle", "attentions", "block"):
            for direction in directions:
                for provider in providers(device):
                    if scope == "triangle" and provider.sketch:
                        continue  # it does not matter to attention alone where factors come from
                    torch.manual_seed(seed)
                    yield _timing(shapes, tokens, scope, direction, provider, device, budget_s)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()


def _timing(
    shapes: Shapes, tokens: int, scope: Scope, direction: str, provider: Provider, device: torch.device, budget_s: float
) -> Timing:
    grads = direction == "forward+backward"
    if grads and not provider.gradient:
        return Timing(scope, provider.name, tokens, direction, "unsupported: no gradient to the bias")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        if scope == "triangle":
            prepared = _triangle(shapes, tokens, provider, device, dtype, grads)
        else:
            prepared = _block(shapes, tokens, provider, device, dtype, scope == "block", grads)
        difference = prepared.difference(grads)
        if not difference < TOLERANCE:
            return Timing(scope, provider.name, tokens, direction, f"wrong: off by {difference:.2g}")
        taken = measure(lambda: prepared.run(grads), device, budget_s=budget_s, min_repetitions=5)
        return Timing(scope, provider.name, tokens, direction, "ok", taken, difference)
    except torch.cuda.OutOfMemoryError:
        return Timing(scope, provider.name, tokens, direction, "out of memory")
    except Exception as error:  # one provider must not take the others with it
        text = " ".join(str(error).split())[:200]
        return Timing(scope, provider.name, tokens, direction, f"error: {type(error).__name__}: {text}")


def _triangle(
    shapes: Shapes, tokens: int, provider: Provider, device: torch.device, dtype: torch.dtype, grads: bool
) -> Prepared:
    """Attention along the rows alone: queries, keys, values and the bias are there."""
    size = (1, tokens, shapes.heads, tokens, shapes.channels // shapes.heads)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    phi_q, phi_k = (
        torch.randn(1, 1, shapes.heads, tokens, shapes.rank, device=device) * shapes.rank**-0.25 for _ in range(2)
    )
    matrix = (phi_q @ phi_k.mT).to(dtype)
    table = 0.1 * torch.randn(shapes.heads, 2 * provider.reach + 1, device=device) if provider.reach else None
    if table is not None:
        matrix = fb.FactoredBias(phi_q, phi_k, table=table).dense().to(dtype)
    factors = (phi_q, phi_k) if table is None else (phi_q, phi_k, table)
    own = {"factors": factors, "matrix": (matrix,), "product": (matrix,), "none": ()}[provider.form]
    for leaf in (q, k, v, *own):
        leaf.requires_grad_(grads)
    bias = None if provider.form == "none" else matrix

    def forward() -> tuple[Tensor, ...]:
        if provider.form == "factors":
            factored = rounded(fb.FactoredBias(phi_q, phi_k, table=table), provider.factor_dtype)
            out = triangle_attention(q, k, v, factored)
            assert isinstance(out, Tensor)
            return (out,)
        return (provider.triangle(q, k, v, bias),)

    return Prepared(forward, lambda: (materialised(q, k, v, bias),), (q, k, v), own)


def _block(
    shapes: Shapes, tokens: int, provider: Provider, device: torch.device, dtype: torch.dtype, whole: bool, grads: bool
) -> Prepared:
    """A block with random weights, all of which learn."""
    s = torch.randn(1, tokens, shapes.single, device=device, dtype=dtype).requires_grad_(grads)
    z = torch.randn(1, tokens, tokens, shapes.channels, device=device, dtype=dtype).requires_grad_(grads)
    with torch.device(device):
        block = Pairformer(
            shapes.channels, shapes.single, shapes.heads, shapes.single_heads, shapes.rank, whole, provider.reach
        ).half(dtype)
    sketch = shapes.rank * provider.sketch
    same: Form = "product" if provider.form == "factors" else provider.form
    return Prepared(
        lambda: block.use(provider.form, provider.triangle, provider.tokens, sketch, provider.factor_dtype)(s, z),
        lambda: block.use(same, materialised, materialised, sketch)(s, z),
        (s, z),
        tuple(block.parameters()),
    )
