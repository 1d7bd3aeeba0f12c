"""Gradients of packed batches by the fused kernel, on a Hopper GPU: every width and band, and nothing leaks."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from tests.attention.cases import BOTTOM_RIGHT, CAUSAL
from tests.attention.hopper.marks import ON_HOPPER
from tests.attention.problem import LEAVES
from tests.attention.varlen import Packed, VarlenCase
from torch import Tensor

import flashbias as fb

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")

pytestmark = [*ON_HOPPER, pytest.mark.usefixtures("fused_gradients", "nan_filled_buffers")]

DEVICE = "cuda"
OF_TOKENS = ("query", "key", "value")
LENGTHS = ((130, 0, 64, 1, 300, 200, 129, 63), (97, 40, 64, 260, 0, 200, 128, 1))
BANDS = {
    "full": {},
    "top left": CAUSAL,
    "bottom right": BOTTOM_RIGHT,
    "window": {"window": (70, 20)},
    "left": {"window": (40, None), "causal_alignment": "bottom_right"},
}


def check(case: VarlenCase, dtype: torch.dtype = torch.bfloat16, wanted: tuple[str, ...] = LEAVES) -> None:
    """Output, log-sum-exp and gradients of every sequence."""
    packed = case.build(dtype, DEVICE)
    leaves = packed.leaves(wanted)
    packed.assert_close_to_oracle(leaves, *packed.attend("hopper", leaves, return_lse=True, deterministic=False))


def gradients(packed: Packed, impl: str, tensors: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    """Of all tensors that have an element."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = packed.attend(impl, leaves, deterministic=False if impl == "hopper" else None)
    found = {name: x for name, x in leaves.items() if x.numel()}
    return dict(zip(found, torch.autograd.grad(out, tuple(found.values()), dout), strict=True))


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_every_width(head_dim: int, rank: int, band: str) -> None:
    check(VarlenCase("widths", *LENGTHS, head_dim=head_dim, rank=rank, with_lse=True, options=BANDS[band]))


@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_wide_factors(head_dim: int) -> None:
    check(VarlenCase("wide factors", *LENGTHS, head_dim=head_dim, rank=20, options=CAUSAL))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_every_length(is_causal: bool, head_dim: int) -> None:
    """Around the ends of slabs and of tiles, one after the other, in one batch and alone."""
    lengths = (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 2, 385)
    options = CAUSAL if is_causal else {}
    check(VarlenCase("lengths", lengths, lengths, head_dim=head_dim, options=options))
    check(VarlenCase("lengths", lengths[::-1], lengths, head_dim=head_dim, options=options))
    for n in (17, 64, 130):  # fewer queries in all are left to the portable kernels
        check(VarlenCase("alone", (n,), (n,), head_dim=head_dim, options=options))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (1, None), (3, None)])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_heads(head_dim: int, heads: int, kv_heads: int | None) -> None:
    """Heads of a group share a factor, as the kernel wants it; others may have their own."""
    for phi_k_heads in {1, heads if kv_heads is None else 1}:
        for options in (BOTTOM_RIGHT, {"window": (70, 20)}):
            check(VarlenCase("heads", *LENGTHS, heads, kv_heads, 3, phi_k_heads, head_dim, options=options))


@pytest.mark.parametrize("band", ["full", "top left", "window"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_float16(head_dim: int, band: str) -> None:
    """Its factors are frozen: their gradients come from elsewhere."""
    check(VarlenCase("half", *LENGTHS, head_dim=head_dim, options=BANDS[band]), torch.float16, OF_TOKENS)


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("phi_q",), ("phi_k",)], ids="-".join)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_only_one_needs_a_gradient(head_dim: int, wanted: tuple[str, ...]) -> None:
    check(VarlenCase("one", *LENGTHS, head_dim=head_dim, options=CAUSAL), wanted=wanted)


