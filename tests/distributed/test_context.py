"""An unchanged model whose attention spans ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.distributed.problem import grid
from tests.distributed.ranks import Place, Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import flashbias as fb
import flashbias.distributed as cp
from flashbias.attention import redirect

N, WIDTH, HEADS, VOCABULARY = 22, 12, 4, 11


class Layer(nn.Module):
    """Two biases: ALiBi from positions, and a learned table that is read by position."""

    def __init__(self) -> None:
        super().__init__()
        self.alibi = fb.Alibi(HEADS)
        self.buckets = fb.RelativeBuckets(HEADS, num_buckets=8, max_distance=12)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        n = x.shape[-2]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = fb.attention(q, k, v, self.alibi.at(position, position), is_causal=True)
        y = y + fb.attention(q, k, v, self.buckets(n, n))
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, is_checkpointed: bool = False, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_checkpointed = is_checkpointed
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, position, use_reentrant=False) if self.is_checkpointed else layer(x, position)
        return x.square().sum(-1)


def tokens() -> Tensor:
    return torch.arange(2 * N).reshape(2, N) * 7 % VOCABULARY


def alone(depth: int = 2) -> dict[str, Tensor]:
    """Loss and gradients of one process."""
    model = Model(depth=depth).double()
    loss = (model(tokens(), torch.arange(N)) * torch.arange(N)).sum() / N
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(x: Tensor) -> Tensor:
    """All of a gradient that is spread over ranks, on the device where they exchange it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread(model: nn.Module, place: Place, **options: Any) -> dict[str, Tensor]:
    """Loss of all ranks; gradients as the wrapper, or nobody, has added them up."""
    where = {"mesh": grid(place, (2, 2))} if options.pop("is_grid", False) else {"group": place.group}
    with cp.context_parallel(seqlen=N, **where, **options) as shards:
        position = shards.positions(place.device)
        loss = (model(shards.shard(tokens().to(place.device), dim=1), position) * position).sum() / N
        loss.backward()
    assert redirect.target is None
    return {"loss": loss.detach().cpu()} | {
        name.removeprefix("module.").removeprefix("_orig_mod."): whole(p.grad).cpu()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_sum(parts: list[dict[str, Tensor]], depth: int = 2) -> None:
    """Losses and gradients of the ranks add up to those of one process."""
    for name, right in alone(depth).items():
        found = sum(part[name] for part in parts)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def plain(place: Place, is_checkpointed: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    return spread(Model(is_checkpointed).double().to(place.device), place, **options)


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ring", "order": "zigzag"},
        {"strategy": "ring"},
        {"strategy": "ulysses"},
        {"is_grid": True, "order": "zigzag"},
    ],
    ids=["ring-zigzag", "ring", "ulysses", "grid"],
)
def test_model(ranks: Ranks, is_checkpointed: bool, options: dict[str, Any]) -> None:
    assert_sum(ranks.results(plain, is_checkpointed, options, size=4))


