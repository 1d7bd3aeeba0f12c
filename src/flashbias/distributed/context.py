"""`context_parallel`: an unchanged model whose calls of `flashbias.attention` span ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashbias.attention import redirect
from flashbias.distributed.agreement import refuse
from flashbias.distributed.api import context_parallel_attention
from flashbias.distributed.shard import Layout, local_rows, unshard
from flashbias.distributed.topology import Topology
from flashbias.factored import FactoredBias

__all__ = ["ContextParallel", "context_parallel"]


@contextmanager
def context_parallel(
    mesh: DeviceMesh | None = None,
    *,
    seqlen: int,
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    order: str = "contiguous",
    impl: str = "auto",
    table_grad: str = "local",
    check: bool = True,
) -> Iterator[ContextParallel]:
    """Make every call of `flashbias.attention` in this process attend across ranks.

    The model stays as it is: it is given its rank's tokens, and the positions of these tokens where it wants
    positions. Its biases may be of the local tokens (made from `positions`), or of the whole sequence (then the rows of
    this rank are taken). Everything else in the model works on tokens one by one and needs no change.

    The context holds for the whole process, all threads included. Forward and backward pass belong inside: activation
    checkpointing calls the attention again.

    Args:
        mesh: as in `context_parallel_attention`.
        seqlen: tokens of the whole sequence, N.
        group: as in `context_parallel_attention`.
        strategy: as in `context_parallel_attention`.
        order: as in `context_parallel_attention`.
        impl: of calls that leave it open.
        table_grad: as in `context_parallel_attention`. "local" treats a table as all other parameters are treated: each
            rank has the part of the gradient that its own tokens make, and DDP, FSDP or an all-reduce adds them.
        check: as in `context_parallel_attention`.

    Yields:
        A `ContextParallel`, which cuts tensors and says positions.

    Raises:
        RuntimeError: such a context is open already.
        ValueError: as in `context_parallel_attention`.

    Examples:
        >>> import torch, flashbias as fb, flashbias.distributed as cp
        >>> store = torch.distributed.HashStore()  # torchrun does this for many ranks; here there is one
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> tokens, bias = torch.randn(1, 4, 16, 8), fb.Alibi(num_heads=4)(16, 16)
        >>> with cp.context_parallel(seqlen=16, order="zigzag") as shards:
        ...     x = shards.shard(tokens)
        ...     out = shards.unshard(fb.attention(x, x, x, bias, is_causal=True))
        >>> torch.allclose(out, fb.attention(tokens, tokens, tokens, bias, is_causal=True), atol=1e-6)
        True
        >>> torch.distributed.destroy_process_group()
    """
    topology = Topology.of(mesh, group)
    layout = Layout.of(seqlen, topology.cp_size, order)
    shared = {"mesh": mesh, "group": group, "strategy": strategy, "order": order}
    options = {**shared, "table_grad": table_grad, "check": check}
    context = ContextParallel(topology, layout, impl, options)
    with redirect.to(context):
        yield context


@dataclass(frozen=True)
class ContextParallel:
    """An open context.

    Attributes:
        topology: the ranks.
        layout: which of them holds which tokens.
        impl: of calls that leave it open.
        options: what every call of `context_parallel_attention` is given.
    """

    topology: Topology
    layout: Layout
    impl: str
    options: dict[str, Any]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Where this rank's tokens stand in the whole sequence, int64 `[n]`."""
        return self.layout.positions(self.topology.cp_rank, device)

    def shard(self, x: Tensor, dim: int = -2) -> Tensor:
        """This rank's part of a tensor that every rank holds whole."""
        if x.shape[dim] != self.layout.seqlen:
            raise ValueError(f"dimension {dim} must be the whole sequence, {self.layout.seqlen}, got {tuple(x.shape)}")
        return self.layout.cut(x, self.topology.cp_rank, dim)

    def unshard(self, x: Tensor, dim: int = -2) -> Tensor:
        """The whole tensor, gathered on every rank; not differentiable."""
        return unshard(x, self.options["mesh"], group=self.options["group"], dim=dim, order=self.options["order"])

    # ---------------------------------------------------------------- in place of flashbias.attention

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Any,
        *,
        causal_alignment: str | None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend across ranks; arguments as those of `flashbias.attention`.

        Alignments differ where keys are not those of the queries' tokens, which here they always are.
        """
        return self._attend(query, key, value, bias, None, **options)

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        bias: Any,
        *,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        causal_alignment: str | None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend across ranks; `cu_seqlens` are boundaries in the whole sequence."""
        with self._telling_others(query):
            for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
                if not isinstance(cu, Tensor):
                    raise TypeError(f"{name} must be an int32 tensor, got {type(cu)}")
            if not torch.equal(cu_seqlens_q, cu_seqlens_k):
                raise NotImplementedError("under context_parallel, cu_seqlens_q and cu_seqlens_k must be equal")
        q, k, v = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        result = self._attend(q, k, v, bias, cu_seqlens_q, attn_mask=None, **options)
        if isinstance(result, tuple):
            return result[0].transpose(0, 1), result[1].transpose(0, 1)
        return result.transpose(0, 1)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Any,
        cu_seqlens: Tensor | None,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        impl: str,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        with self._telling_others(query):
            self._check(query, bias, attn_mask, dropout_p, impl)
        if bias is not None and bias.seqlen_q == bias.seqlen_k == self.layout.seqlen:
            bias = local_rows(bias, self.layout, self.topology.cp_rank)
        return context_parallel_attention(
            query,
            key,
            value,
            bias,
            cu_seqlens=cu_seqlens,
            seqlen=self.layout.seqlen,
            impl=self.impl if impl == "auto" else impl,
            **options,
            **self.options,
        )

    @contextmanager
    def _telling_others(self, query: Tensor) -> Iterator[None]:
        """Tell the other ranks of an error: they would wait for this one until the process group's timeout."""
        try:
            yield
        except Exception:
            if self.options["check"]:
                refuse(self.topology, query.device if isinstance(query, Tensor) else torch.device("cpu"))
            raise

    def _check(self, query: Tensor, bias: Any, attn_mask: Tensor | None, dropout_p: float, impl: str) -> None:
        """Refuse what cannot span ranks, and a query that is not this rank's part."""
        for name, given in (("attn_mask", attn_mask is not None), ("dropout_p", dropout_p != 0.0)):
            if given:
                raise NotImplementedError(f"{name} cannot be used under context_parallel; leave it out")
        if bias is not None and not isinstance(bias, FactoredBias):
            raise NotImplementedError(f"bias must be a FactoredBias under context_parallel, got {type(bias)}")
        if impl == "sdpa":
            raise NotImplementedError("impl='sdpa' gives no log-sum-exp to merge blocks by; use 'auto' or 'reference'")
        if not isinstance(query, Tensor) or query.dim() < 3:
            return  # as everywhere: `context_parallel_attention` says what is wrong with it
        own = self.layout.sizes[self.topology.cp_rank]
        if query.shape[-2] != own:
            raise ValueError(
                f"query has {query.shape[-2]} tokens; under context_parallel rank {self.topology.cp_rank} holds {own} "
                f"of {self.layout.seqlen}"
            )
