"""Kernels for Hopper GPUs (H100, H200) in Gluon; importing this package does not load Triton."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from flashbias.attention import packing, registration
from flashbias.attention.call import HALF, Call
from flashbias.attention.hopper.configs import ready_columns

__all__ = ["is_slower", "run", "unavailable", "unsupported"]

WIDEST_HEAD = 256
WIDEST_FACTORS = 256
"""Packed columns that fit into shared memory beside keys and values."""

WIDEST_BESIDE_VALUES = 128
"""Packed columns that fit beside values of more than 128 columns and queries of more than 64, up to 128.

The output of queries narrower than their values has room of its own, that of wider ones leaves through theirs.
"""

WIDEST_CENTRED = 8
"""Rank of float32 factors up to which offsets of tiles are worked out beside the products; an estimate."""

SHORT = 128
"""Queries that do not fill one tile."""

NARROW_IF_PACKED = 32
"""Width of heads up to which packed batches were not measured against the portable kernels."""

FEWEST_QUERIES = 17
"""Fewer queries than this leave most of a tile empty."""

NARROWEST_STEP = 8
"""Elements in the 16 bytes to which the copy engine wants rows aligned."""


def unavailable(device: torch.device | None = None) -> str | None:
    """What keeps the kernels from running on this machine at all, None if nothing.

    Args:
        device: the GPU in question; default, and in place of what is no GPU, the current one.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device"
    if device is None or device.type != "cuda" or device.index is None:
        return _obstacle(torch.cuda.current_device())
    return _obstacle(device.index)


@functools.cache
def _obstacle(device: int) -> str | None:
    """What keeps them from running on this GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"the GPU has compute capability {major}.{minor}; these kernels are for 9.0"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if find_spec("triton.experimental.gluon") is None:
        return "this release of triton has no Gluon"
    from flashbias.attention.triton import assembler

    if assembler.is_faulty() and assembler.replacement() is None:
        return "Triton's ptxas makes faulty code for this GPU; set TRITON_PTXAS_PATH to one of CUDA 12.9 or newer"
    return None


# torch.compile takes what this returns as a constant; see `flashbias.attention.triton`.
setattr(unavailable, "_dynamo_marked_constant", True)  # noqa: B010


def unsupported(call: Call) -> str | None:
    """Say what of the call these kernels cannot do, None if nothing."""
    query, value, bias = call.query, call.value, call.bias
    if query.dtype not in HALF:
        return f"dtype {query.dtype}; the matrix unit takes torch.float16 and torch.bfloat16 here"
    if query.device.type != "cuda":
        return f"tensors are on {query.device}; kernels need a CUDA device"
    for name, size in (("head_dim", query.shape[-1]), ("head_dim_v", value.shape[-1])):
        if size > WIDEST_HEAD or size % NARROWEST_STEP:
            return f"{name} {size} is no multiple of {NARROWEST_STEP} up to {WIDEST_HEAD}"
    if call.attn_mask is not None and call.attn_mask.shape[-2] > 1:
        return "an attn_mask that differs between queries"
    if call.dropout_p > 0:
        return f"dropout_p {call.dropout_p}"
    if call.seqlen_q < FEWEST_QUERIES:
        return f"{call.seqlen_q} queries, fewer than {FEWEST_QUERIES}"
    return None if bias is None else _unsupported_bias(call)


def _unsupported_bias(call: Call) -> str | None:
    bias, query = call.bias, call.query
    assert bias is not None
    is_centred = call.varlen is None and packing.is_packed(bias.phi_q, bias.phi_k, query.dtype)
    if is_centred and bias.rank > WIDEST_CENTRED and packing.is_tile_centred(call.seqlen_k, query.dtype):
        return f"float32 factors of rank {bias.rank}, more than {WIDEST_CENTRED}, beside {call.seqlen_k} keys"
    if bias.ranks is not None and {bias.phi_q.shape[-3], bias.phi_k.shape[-3]} != {len(bias.ranks)}:
        return "ranks that differ between heads which share a factor"
    columns, widest = _columns(call), _widest_factors(query.shape[-1], call.value.shape[-1])
    if columns > widest:
        return f"rank {bias.rank}, which packs into {columns} columns, more than {widest}"
    return None


def _widest_factors(head_dim: int, head_dim_v: int) -> int:
    """Packed columns that fit."""
    return WIDEST_BESIDE_VALUES if 64 < head_dim <= 128 < head_dim_v else WIDEST_FACTORS


def _columns(call: Call) -> int:
    """Packed columns of the factors, 0 without."""
    bias = call.bias
    if bias is None or bias.rank == 0:
        return 0
    return ready_columns(bias.rank, bias.phi_q.dtype, bias.phi_k.dtype, call.scale, call.query.dtype)


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the kernels.

    Args:
        call: the checked request.

    Returns:
        Output `[*batch, H, N, head_dim_v]` and, if asked for, the log-sum-exp, float32 `[*batch, H, N]`.
    """
    return registration.run(call, "hopper.repeatable" if call.deterministic else "hopper")


def is_slower(call: Call) -> bool:
    """Whether the portable kernels should be faster (docs/kernels.md); the limits lie between what was measured.

    Of a packed batch the mean length is what counts: it is known without waiting for the GPU.
    """
    if call.varlen is None:
        return call.seqlen_q <= SHORT
    sequences = max(call.varlen.cu_seqlens_q.shape[0] - 1, 1)
    is_narrow = max(call.query.shape[-1], call.value.shape[-1]) <= NARROW_IF_PACKED
    return is_narrow or call.seqlen_q <= SHORT * sequences
