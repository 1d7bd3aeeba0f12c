"""Attention of other libraries, each wrapped once: how it is called, in which layout, with which bias."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias.bench.cases import Case

__all__ = ["PEERS", "Attend", "Bias", "Layout", "Peer", "Unsupported", "round_up"]

Bias = Literal["none", "dense", "alibi"]
Attend = Callable[..., Tensor]  # (query, key, value[, dense bias or slopes]) in the peer's layout
Build = Callable[[Case, Bias, torch.device], Attend]

INT32_ELEMENTS = 2**31


class Unsupported(Exception):
    """A provider cannot do a case; the message says why, in a few words."""


@dataclass(frozen=True)
class Layout:
    """How a peer wants `[B, H, N, d]` laid out, and the way back; made outside the timed region."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


BHND = Layout(lambda t: t, lambda t: t)
BNHD = Layout(lambda t: t.transpose(1, 2).contiguous(), lambda t: t.transpose(1, 2))
# [1, H, rows, N, d]: rows of a pair representation, one bias for all of them.
HEADS_FIRST = Layout(lambda t: t.transpose(0, 1)[None].contiguous(), lambda t: t[0].transpose(0, 1))


@dataclass(frozen=True)
class Peer:
    """One way of computing attention outside this library.

    Args:
        name: as it stands behind the slash of a provider's name.
        build: makes the function to be timed, with the scale and the causal mask of a case, for one kind of
            bias: `build(case, bias, device)(query, key, value[, extra])`; `extra` is matrix or slopes.
        biases: kinds of bias that it can be asked for.
        gradient: whether a dense bias can take a gradient.
        module: package that must be importable.
        layout: of query, key, value and output.
        bias_dtype: dtype of a dense bias; None for that of the queries.
        bias_masks: a causal mask is written into the dense bias as -inf.
        bias_squeezed: a bias shared over the batch is `[H, N, M]`, without its batch dimension.
        concat: whether factors can be concatenated to queries and keys.
        concat_widths: widths to which concatenated keys, and values, are padded with zeros, from (head_dim,
            columns of the factors, whether gradients are wanted).
        limit: says why a case is out of reach, from (case, elements of the dense bias); None if it is not.
        devices: device types on which it can run.
        in_family: device types on which the family's name, such as `dense`, includes it.
    """

    name: str
    build: Build
    biases: tuple[Bias, ...] = ("none", "dense")
    gradient: bool = False
    module: str | None = None
    layout: Layout = BHND
    bias_dtype: torch.dtype | None = None
    bias_masks: bool = False
    bias_squeezed: bool = False
    concat: bool = True
    concat_widths: Callable[[int, int, bool], tuple[int, int]] = lambda d, extra, grads: (
        round_up(d + extra),
        d,
    )
    limit: Callable[[Case, int], str | None] = lambda case, elements: None
    devices: tuple[str, ...] = ("cuda",)
    in_family: tuple[str, ...] = ("cuda",)


# -------------------------------------------------------------------- torch: scaled_dot_product_attention


