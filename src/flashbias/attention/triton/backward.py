"""Backward pass in parts that never share an accumulator, so that every gradient is bitwise repeatable.

- `_bwd_delta_kernel`: delta = rowsum(dout * out) - dlse.
- `dkdv.py`: a block of keys walks over queries: dk, dv, dphi_k.
- `dq.py`: a block of queries walks over keys: dq, dphi_q.
- `short_backward.py`: short sequences in half precision that share their bias: as `window.py`, in a walk over them.
- `window.py`: other short sequences, one tile for all: every gradient from one recomputation.
- `table.py`: a tile walks over all that share the table, then adds its entries as integers.

`shared.py` stands beside these: for passes that need not be repeatable and have no room for wide factors.

A factor that is shared by many (batch, head) pairs gets its gradient summed in registers: its program walks over
the members. Where the members alone would leave the GPU idle they are split, and the parts summed afterwards.
"""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from flashbias.attention.layout import Sharing, cdiv, next_power_of_2
from flashbias.attention.triton import short_backward, table, window
from flashbias.attention.triton.assembler import soundly_assembled
from flashbias.attention.triton.configs import Config, choose
from flashbias.attention.triton.dkdv import _bwd_dkdv_kernel
from flashbias.attention.triton.dq import _bwd_dq_kernel
from flashbias.attention.triton.launcher import start
from flashbias.attention.triton.operands import Operands, flattened, multiprocessors, strides_of, walk_sizes
from flashbias.attention.triton.scores import LOG2E
from flashbias.attention.triton.tiles import load_tile


