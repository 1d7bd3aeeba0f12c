"""torch.library operators of the kernels: schemas, fakes, autograd. Imports no kernel.

One forward and one backward operator serve every kernel implementation; `impl` names the package whose
`forward` and `backward` modules do the work when the operator is called on real tensors.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.call import Call
from flashbias.attention.layout import storable
from flashbias.attention.packing import Handed
from flashbias.factored import FactoredBias

__all__ = ["operands", "run"]

TENSORS = 12
"""How many of the arguments that the operators share are tensors; they come first."""

ARGUMENTS = 21
"""How many arguments they share."""

RANKS = 14
"""Place of `ranks` among them."""

UNBOUNDED = -1
"""What stands for an open side of a window in the operators' schema."""

FARTHEST = 2**30
"""Positions from which on a side of a window is open: no sequence is as long, and kernels add it in 32 bits."""


# `torch.compiler.disable` would load Dynamo together with this module; what launches kernels is not for it to trace.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    table: Tensor | None,
    code_q: Tensor | None,
    code_k: Tensor | None,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    ranks: Sequence[int],
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    dropout_p: float,
    impl: str,
    hand_over: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp of centred scores (see `packing.row_constant`), and packed factors for the backward pass."""
    out = _output_like(query, value)
    lse = _lse_like(query)
    packed = _packed_like(query, phi_q, phi_k, hand_over)
    with _device_of(query):
        _module(impl, "forward").launch(
            out, lse, query, key, value, phi_q, phi_k, table, code_q, code_k, attn_mask, cu_seqlens_q, cu_seqlens_k,
            dropout_seed, max_seqlen_q, max_seqlen_k, ranks, scale, window_left, window_right, bottom_right, dropout_p,
            Handed(packed, is_filled=False) if hand_over else None,
        )  # fmt: skip
    return out, lse, packed


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # The dispatcher leaves out arguments that are their defaults.
    return _output_like(query, value), _lse_like(query), _packed_like(query, phi_q, phi_k, rest[-1] is True)


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    needs_grad: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    table: Tensor | None,
    code_q: Tensor | None,
    code_k: Tensor | None,
    attn_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    ranks: Sequence[int],
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    dropout_p: float,
    impl: str,
    packed: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of query, key, value, phi_q, phi_k, table; an empty tensor for each that is not needed.

    `packed` is what the forward pass has handed over, None where there is nothing. Without `out` gradients of scores
    are measured from `-dlse` alone: then the keys may be a part of those that `lse` is of.
    """
    grads = _gradients_like((query, key, value, phi_q, phi_k, table), needs_grad)
    with _device_of(query):
        _module(impl, "backward").launch(
            grads, dout, dlse, out, lse, tuple(needs_grad), query, key, value, phi_q, phi_k, table, code_q, code_k,
            attn_mask, cu_seqlens_q, cu_seqlens_k, dropout_seed, max_seqlen_q, max_seqlen_k, ranks, scale, window_left,
            window_right, bottom_right, dropout_p, None if packed is None else Handed(packed, is_filled=True),
        )  # fmt: skip
    return grads


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    needs_grad: Sequence[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    table: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    return _gradients_like((query, key, value, phi_q, phi_k, table), needs_grad)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU where x lies the current one: Triton launches on that, wherever the arguments lie."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


@functools.cache
def _module(impl: str, which: str) -> ModuleType:
    return importlib.import_module(f"flashbias.attention.{impl}.{which}")


def _like(x: Tensor) -> Tensor:
    """Uninitialised, in the memory order of x where kernels can write it (rows of unit stride)."""
    return torch.empty_like(x) if x.dim() <= 4 and x.stride(-1) == 1 else x.new_empty(x.shape)


def _output_like(query: Tensor, value: Tensor) -> Tensor:
    """Uninitialised output; in the queries' memory order where head dimensions agree."""
    if query.shape[-1] == value.shape[-1]:
        return _like(query)
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _lse_like(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:-1], dtype=torch.float32)


def _packed_like(query: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, hand_over: bool) -> Tensor:
    """Room for packed factors, uninitialised; empty where none are handed over."""
    if not hand_over or phi_q is None or phi_k is None:
        return query.new_empty(0)
    form = packing.form_of(int(phi_q.shape[-1]), query.dtype)
    return query.new_empty(_rows(phi_q, phi_k) * form.width, dtype=form.dtype)


def _rows(phi_q: Tensor, phi_k: Tensor) -> int:
    """Rows of both factors, all groups together."""
    return math.prod(phi_q.shape[:-1]) + math.prod(phi_k.shape[:-1])