@pytest.mark.parametrize("poison", [1e4, torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("band", ["full", "bottom right", "window"])
def test_nothing_leaks(band: str, head_dim: int, poison: float) -> None:
    """Whatever stands in the other sequences and their output's gradient, those of a sequence stay what they are."""
    case = VarlenCase("leak", (17, 150, 64, 40), (19, 100, 200, 7), rank=5, head_dim=head_dim, options=BANDS[band])
    packed = case.build(torch.bfloat16, DEVICE)
    clean = gradients(packed, "hopper", packed.tensors, packed.dout)
    ends_q, ends_k = (list(itertools.accumulate((0, *x))) for x in (packed.lengths_q, packed.lengths_k))
    for s in range(4):
        own_q, own_k = slice(*ends_q[s : s + 2]), slice(*ends_k[s : s + 2])
        tensors = {}
        for name, x in packed.tensors.items():
            own, axis = (own_q if name in ("query", "phi_q") else own_k), int(name.startswith("phi"))
            tensors[name] = torch.full_like(x, poison)
            tensors[name].transpose(0, axis)[own] = x.transpose(0, axis)[own]
        dout = torch.full_like(packed.dout, poison)
        dout[own_q] = packed.dout[own_q]
        for name, grad in gradients(packed, "hopper", tensors, dout).items():
            own, axis = (own_q if name in ("query", "phi_q") else own_k), int(name.startswith("phi"))
            found, right = (x.transpose(0, axis)[own].float() for x in (grad, clean[name]))
            # Additions come in any order.
            torch.testing.assert_close(found, right, rtol=2**-6, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_more_blocks_than_programs(head_dim: int, band: str) -> None:
    """Every program takes several; lengths in any order. As the portable kernels have it."""
    lengths = tuple(random.Random(1).choices(range(1, 700), k=60))
    case = VarlenCase("many", lengths, lengths[::-1], 3, rank=2, phi_k_heads=1, head_dim=head_dim, options=BANDS[band])
    packed = case.build(torch.bfloat16, DEVICE)
    right = gradients(packed, "triton", packed.tensors, packed.dout)
    for name, grad in gradients(packed, "hopper", packed.tensors, packed.dout).items():
        assert (grad - right[name]).float().norm() <= 1e-2 * right[name].float().norm(), name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_alibi(head_dim: int) -> None:
    """Positions of thousands as factors without gradients, each sequence with its own."""
    lengths, heads = (3000, 100, 1900), 4
    slopes = torch.tensor([0.5, 0.1, 0.02, 0.004], device=DEVICE)[:, None, None]
    position = torch.cat([torch.arange(float(n), device=DEVICE) for n in lengths])[None, :, None]
    packed = VarlenCase(
        "alibi", lengths, lengths, heads, rank=1, phi_k_heads=1, head_dim=head_dim, options=CAUSAL
    ).build(torch.bfloat16, DEVICE)
    packed.tensors["phi_q"] = slopes.expand(-1, sum(lengths), -1)
    packed.tensors["phi_k"] = position
    right = gradients(packed, "triton", packed.tensors, packed.dout)
    leaves = packed.leaves(OF_TOKENS)
    out = packed.attend("hopper", leaves, deterministic=False)
    found = torch.autograd.grad(out, [leaves[name] for name in OF_TOKENS], packed.dout)
    for name, grad in zip(OF_TOKENS, found, strict=True):
        assert (grad - right[name]).float().norm() <= 1e-2 * right[name].float().norm(), name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_slices_of_one_projection(head_dim: int) -> None:
    """Rows of a wider tensor, whose gradients lie elsewhere."""
    packed = VarlenCase("slices", *(LENGTHS[0],) * 2, head_dim=head_dim, options=CAUSAL).build(torch.bfloat16, DEVICE)
    right = gradients(packed, "hopper", packed.tensors, packed.dout)
    wide = torch.stack([packed.tensors[name] for name in OF_TOKENS], 1).requires_grad_()
    leaves: dict[str, Any] = dict(zip(OF_TOKENS, wide.unbind(1), strict=True)) | {
        name: packed.tensors[name] for name in ("phi_q", "phi_k")
    }
    out = packed.attend("hopper", leaves, deterministic=False)
    (found,) = torch.autograd.grad(out, wide, packed.dout)
    for name, grad in zip(OF_TOKENS, found.unbind(1), strict=True):
        torch.testing.assert_close(grad.float(), right[name].float(), rtol=2**-6, atol=1e-3)


def test_the_host_never_waits() -> None:
    packed = VarlenCase("sync", (200, 300), (300, 200), head_dim=64).build(torch.bfloat16, DEVICE)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=DEVICE) for x in
                  (packed.lengths_q, packed.lengths_k))  # fmt: skip
    leaves = packed.leaves()

    def once() -> None:
        bias = fb.FactoredBias(leaves["phi_q"], leaves["phi_k"])
        out = fb.varlen_attention(
            *(leaves[name] for name in OF_TOKENS), cu_q, cu_k, bias, max_seqlen_q=300, max_seqlen_k=300, impl="hopper",
            deterministic=False,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, tuple(leaves.values()), packed.dout)

    once()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
