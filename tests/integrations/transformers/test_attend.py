"""How an embedding of buckets is read as a table."""

from __future__ import annotations

import torch
from torch import nn

from flashbias.integrations.transformers.attend import Buckets


class Read(nn.Module):
    """An embedding, and how it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2)
        self.buckets = Buckets(8, 16, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.buckets.table(self.embedding)


def test_an_embedding_that_an_evaluation_read_elsewhere_can_be_trained() -> None:
    """What is looked up is kept for the backward pass, which takes no tensor of inference mode."""
    model = Read().to("meta")
    with torch.inference_mode():
        model(torch.ones((), device="meta"))
    model(torch.ones((), device="meta")).sum().backward()
    assert model.embedding.weight.grad is not None


def test_an_export_elsewhere_leaves_plain_tensors() -> None:
    model = Read().to("meta")
    x = torch.ones((), device="meta")
    torch.export.export(model, (x,), strict=False)
    assert type(model(x)) is torch.Tensor