def _gradients_like(inputs: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    anchor = next(x for x in inputs if x is not None)
    return [
        (_like(x) if n < 3 else x.new_empty(x.shape)) if need and x is not None else anchor.new_empty(0)
        for n, (x, need) in enumerate(zip(inputs, needs_grad, strict=True))
    ]


# -------------------------------------------------------------------- autograd


class _Differentiable(torch.autograd.Function):
    """The forward operator with a gradient: calls below autograd, in place of the dispatcher's own bookkeeping."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, ctx.options = inputs[:TENSORS], inputs[TENSORS:ARGUMENTS]
        ctx.hands_over, ctx.count = _hands_over(inputs[0], *inputs[3:5]), len(inputs)
        arguments = (*inputs[:ARGUMENTS], ctx.hands_over)
        out, lse, packed = _below_autograd(attention_forward, _forward, keyset, arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(packed)
        # The factors are saved even where their packed form is: autograd tells whether they have been modified.
        ctx.save_for_backward(*tensors, out, lse, packed)
        return out, lse, packed

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, out, lse, packed = ctx.saved_tensors
        needs_grad = list(ctx.needs_input_grad[1:7])
        if dout is None:
            dout = torch.zeros_like(out)
        handed = packed if ctx.hands_over else None
        grads = attention_backward(dout, dlse, out, lse, needs_grad, *tensors, *ctx.options, handed)
        wanted = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
        return (None, *wanted, *(None for _ in range(ctx.count - len(wanted))))


def _hands_over(query: Tensor, phi_q: Tensor | None, phi_k: Tensor | None) -> bool:
    """Whether the forward pass leaves its packed factors to the backward pass: where they are no larger than q.

    Only those that all kernels read in one form; the others are packed by each pass for itself.
    """
    if phi_q is None or phi_k is None or not packing.is_packed(phi_q, phi_k, query.dtype):
        return False
    form = packing.form_of(int(phi_q.shape[-1]), query.dtype)
    if form.width > packing.WIDEST_CHUNK:
        return False
    is_small = _rows(phi_q, phi_k) * form.width * form.dtype.itemsize <= query.numel() * query.element_size()
    if isinstance(is_small, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        # Compiled with sizes that only data will tell, nothing is known to be small.
        return guard_or_false(is_small)
    return is_small


class _OnceDifferentiable(torch.autograd.Function):
    """The backward operator, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_below_autograd(attention_backward, _backward, keyset, inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(
            "the kernels have no second derivative (double backward); use attention(..., impl='reference')"
        )


_DEVICES = (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.CPU)


def _below_autograd(operator: Any, kernels: Callable[..., Any], keyset: Any, inputs: tuple[Any, ...]) -> Any:
    """What stands below autograd: a mode or a subclass of tensors if there is one, else the kernels."""
    keyset = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        # The dispatcher would end in the same function, after it had taken all arguments apart once more.
        if keyset.highestPriorityTypeId() in _DEVICES:
            return kernels(*inputs)
        return operator.redispatch(keyset, *inputs)


def _autograd_forward(keyset: Any, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _Differentiable.apply(keyset, *inputs)
    return _below_autograd(attention_forward, _forward, keyset, inputs)


def _autograd_backward(keyset: Any, *inputs: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return list(_OnceDifferentiable.apply(keyset, *inputs))
    return _below_autograd(attention_backward, _backward, keyset, inputs)


# -------------------------------------------------------------------- the operators


def _operator(name: str, run: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any]) -> Any:
    """Define `flashbias::name` by its parts.

    `torch.library.custom_op` does the same, and more for each call: it compares the storage of outputs with that of
    inputs and completes default arguments, which takes the host longer than all of a forward pass.
    """
    _LIBRARY.define(name + torch.library.infer_schema(inspect.unwrap(run), mutates_args=()))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashbias::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return getattr(torch.ops.flashbias, name).default


_LIBRARY = torch.library.Library("flashbias", "FRAGMENT")

attention_forward = _operator("attention_forward", _forward, _fake_forward, _autograd_forward)
attention_backward = _operator("attention_backward", _backward, _fake_backward, _autograd_backward)


# -------------------------------------------------------------------- from a call to the operator


def run(call: Call, impl: str) -> tuple[Tensor, Tensor | None]:
    """Hand a checked call to the operators.

    Args:
        call: the request.
        impl: package under `flashbias.attention` that holds the kernels.

    Returns:
        Output, and the log-sum-exp if asked for, with what centring took from it put back.
    """
    bias, layout = call.bias, call.varlen
    out, lse, _ = attention_forward(*operands(call), impl)
    if not call.return_lse:
        return out, None
    is_centred = layout is None and bias is not None and packing.is_packed(bias.phi_q, bias.phi_k, call.query.dtype)
    if bias is not None and bias.rank > 0 and is_centred:
        lse = lse + packing.row_constant(bias, tiled=packing.is_tile_centred(call.seqlen_k, call.query.dtype))
    return out, lse


def operands(call: Call) -> tuple[object, ...]:
    """The arguments that both operators share, all but the last, `impl`.

    Args:
        call: the request.
    """
    bias, layout = call.bias, call.varlen
    seed = torch.randint(0, 2**31 - 1, (), device=call.query.device) if call.dropout_p > 0 else None
    return (
        call.query,
        call.key,
        call.value,
        *_parts(bias, call.query),
        None if call.attn_mask is None else _addressed(call.attn_mask, call.query),
        None if layout is None else layout.cu_seqlens_q,
        None if layout is None else layout.cu_seqlens_k,
        seed,
        call.seqlen_q if layout is None else layout.max_seqlen_q,
        call.seqlen_k if layout is None else layout.max_seqlen_k,
        list(bias.ranks) if bias is not None and bias.ranks is not None else [],
        call.scale,
        _side(call.window_left),
        _side(call.window_right),
        call.bottom_right,
        call.dropout_p,
    )


def _side(size: int | None) -> int:
    """A side of the window, for the operators."""
    return UNBOUNDED if size is None or size >= FARTHEST else size


def _parts(bias: FactoredBias | None, query: Tensor) -> tuple[Tensor | None, ...]:
    """phi_q, phi_k, table, code_q, code_k; None for each that the kernels do without."""
    if bias is None:
        return (None,) * 5
    factors = (_addressed(bias.phi_q, query), _addressed(bias.phi_k, query)) if bias.rank > 0 else (None, None)
    if bias.table is None or (bias.code_q is None and bias.code_k is None):
        return *factors, bias.table, None, None
    # Kernels read 32 bits: cast once for both passes, and not at all where they are given so.
    return *factors, bias.table, *bias.codes(torch.int32)


def _addressed(x: Tensor, query: Tensor) -> Tensor:
    """As `storable`, which finds nothing to do for up to three leading dimensions: four levels describe any of them."""
    return x if query.dim() <= 5 else storable(x, tuple(query.shape[:-2]))