@triton.jit
def _bwd_delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    stride_dob,
    stride_doh,
    stride_don,
    num_heads,
    seqlen_q,
    head_dim_v,
    num_blocks,
    stride_rows,
    HAS_OUT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """`rowsum(dout * out) - dlse`, from which a score's gradient is measured, and lse in units of log 2.

    Rows that attend to nothing, and those past the end, get +inf, so that their weights come out as exp2(-inf) = 0.
    """
    bh = tl.program_id(0) // num_blocks
    start_m = (tl.program_id(0) % num_blocks) * BLOCK_M
    b, h = tl.cast(bh // num_heads, tl.int64), tl.cast(bh % num_heads, tl.int64)
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    out_ptr += b * stride_ob + h * stride_oh
    dout_ptr += b * stride_dob + h * stride_doh
    delta = tl.zeros([BLOCK_M], tl.float32)
    if HAS_OUT:
        out = load_tile(out_ptr, start_m, offs_m, offs_d, stride_on, seqlen_q, head_dim_v, True, True).to(tl.float32)
        dout = load_tile(dout_ptr, start_m, offs_m, offs_d, stride_don, seqlen_q, head_dim_v, True, True).to(tl.float32)
        delta = tl.sum(out * dout, 1)
    rows = tl.cast(bh, tl.int64) * seqlen_q + start_m + offs_m
    inside = (start_m + offs_m) < seqlen_q
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
    rows = tl.cast(bh, tl.int64) * stride_rows + start_m + offs_m
    stored = (start_m + offs_m) < stride_rows
    tl.store(delta_ptr + rows, delta, mask=stored)
    tl.store(lse2_ptr + rows, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=stored)


# -------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Walk:
    """Which (batch, head) pairs a program walks over, and what it stores."""

    sharing: Sharing
    store_own: bool
    sum_own: bool
    store_phi: bool
    sum_phi: bool

    def splits(self, blocks: int, ops: Operands) -> int:
        """Parts into which the members are split so that programs fill the GPU."""
        if not self.sum_phi or self.sum_own:
            return 1
        wanted = cdiv(8 * multiprocessors(ops.q.device), blocks * self.sharing.groups)
        return max(1, min(self.sharing.members, wanted))


@soundly_assembled
def launch(
    grads: list[torch.Tensor],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    needs_grad: tuple[bool, ...],
    *arguments: Any,
) -> None:
    """Fill the gradients that are needed.

    Args:
        grads: of query, key, value, phi_q, phi_k, table; empty tensors where not needed.
        dout: gradient of the output.
        dlse: gradient of the log-sum-exp, or None.
        out: output of the forward pass; None: gradients of scores are measured from `-dlse` alone.
        lse: log-sum-exp of the forward pass (of centred scores).
        needs_grad: which of the six are needed.
        *arguments: those that the operators share (`attention/registration.py`).
    """
    launch_as(Operands.of(*arguments), grads, dout, dlse, out, lse, needs_grad)


def launch_as(
    ops: Operands,
    grads: list[torch.Tensor],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    needs_grad: tuple[bool, ...],
) -> None:
    """Fill the gradients of a call that is flattened already."""
    dout = flattened(dout)
    need_q, need_k, need_v, need_phi_q, need_phi_k, need_table = needs_grad
    # Short windows make delta of their own weights, so all keys must be there.
    is_short = out is not None and short_backward.fits(ops, needs_grad)
    if is_short:
        short_backward.launch(ops, grads, dout, dlse, lse, needs_grad)
        if not need_table:
            return
    lse2, delta = rows_of(ops, dout, dlse, out, lse)
    rows = {"dout_ptr": dout, "lse_ptr": lse2, "delta_ptr": delta}
    rows |= strides_of("do", dout)
    if window.fits(ops, needs_grad) and not is_short:
        window.launch(ops, grads, rows, needs_grad)
    elif not is_short:
        _launch_dkdv(ops, grads, rows, need_k or need_v, need_phi_k)
        _launch_dq(ops, grads, rows, need_q, need_phi_q)
    if need_table:
        table.launch(ops, grads[5], dout, dlse, rows)


def rows_of(
    ops: Operands,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    multiple: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradient of a score needs of its row.

    Args:
        ops: the call.
        dout: gradient of the output, `[B, H, N, head_dim_v]`.
        dlse: gradient of the log-sum-exp, or None.
        out: the output; None: delta is -dlse.
        lse: log-sum-exp of the forward pass.
        multiple: rows of a (batch, head) are filled up to a multiple of this with rows that see nothing.

    Returns:
        The log-sum-exp in units of log 2, and delta, each `[B, H, rows]` in float32.
    """
    length = cdiv(ops.seqlen_q, multiple) * multiple
    shape = (*lse.shape[:-1], length)
    lse2, delta = lse.new_empty(shape), lse.new_empty(shape)
    blocks = cdiv(length, 64)
    flat_out = dout if out is None else ops.flat(out)
    start(
        _bwd_delta_kernel,
        (blocks * ops.batch * ops.num_heads,),
        flat_out,
        dout,
        None if dlse is None else dlse.contiguous(),
        lse,
        delta,
        lse2,
        *flat_out.stride()[:3],
        *dout.stride()[:3],
        ops.num_heads,
        ops.seqlen_q,
        ops.head_dim_v,
        blocks,
        length,
        HAS_OUT=out is not None,
        HAS_DLSE=dlse is not None,
        BLOCK_M=64,
        BLOCK_DV=ops.block_dv,
    )
    return lse2, delta


def _launch_dkdv(
    ops: Operands, grads: list[torch.Tensor], rows: dict[str, Any], need_dkdv: bool, need_phi: bool
) -> None:
    if not (need_dkdv or need_phi):
        return
    dk, dv = (ops.flat(g) if g.numel() else torch.empty_like(x) for g, x in ((grads[1], ops.k), (grads[2], ops.v)))
    config = choose("dkdv", ops)
    blocks = cdiv(ops.max_seqlen_k, config.block_n)
    arguments = {**rows, "dk_ptr": dk, "dv_ptr": dv, **strides_of("dk", dk), **strides_of("dv", dv)}
    for walk in _key_walks(ops, need_dkdv, need_phi):
        _launch_walk(
            _bwd_dkdv_kernel, ops, walk, config, blocks, grads[4], ops.seqlen_k,
            ops.has_edge(ops.seqlen_q, config.block_m),
            arguments,
            lambda first, walk=walk: {
                "STORE_DKDV": walk.store_own and first, "SUM_DKDV": walk.sum_own,
                "dphi_mult": 1.0 if ops.factors is None else ops.factors.dphi_k_mult,
            },
        )  # fmt: skip


def _launch_dq(ops: Operands, grads: list[torch.Tensor], rows: dict[str, Any], need_dq: bool, need_phi: bool) -> None:
    if not (need_dq or need_phi):
        return
    dq = ops.flat(grads[0]) if need_dq else ops.q
    config = choose("dq", ops)
    blocks = cdiv(ops.max_seqlen_q, config.block_m)
    sharing = ops.walk(ops.sharing_q) if need_phi else Sharing.nothing(ops.num_programs)
    walk = Walk(sharing, need_dq, False, need_phi, need_phi and sharing.members > 1)
    _launch_walk(
        _bwd_dq_kernel, ops, walk, config, blocks, grads[3], ops.seqlen_q,
        ops.has_edge(ops.seqlen_k, config.block_n), {**rows, "dq_ptr": dq, **strides_of("dq", dq)},
        lambda first: {"STORE_DQ": need_dq and first},
    )  # fmt: skip


def _key_walks(ops: Operands, need_dkdv: bool, need_phi: bool) -> list[Walk]:
    """How to reach dk, dv and dphi_k: together, unless grouped queries and a shared phi_k want different sums."""
    everyone = Sharing.nothing(ops.num_programs)
    shared = need_phi and ops.sharing_k.members > 1
    if ops.group == 1 or not need_dkdv:
        return [Walk(ops.walk(ops.sharing_k) if shared else everyone, need_dkdv, False, need_phi, shared)]
    grouped = Sharing(ops.num_programs // ops.group, 1, 1, ops.group)
    walks = [Walk(grouped, True, True, need_phi and not shared, False)]
    if shared:
        walks.append(Walk(ops.walk(ops.sharing_k), False, False, True, True))
    return walks


def _launch_walk(
    kernel: Any,
    ops: Operands,
    walk: Walk,
    config: Config,
    blocks: int,
    grad: torch.Tensor,
    length: int,
    has_edge: bool,
    arguments: dict[str, Any],
    own_flags: Callable[[bool], dict[str, Any]],
) -> None:
    """Launch a kernel for every chunk of gradient columns, and sum what the splits left."""
    splits = walk.splits(blocks, ops)
    factors = ops.factors
    rank = factors.rank if factors is not None and walk.store_phi else 0
    partial = grad if grad.numel() == 0 else grad.new_empty(0)
    if rank:
        target = grad.view(1, -1, length, rank)
        exact = splits == 1
        partial = target if exact else grad.new_empty(splits, *target.shape[1:], dtype=torch.float32)
    # A factor that is in registers for the scores serves its gradient too, with columns that are not stored.
    in_registers = factors is not None and factors.chunks == 1 and factors.block_r <= 64 and not ops.needs_two_parts
    block_g = factors.block_r if factors is not None and in_registers else min(64, max(16, next_power_of_2(rank)))
    for first_column in range(0, max(rank, 1), block_g):
        start(
            kernel,
            (blocks * walk.sharing.groups, splits),
            **ops.arguments,
            **arguments,
            dphi_ptr=partial,
            stride_dphi_s=partial.stride(0) if rank else 0,
            stride_dphi_f=partial.stride(1) if rank else 0,
            stride_dphi=rank,
            **walk_sizes(walk.sharing),
            num_blocks=blocks,
            num_members=walk.sharing.members,
            members_per_split=cdiv(walk.sharing.members, splits),
            first_column=first_column,
            **own_flags(first_column == 0),
            SECOND_PART=rank if ops.needs_two_parts else 0,
            PHI_IN_REGISTERS=in_registers,
            STORE_DPHI=walk.store_phi,
            SUM_DPHI=walk.sum_phi,
            HAS_EDGE=has_edge,
            BLOCK_G=block_g,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
        )
    if splits > 1:
        grad.copy_(partial.sum(0).view(grad.shape))
