"""Train a small ALiBi GPT on one sequence that is spread over ranks, and compare with one process.

    torchrun --standalone --nproc-per-node 2 examples/context_parallel.py
    torchrun --standalone --nproc-per-node 8 examples/context_parallel.py --seqlen 131072 --width 2048 --heads 16

The model knows nothing of ranks: it is given tokens and their positions, and calls `flashbias.attention`. Every rank
trains on its own tokens; DistributedDataParallel averages the gradients, as it does for batches. On GPUs through NCCL.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flashbias as fb
import flashbias.distributed as cp


class Block(nn.Module):
    """Causal attention with linear biases, then a perceptron."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.alibi = fb.Alibi(num_heads)
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """From `[batch, tokens, width]` and the positions of these tokens to `[batch, tokens, width]`."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = fb.attention(q, k, v, self.alibi.at(position, position), is_causal=True)
        assert isinstance(y, Tensor)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Tokens and their positions to logits."""

    def __init__(self, vocabulary: int, width: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """From `[batch, tokens]` to `[batch, tokens, vocabulary]`."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, position)
        return self.head(self.norm(x))


def data(arguments: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """A text to learn, and what follows each of its tokens; the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(arguments.vocabulary, (1, arguments.seqlen + 1), generator=generator).to(device)
    return text[:, :-1], text[:, 1:]


def build(arguments: argparse.Namespace, device: torch.device) -> GPT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return GPT(arguments.vocabulary, arguments.width, arguments.heads, arguments.depth).to(device)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Summed over tokens, so that ranks with more of them count for more."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")


def train_on_ranks(arguments: argparse.Namespace, device: torch.device) -> list[float]:
    """Losses of the steps, the sequence spread over all ranks."""
    tokens, target = data(arguments, device)
    size = dist.get_world_size()
    model = DistributedDataParallel(build(arguments, device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with cp.context_parallel(seqlen=arguments.seqlen, strategy=arguments.strategy, order="zigzag") as shards:
        own_tokens, own_target = shards.shard(tokens, dim=1), shards.shard(target, dim=1)
        position = shards.positions(device)
        for _ in range(arguments.steps):
            # DDP takes the mean over ranks; the mean over tokens is meant.
            loss = cross_entropy(model(own_tokens, position), own_target) / arguments.seqlen
            optimizer.zero_grad()
            (loss * size).backward()
            optimizer.step()
            dist.all_reduce(total := loss.detach().clone())
            losses.append(total.item())
    return losses


def train_alone(arguments: argparse.Namespace, device: torch.device) -> list[float]:
    """Losses of the same steps in one process."""
    tokens, target = data(arguments, device)
    model = build(arguments, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(arguments.steps):
        loss = cross_entropy(model(tokens, torch.arange(arguments.seqlen, device=device)), target) / arguments.seqlen
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=250, help="tokens of the whole sequence")
    parser.add_argument("--width", type=int, default=32, help="width of the model")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--depth", type=int, default=2, help="layers")
    parser.add_argument("--vocabulary", type=int, default=50, help="different tokens")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--strategy", default="ring", help="ring, ulysses or auto")
    parser.add_argument("--no-comparison", action="store_true", help="do not train in one process too")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("there are no ranks: start it with torchrun, as --help says")

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)
    spread = train_on_ranks(arguments, device)
    if dist.get_rank() == 0:
        alone = [float("nan")] * len(spread) if arguments.no_comparison else train_alone(arguments, device)
        print(f"{arguments.seqlen} tokens over {dist.get_world_size()} ranks ({arguments.strategy}) and in one process")
        for step, (a, b) in enumerate(zip(spread, alone, strict=True)):
            print(f"step {step}: loss {a:.6f} and {b:.6f}")
        worst = max(abs(a - b) for a, b in zip(spread, alone, strict=True))
        if worst > 1e-4:
            raise SystemExit(f"losses differ by {worst:.2g}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