def wrapped(place: Place, wrapper: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = Model(is_checkpointed=True).double().to(place.device)
    if wrapper == "ddp":
        return spread(DistributedDataParallel(model, process_group=place.group), place, strategy="ring")
    mesh = DeviceMesh.from_group(place.group, place.device.type)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return spread(model, place, strategy="ring")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrappers_average_gradients(ranks: Ranks, wrapper: str) -> None:
    """Each rank ends with the mean over ranks of what its own tokens make, the tables' gradients included."""
    for part in (parts := ranks.results(wrapped, wrapper, size=2)):
        for name, right in alone().items():
            if name != "loss":
                torch.testing.assert_close(2 * part[name], right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(part["loss"] for part in parts), alone()["loss"])


def compiled(place: Place, backend: str) -> list[dict[str, Tensor]]:
    """In a context, out of it, and once more: the graph breaks at attention, and guards notice the context."""
    torch._dynamo.reset()
    model = Model(depth=1).double().to(place.device)
    fast = torch.compile(model, backend=backend)
    whole = tokens().to(place.device), torch.arange(N, device=place.device)
    right = model(*whole)
    results = []
    for _ in range(2):
        model.zero_grad()
        results.append(spread(fast, place, strategy="ring"))
        torch.testing.assert_close(fast(*whole), right)
    return [{name: x.clone() for name, x in result.items()} for result in results]


def test_compiled_model(ranks: Ranks) -> None:
    for parts in zip(*ranks.results(compiled, "eager", size=2), strict=True):
        assert_sum(list(parts), depth=1)


def whole_bias(place: Place) -> tuple[Tensor, Tensor]:
    """A bias of the whole sequence is cut; packed documents go by their boundaries in the whole."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, HEADS, N, 4)
    bias = fb.Alibi(HEADS, symmetric=True)(N, N)
    cu = torch.tensor([0, 9, N], dtype=torch.int32)
    right = fb.attention(q, k, v, bias, return_lse=True, impl="reference")
    packed = fb.varlen_attention(*(x.transpose(0, 1) for x in (q, k, v)), cu, cu, bias, is_causal=True)
    with cp.context_parallel(group=place.group, seqlen=N, order="zigzag") as shards:
        parts = [shards.shard(x) for x in (q, k, v)]
        out, lse = fb.attention(*parts, bias, return_lse=True)
        torch.testing.assert_close(shards.unshard(out), right[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shards.unshard(lse, dim=-1), right[1], rtol=1e-5, atol=1e-5)
        found = fb.varlen_attention(*(x.transpose(0, 1) for x in parts), cu, cu, bias, is_causal=True)
        return shards.unshard(found, dim=0), packed


def test_biases_of_the_whole_sequence_are_cut(ranks: Ranks) -> None:
    for found, right in ranks.results(whole_bias, size=3):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def refusals(place: Place) -> list[str]:
    x, messages = torch.randn(HEADS, 8, 4), []
    calls = [
        lambda: fb.attention(x, x, x, attn_mask=torch.ones(8, 8, dtype=torch.bool)),
        lambda: fb.attention(x, x, x, dropout_p=0.1),
        lambda: fb.attention(x, x, x, impl="sdpa"),
        lambda: fb.attention(x, x, x, fb.MixedBias((torch.zeros(HEADS, 8, 8),), (tuple(range(HEADS)),))),
        lambda: fb.attention(x[:, :5], x, x),
        lambda: shards.shard(x, dim=1),
        lambda: cp.context_parallel(seqlen=4).__enter__(),
        lambda: fb.varlen_attention(*(x.transpose(0, 1),) * 3, torch.tensor([0, 8]), torch.tensor([0, 4])),
    ]
    with cp.context_parallel(group=place.group, seqlen=16) as shards:
        for call in calls:
            try:
                call()
            except (NotImplementedError, ValueError, RuntimeError) as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_what_a_context_cannot_do(ranks: Ranks) -> None:
    for messages in ranks.results(refusals, size=2):
        for message, part in zip(
            messages,
            [
                "NotImplementedError: attn_mask cannot",
                "NotImplementedError: dropout_p cannot",
                "NotImplementedError: impl='sdpa'",
                "NotImplementedError: bias must be a FactoredBias",
                "ValueError: query has 5 tokens; under context_parallel rank",
                "ValueError: dimension 1 must be the whole sequence, 16",
                "RuntimeError: calls of the attention go to ContextParallel already",
                "NotImplementedError: under context_parallel, cu_seqlens_q and cu_seqlens_k must be equal",
            ],
            strict=True,
        ):
            assert message.startswith(part), message


def one_refuses(place: Place, change: str) -> str:
    """Rank 1 calls what a context cannot do; all go on with a call that it can."""
    x, is_odd = torch.randn(HEADS, 8, 4), place.rank == 1
    bounds = torch.tensor([0, 16], dtype=torch.int32)
    with cp.context_parallel(group=place.group, seqlen=16):
        try:
            if change == "tokens":
                fb.attention(x[:, :5] if is_odd else x, x, x)
            elif change == "mask":
                fb.attention(x, x, x, attn_mask=torch.ones(8, 8, dtype=torch.bool) if is_odd else None)
            else:
                other = torch.tensor([0, 4, 16], dtype=torch.int32) if is_odd else bounds
                fb.varlen_attention(*(x.transpose(0, 1),) * 3, bounds, other)
        except (NotImplementedError, ValueError) as error:
            fb.attention(x, x, x)
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("change", ["tokens", "mask", "bounds"])
def test_a_rank_that_refuses_tells_the_others(ranks: Ranks, change: str) -> None:
    """They need not wait for it until the timeout of their process group."""
    own = {"tokens": "ValueError: query has 5 tokens", "mask": "NotImplementedError: attn_mask cannot"}
    others, refused = ranks.results(one_refuses, change, size=2)
    assert others.startswith("DisagreementError: rank 1 refused its own arguments")
    assert refused.startswith(own.get(change, "NotImplementedError: under context_parallel, cu_seqlens_q"))


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="no process group"):
        cp.positions(4)
