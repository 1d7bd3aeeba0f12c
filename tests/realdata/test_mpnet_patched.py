"""all-mpnet-base-v2 patched: sentence embeddings of real text, against the model as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbias.integrations import call, patch, unpatch

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]

TEXT = Path(__file__).with_name("lincoln.txt")


@pytest.fixture(scope="module")
def model(mpnet_folder: Path) -> Any:
    from transformers import MPNetModel

    return MPNetModel.from_pretrained(mpnet_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch(mpnet_folder: Path) -> Any:
    """Sentences of different lengths and the beginning of the text: one padded batch."""
    from transformers import AutoTokenizer

    text = " ".join(TEXT.read_text().split())
    sentences = sorted(re.split(r"(?<=[.?]) ", text), key=len)
    tokens = AutoTokenizer.from_pretrained(mpnet_folder)(
        [*sentences[:: len(sentences) // 3], text], padding=True, truncation=True, max_length=144, return_tensors="pt"
    )
    lengths = tokens["attention_mask"].sum(-1).tolist()
    assert len(set(lengths)) >= 4, lengths
    assert min(lengths) < 16
    assert max(lengths) == 144, "beyond the largest distance that has a bucket of its own"
    return tokens


def embed(model: Any, batch: Any) -> Tensor:
    """The model card's embedding: the mean over the tokens, normalised."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    keep = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)


@pytest.fixture(scope="module")
def expected(model: Any, batch: Any) -> Tensor:
    return embed(model, batch)


def test_embeddings_keep_their_direction(model: Any, batch: Any, expected: Tensor) -> None:
    report = patch(model)
    try:
        found = embed(model, batch)
    finally:
        unpatch(model)
    assert len(report.replaced) == 12
    assert report.certificate == 0.0
    assert (found.double() * expected.double()).sum(-1).min() >= 0.999999
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_unpatched_embeddings_are_the_same_bits(model: Any, batch: Any, expected: Tensor) -> None:
    patch(model)
    unpatch(model)
    assert torch.equal(embed(model, batch), expected)


def test_without_its_bias_the_direction_is_another(
    model: Any, batch: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the first test is not passed by attention alone."""
    original = call.attention
    monkeypatch.setattr(call, "attention", lambda q, k, v, bias, **options: original(q, k, v, None, **options))
    patch(model)
    try:
        assert (embed(model, batch) * expected).sum(-1).min() < 0.9
    finally:
        unpatch(model)