def _sdpa(backend: str | None) -> Build:
    """SDPA held to one backend of torch, so that another cannot step in; None leaves torch its choice."""

    def build(case: Case, bias: Bias, device: torch.device) -> Attend:
        is_causal = case.is_causal and bias == "none"  # SDPA takes a mask or is_causal, not both

        def attend(query: Tensor, key: Tensor, value: Tensor, dense: Tensor | None = None) -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=dense, is_causal=is_causal, scale=case.scale
            )

        if backend is None:
            return attend
        from torch.nn.attention import SDPBackend, sdpa_kernel

        only = getattr(SDPBackend, backend)

        def attend_with(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(only):
                return attend(*tensors)

        return attend_with

    return build


def _equal_widths(d: int, extra: int, grads: bool) -> tuple[int, int]:
    """Torch's flash kernels take queries, keys and values of one width only."""
    width = round_up(d + extra)
    return width, width


def round_up(width: int, multiple: int = 8) -> int:
    """The next multiple; kernels want widths in eights."""
    return -(-width // multiple) * multiple


# -------------------------------------------------------------------- torch: FlexAttention


def _flex(backend: Literal["FLASH"] | None) -> Build:
    """FlexAttention, compiled anew for each case: the bias is read, or computed, by a score function."""

    def build(case: Case, bias: Bias, device: torch.device) -> Attend:
        from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask, flex_attention

        torch._dynamo.reset()  # no case may meet the recompilation limit because of those before it
        scale = case.scale
        options: FlexKernelOptions | None = {"BACKEND": backend} if backend else None
        make_score_mod = {"none": _no_score_mod, "dense": _dense_score_mod, "alibi": _alibi_score_mod}[bias]
        mask = None
        if case.is_causal:
            mask = create_block_mask(_causal, None, None, case.seqlen, case.seqlen, device=device)

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, *extra: Tensor) -> Tensor:
            score_mod = make_score_mod(*extra)
            out = flex_attention(query, key, value, score_mod, block_mask=mask, scale=scale, kernel_options=options)
            return out

        compiled = torch.compile(run, dynamic=False, fullgraph=True)

        def attend(query: Tensor, key: Tensor, value: Tensor, *extra: Tensor) -> Tensor:
            return compiled(query, key, value, mask, *extra)

        return attend

    return build


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _no_score_mod() -> None:
    return None


def _dense_score_mod(matrix: Tensor) -> Callable[..., Tensor]:
    """Read a matrix `[H, N, M]`, or `[B, H, N, M]`."""

    def per_head(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + matrix[h, i, j]

    def per_sequence(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + matrix[b, h, i, j]

    return per_head if matrix.dim() == 3 else per_sequence


def _alibi_score_mod(slopes: Tensor) -> Callable[..., Tensor]:
    """Compute ALiBi from slopes `[H]`."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + slopes[h] * (j - i)

    return score_mod


def _flex_limit(case: Case, elements: int) -> str | None:
    """FlexAttention reads a larger bias out of bounds, which would end the process."""
    return "index overflow beyond 2^31 elements" if elements >= INT32_ELEMENTS else None


# -------------------------------------------------------------------- flash-attn-4, cuEquivariance, trifast


def _fa4(case: Case, bias: Bias, device: torch.device) -> Attend:
    flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attn_func(query, key, value, softmax_scale=case.scale, causal=case.is_causal)[0]

    return attend


def _fa4_widths(d: int, extra: int, grads: bool) -> tuple[int, int]:
    """Widths for which the backward kernel for sm_90 compiles and is right.

    It does not compile for keys of 24, 40 or 64 beside values of 16, 32 or 32, and is reported wrong at 72
    and 104.
    """
    if not grads or d + extra > 128:
        return round_up(d + extra), d
    width = round_up(d + extra, 16)
    return width, width if width == 2 * d else d


def _cuequivariance(case: Case, bias: Bias, device: torch.device) -> Attend:
    triangle_attention = importlib.import_module("cuequivariance_torch").triangle_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, dense: Tensor) -> Tensor:
        # It takes [B, rows, H, N, d] with a bias [B, 1, H, N, M], one for all rows.
        rows = 0 if dense.shape[0] == 1 else 1
        query, key, value = (t.unsqueeze(rows) for t in (query, key, value))
        return triangle_attention(query, key, value, dense.unsqueeze(1), scale=case.scale).squeeze(rows)

    return attend


def _not_causal(case: Case, elements: int) -> str | None:
    return "no causal mask" if case.is_causal else None


def _trifast(case: Case, bias: Bias, device: torch.device) -> Attend:
    triangle_attention = importlib.import_module("trifast").triangle_attention
    rows = case.batch[-1]
    hidden = torch.zeros(1, rows, case.seqlen, dtype=torch.bool, device=device)  # True would hide a key

    def attend(query: Tensor, key: Tensor, value: Tensor, dense: Tensor) -> Tensor:
        return triangle_attention(query, key, value, dense, hidden)

    return attend


def _square_triangle(case: Case, elements: int) -> str | None:
    if case.is_causal or not case.shared or case.batch != (1, case.seqlen):
        return "only pair representations of N rows and N columns"
    return None


# -------------------------------------------------------------------- all of them

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "sdpa",
            _sdpa(None),
            gradient=True,
            bias_masks=True,
            concat_widths=_equal_widths,
            devices=("cuda", "cpu"),
            in_family=("cpu",),
        ),
        Peer(
            "sdpa-math",
            _sdpa("MATH"),
            gradient=True,
            bias_masks=True,
            devices=("cuda", "cpu"),
            in_family=(),
        ),
        Peer("fa4", _fa4, ("none",), module="flash_attn.cute", layout=BNHD, concat_widths=_fa4_widths),
        Peer("sdpa-cudnn", _sdpa("CUDNN_ATTENTION"), bias_masks=True),
        Peer(
            "sdpa-flash",
            _sdpa("FLASH_ATTENTION"),
            ("none",),
            concat_widths=_equal_widths,
            devices=("cuda", "cpu"),
        ),
        Peer(
            "sdpa-efficient",
            _sdpa("EFFICIENT_ATTENTION"),
            gradient=True,
            bias_masks=True,
        ),
        Peer(
            "cuequivariance",
            _cuequivariance,
            ("dense",),
            gradient=True,
            module="cuequivariance_torch",
            bias_dtype=torch.float32,
            concat=False,
            limit=_not_causal,
        ),
        Peer(
            "trifast",
            _trifast,
            ("dense",),
            gradient=True,
            module="trifast",
            layout=HEADS_FIRST,
            concat=False,
            limit=_square_triangle,
        ),
        Peer(
            "flex",
            _flex(None),
            ("none", "dense", "alibi"),
            gradient=True,
            bias_squeezed=True,
            limit=_flex_limit,
        ),
        Peer(
            "flex-fa4",
            _flex("FLASH"),
            ("none", "dense", "alibi"),
            module="flash_attn.cute",
            bias_squeezed=True,
            limit=_flex_limit,
        ),
    )
}
