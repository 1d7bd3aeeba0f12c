"""Heads spread over ranks (tensor parallel): attention needs no message, but a bias must know which heads it serves.

ALiBi's slopes, a table's rows and the ranks per head follow the *global* head index. A shard that works them out from
its own number of heads is wrong without any sign of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashbias.attention import attention
from flashbias.distributed.topology import Circle
from flashbias.factored import FactoredBias

__all__ = ["bias_of_heads", "head_parallel_attention", "local_heads"]


def local_heads(num_heads: int, mesh: DeviceMesh | None = None, *, group: dist.ProcessGroup | None = None) -> range:
    """Say which heads this rank holds when a head dimension is cut among ranks.

    Cut as `torch.chunk` and DTensor's `Shard` do. Families take them: `Alibi(num_heads, heads=local_heads(...))`.

    Args:
        num_heads: heads of the whole model.
        mesh: one-dimensional mesh of the ranks.
        group: a process group in place of a mesh; default all ranks.

    Returns:
        Global indices of the local heads.

    Raises:
        ValueError: fewer heads than ranks, or a mesh of more dimensions.

    Examples:
        >>> import torch, flashbias as fb, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> cp.local_heads(8)
        range(0, 8)
        >>> bias = fb.Alibi(num_heads=8, heads=cp.local_heads(8))
        >>> torch.distributed.destroy_process_group()
    """
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}; select it, as in mesh['tp']")
    chosen = mesh.get_group() if mesh is not None else group or dist.group.WORLD
    circle = Circle.of(chosen)  # pyright: ignore[reportArgumentType]
    length = -(-num_heads // circle.size)
    heads = range(min(circle.rank * length, num_heads), min((circle.rank + 1) * length, num_heads))
    if (circle.size - 1) * length >= num_heads:
        raise ValueError(f"num_heads must leave every one of {circle.size} ranks a head, got {num_heads}")
    return heads


def bias_of_heads(bias: FactoredBias, heads: Sequence[int]) -> FactoredBias:
    """Restrict a bias to some of its heads, by their global index.

    Args:
        bias: of all heads.
        heads: consecutive indices, such as `local_heads` says.

    Returns:
        A bias of `len(heads)` heads; what all heads share stays as it is. Views: nothing is copied, and gradients reach
        the whole bias.

    Raises:
        ValueError: indices that are empty, not consecutive, or not heads of the bias.

    Examples:
        >>> import torch, flashbias as fb, flashbias.distributed as cp
        >>> whole, part = fb.Alibi(num_heads=8)(4, 4), fb.Alibi(num_heads=8, heads=range(4, 6))(4, 4)
        >>> torch.equal(cp.bias_of_heads(whole, range(4, 6)).dense(), part.dense())
        True
    """
    chosen = list(heads)
    if not chosen or chosen != list(range(chosen[0], chosen[0] + len(chosen))):
        raise ValueError(f"heads must be consecutive indices, and at least one, got {chosen}")
    if bias.num_heads == 1:
        return bias
    if chosen[0] < 0 or chosen[-1] >= bias.num_heads:
        raise ValueError(f"heads must be indices into 0 … {bias.num_heads - 1}, got {chosen}")
    own = slice(chosen[0], chosen[-1] + 1)

    def cut(x: Tensor) -> Tensor:
        return x if x.shape[-3] == 1 else x[..., own, :, :]

    table = bias.table
    return replace(
        bias,
        phi_q=cut(bias.phi_q),
        phi_k=cut(bias.phi_k),
        table=table if table is None or table.shape[0] == 1 else table[own],
        ranks=None if bias.ranks is None else tuple(bias.ranks)[own],
    )


def head_parallel_attention(query: Any, key: Any, value: Any, bias: FactoredBias | None = None, **options: Any) -> Any:
    """Compute `attention` of DTensors that are cut by heads, each rank its own.

    Formula: that of `flashbias.attention`, head by head. Nothing is sent. DTensors know no rule for operators of a
    library, so this says what the rule is: outputs are cut as the queries are, and each rank takes its rows of the bias
    by the *global* head index.

    Args:
        query: DTensor `[*batch, H, N, head_dim]` with the placement `Shard` on dimension -3, or replicated, on every
            dimension of its mesh.
        key: likewise `[*batch, H_kv, M, head_dim]`, with the same placements.
        value: likewise.
        bias: of all H heads, plain tensors, the same on every rank. Its gradient is the part that the rank's own heads
            make; DDP, FSDP or an all-reduce adds them.
        **options: the keywords of `flashbias.attention`, but for `attn_mask` and `return_lse`.

    Returns:
        DTensor `[*batch, H, N, head_dim_v]`, placed as the queries are.

    Raises:
        TypeError: query, key or value is not a DTensor.
        ValueError: placements that are not equal, or cut another dimension; heads that do not divide.
        NotImplementedError: `attn_mask` or `return_lse` was given.

    Examples:
        >>> import torch, flashbias as fb, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> q, k, v = (distribute_tensor(x, mesh, [Shard(0)]) for x in torch.randn(3, 4, 16, 8))
        >>> cp.head_parallel_attention(q, k, v, fb.Alibi(num_heads=4)(16, 16), is_causal=True).shape
        torch.Size([4, 16, 8])
        >>> torch.distributed.destroy_process_group()
    """
    # Loading DTensor takes as long as loading the rest of the library.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for name in ("attn_mask", "return_lse"):
        if options.get(name):
            raise NotImplementedError(f"{name} cannot be used with DTensors; call flashbias.attention on local tensors")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor, got {type(x)}; flashbias.attention takes plain tensors")
        if x.device_mesh != query.device_mesh or x.placements != query.placements:
            raise ValueError(f"{name} is placed {x.placements} and query {query.placements}; must be equal")
        for placement in x.placements:
            if placement not in (Replicate(), Shard(x.dim() - 3)):
                raise ValueError(f"{name} must be cut by heads, Shard({x.dim() - 3}), or replicated, got {placement!r}")
    mesh, num_heads = query.device_mesh, query.shape[-3]
    parts, index = 1, 0
    for dim, placement in enumerate(query.placements):
        if placement != Replicate():
            parts, index = parts * mesh.size(dim), index * mesh.size(dim) + mesh.get_local_rank(dim)
    if num_heads % parts or key.shape[-3] % parts:
        raise ValueError(
            f"heads must divide by the {parts} ranks that share them, got {num_heads} of query and {key.shape[-3]} of "
            "key"
        )
    length = num_heads // parts
    heads = range(index * length, (index + 1) * length)
    own = None if bias is None else bias_of_heads(bias, heads)
    out = attention(query.to_local(), key.to_local(), value.to_local(), own, **options)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return DTensor.from_local(out, mesh, query.placements, run_check=False)
