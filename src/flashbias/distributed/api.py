"""`context_parallel_attention`: one call, whichever way ranks share the sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashbias.attention.block import block_implementation, checked_block
from flashbias.attention.call import Call, inputs_of
from flashbias.distributed.agreement import Header, agree
from flashbias.distributed.errors import DisagreementError
from flashbias.distributed.ring import Plan, ring_attention
from flashbias.distributed.shard import ORDERS, Layout
from flashbias.distributed.shared_gradient import summed_over_ranks
from flashbias.distributed.tiles import Mask, checked_documents
from flashbias.distributed.topology import STRATEGIES, Topology
from flashbias.distributed.ulysses import HeadExchange
from flashbias.factored import FactoredBias

__all__ = ["context_parallel_attention"]

TABLE_GRADIENTS = ("summed", "local")

F = TypeVar("F", bound=Callable[..., Any])


def _outside_graphs(function: F) -> F:
    """`torch.compiler.disable`, which on its own forgets what the function takes and returns."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@_outside_graphs
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None = None,
    *,
    mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    order: str = "contiguous",
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str = "auto",
    deterministic: bool | None = None,
    return_lse: bool = False,
    table_grad: str = "summed",
    seqlen: int | None = None,
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` over a sequence whose tokens are spread over ranks.

    Formula: that of `flashbias.attention` over the whole sequence, of which each rank gets the rows of its own tokens.
    Every rank of the mesh calls it with its own shard, and every rank must run the backward pass if one does.

    Use it where one sequence is too long for one GPU. A rank's memory is that of its own tokens, whatever N is. Factors
    travel with their tokens: a ring sends `R / (2 head_dim)` more than one without a bias (less where heads share
    phi_k), and there is no bias matrix to cut or to rebuild.

    Args:
        query: `[*batch, H, n, head_dim]`, the tokens of this rank.
        key: `[*batch, H_kv, n, head_dim]`.
        value: `[*batch, H_kv, n, head_dim_v]`.
        bias: phi_q and phi_k of this rank's tokens, made from positions in the whole sequence (`positions`, or cut
            with `shard_bias`). A table must be the same on all ranks; its codes default to those positions (with
            `cu_seqlens` to positions within each document).
        mesh: one-dimensional; or two-dimensional, (ring, all-to-all), for "ring+ulysses".
        group: a process group in place of a mesh; default all ranks.
        strategy: "ring" circulates keys and merges blocks; "ulysses" trades tokens for heads, and needs H divisible by
            the number of ranks (H_kv a multiple or a divisor of it); "ring+ulysses" does both; "auto" takes
            "ring+ulysses" on a two-dimensional mesh, else "ulysses" if H and H_kv divide, else "ring".
        order: which tokens a rank holds: "contiguous" (shards of any sizes) or "zigzag" (as `shard` cuts them), which
            gives every rank of a ring the same work under a causal mask.
        is_causal: let tokens attend to themselves and those before them only.
        window: `(left, right)`, as in `attention`.
        cu_seqlens: int32 `[B + 1]`, boundaries of packed documents in the whole sequence, the same on all ranks; a
            document may span ranks. Batch dimensions must then be 1 or absent.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        impl: of the blocks: "auto", "hopper", "triton" or "reference".
        deterministic: as in `attention`; also adds a table's gradient in the order of ranks.
        return_lse: also return the log-sum-exp of the full scores.
        table_grad: "summed": the table's gradient is summed over ranks, so each holds all of it. "local": each keeps
            the part of its own queries (of its own heads), for DDP or FSDP, which add those of all ranks themselves.
        seqlen: number of tokens of the whole sequence, N. It is checked; without `check` it is what the sizes of shards
            follow from (default: all hold as many as this one).
        check: compare the calls of all ranks before anything is sent: one message of under 1 KiB to each, and on a GPU
            a wait for it. Switch it off for a model that has run once.

    Returns:
        `[*batch, H, n, head_dim_v]` in the queries' dtype; with `return_lse` a tuple of it and float32
        `[*batch, H, n]`.

    Raises:
        TypeError: as in `attention`.
        ValueError: as in `attention`; heads, mesh, order or sizes that do not fit.
        DisagreementError: ranks were called with different shapes, dtypes or options; raised on all of them.
        RankError: a rank did not answer within the process group's timeout; it names the rank and the step.
        NotImplementedError: `impl` cannot do the call.

    Supports:
        Gradients to query, key, value, phi_q, phi_k and table. Shards of unequal size, and empty ones. Activation
        checkpointing, DDP, FSDP2. `torch.compile` of the surrounding model breaks its graph here.

    Examples:
        >>> import torch, flashbias as fb, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 4, 16, 8)
        >>> where = cp.positions(16)
        >>> bias = fb.Alibi(num_heads=4).at(where, where)
        >>> out = cp.context_parallel_attention(q, k, v, bias, is_causal=True)
        >>> torch.allclose(out, fb.attention(q, k, v, bias, is_causal=True), atol=1e-6)
        True
        >>> torch.distributed.destroy_process_group()

    Reference:
        Liu et al., ring attention, https://arxiv.org/abs/2310.01889; Jacobs et al., DeepSpeed-Ulysses,
        https://arxiv.org/abs/2309.14509.
    """
    whole = Topology.of(mesh, group)
    state: dict[str, tuple[Call, Mask, Topology]] = {}

    def describe() -> Header:
        call, mask = _checked(query, key, value, bias, is_causal, window, cu_seqlens, scale, enable_gqa, deterministic)
        for name, choice, allowed in (("order", order, ORDERS), ("table_grad", table_grad, TABLE_GRADIENTS)):
            if choice not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {choice!r}")
        block_implementation(call, impl)  # refuses what no block could do, before anything is on its way
        state["call"] = call, mask, whole.arranged(strategy, call.num_heads, call.num_kv_heads)
        options = (
            STRATEGIES.index(strategy),
            ORDERS.index(order),
            TABLE_GRADIENTS.index(table_grad),
            int(call.deterministic),
        )
        return Header.of(call, mask, options, _needs_grad(call), seqlen)

    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    sizes = agree(whole, device, describe) if check else _assumed(describe(), whole, seqlen, order)
    call, mask, topology = state["call"]
    layout = _layout(sizes, order, seqlen, mask)
    call = _with_codes(call, layout, whole.cp_rank, mask)
    if table_grad == "summed" and call.bias is not None and call.bias.table is not None:
        table = summed_over_ranks(call.bias.table, topology, call.deterministic)
        call = replace(call, bias=replace(call.bias, table=table))
    out, lse = _attend(call, mask, topology, layout, impl)
    if cu_seqlens is not None:
        out, lse = out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])
    return (out, lse) if return_lse else out


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: FactoredBias | None,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    deterministic: bool | None,
) -> tuple[Call, Mask]:
    """This rank's part of the call, as `attention` would check it, and what the whole sequence sees."""
    call = checked_block(
        query,
        key,
        value,
        bias,
        is_causal=is_causal,
        window=window,
        scale=scale,
        enable_gqa=enable_gqa,
        deterministic=deterministic,
    )
    if call.seqlen_q != call.seqlen_k:
        raise ValueError(
            f"query has {call.seqlen_q} tokens and key {call.seqlen_k}; a rank must hold both of the same tokens"
        )
    documents = None
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
            found = getattr(cu_seqlens, "dtype", type(cu_seqlens))
            raise TypeError(f"cu_seqlens must be an int32 tensor [B + 1], got {found}")
        if any(size != 1 for size in call.query.shape[:-3]):
            raise ValueError(
                f"cu_seqlens packs documents into one sequence; batch dimensions must be 1 or absent, got query "
                f"{tuple(query.shape)}"
            )
        documents = tuple(cu_seqlens.tolist())
        call = _without_batch(call)
    return call, Mask(call.window_left, call.window_right, documents)


def _without_batch(call: Call) -> Call:
    """`[H, n, d]` from `[1, …, 1, H, n, d]`."""

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[-3:])

    bias = call.bias
    if bias is not None:
        bias = replace(bias, phi_q=heads(bias.phi_q), phi_k=heads(bias.phi_k))
    return replace(call, query=heads(call.query), key=heads(call.key), value=heads(call.value), bias=bias)


def _needs_grad(call: Call) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs_of(call)]


def _assumed(header: Header, topology: Topology, seqlen: int | None, order: str) -> list[int]:
    """Sizes of shards that nobody was asked about."""
    (own,) = header.fields()["tokens"]
    if seqlen is None:
        return [own] * topology.cp_size
    sizes = Layout.of(seqlen, topology.cp_size, order).sizes
    if sizes[topology.cp_rank] != own:
        raise ValueError(f"query has {own} tokens; rank {topology.cp_rank} of {seqlen} must hold {sizes}")
    return sizes


def _layout(sizes: list[int], order: str, seqlen: int | None, mask: Mask) -> Layout:
    """Who holds what. All ranks work it out from the same numbers, so all raise the same error."""
    total = sum(sizes)
    if seqlen is not None and seqlen != total:
        raise DisagreementError(f"seqlen is {seqlen}, but the ranks hold {sizes}, {total} tokens", ranks=())
    if mask.documents is not None:
        checked_documents(mask.documents, total)
    if order == "contiguous":
        return Layout.of_sizes(sizes)
    layout = Layout.of(total, len(sizes), order)
    if layout.sizes != sizes:
        raise DisagreementError(
            f"order={order!r} cuts {total} tokens into {layout.sizes}, but the ranks hold {sizes}; cut with "
            "flashbias.distributed.shard",
            ranks=tuple(rank for rank, (a, b) in enumerate(zip(layout.sizes, sizes, strict=True)) if a != b),
        )
    return layout


def _with_codes(call: Call, layout: Layout, cp_rank: int, mask: Mask) -> Call:
    """Fill in what a table is read by: positions in the whole sequence, or within each document."""
    bias = call.bias
    if bias is None or bias.table is None or not (bias.code_q is None or bias.code_k is None):
        return call
    where = layout.positions(cp_rank, bias.device)
    if mask.documents is not None:
        starts = torch.tensor(mask.documents, device=bias.device)
        where = where - starts[torch.searchsorted(starts, where, right=True) - 1]
    codes = (where if code is None else code for code in (bias.code_q, bias.code_k))
    return replace(call, bias=replace(bias, **dict(zip(("code_q", "code_k"), codes, strict=True))))


def _attend(call: Call, mask: Mask, topology: Topology, layout: Layout, impl: str) -> tuple[Tensor, Tensor]:
    """Trade tokens for heads where the grid says so, go round the ring, trade back."""
    size = topology.ulysses.size
    exchange = None
    if size > 1:
        members = layout.within(topology.ring.rank * size, size)
        exchange = HeadExchange(topology.ulysses, members, call.num_heads)
        call = _to_heads(call, exchange)
    bias = call.bias
    plan = Plan(
        circle=topology.ring,
        layout=layout.together(size),
        mask=mask,
        scale=call.scale,
        deterministic=call.deterministic,
        ranks=None if bias is None or bias.ranks is None else tuple(bias.ranks),
        impl=impl,
    )
    out, lse = ring_attention(plan, call)
    if exchange is None:
        return out, lse
    out, rows = exchange.to_tokens(out, lse[..., None])
    return out, rows[..., 0]


def _to_heads(call: Call, exchange: HeadExchange) -> Call:
    """The same call for a part of the heads and the tokens of all ranks of the exchange."""
    bias = call.bias
    tensors = [call.query, call.key, call.value]
    if bias is not None:
        tensors += [bias.phi_q, bias.phi_k]
    if bias is not None and bias.table is not None:
        tensors += [code[None, :, None] for code in bias.codes()]
    query, key, value, *rest = exchange.to_heads(*tensors)
    if bias is not None:
        table, codes = None, [None, None]
        if bias.table is not None:
            table = bias.table[exchange.own_heads(bias.table.shape[0])]
            codes = [code.flatten() for code in rest[2:]]
        ranks = None if bias.ranks is None else tuple(bias.ranks)[exchange.own_heads(len(bias.ranks))]
        bias = FactoredBias(rest[0], rest[1], table, codes[0], codes[1], ranks)
    return replace(call, query=query, key=key, value=value, bias=bias)
