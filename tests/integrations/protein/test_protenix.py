"""Attentions of Protenix with random weights: the package's own classes, unpatched and patched."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tests.integrations.protein.suite import (
    CHANNELS,
    HEADS,
    LENGTH,
    WIDTH,
    InnerSuite,
    ReusedSuite,
    TriangleSuite,
    check_block,
    fill,
    relative,
    smooth_pairs,
    tokens,
)
from torch import Tensor, nn

from flashbias.integrations import patch, supports

pytest.importorskip("protenix", reason="`make protein` installs it")
# Its own layer norm is compiled for CUDA when it is imported, unless the environment says otherwise.
os.environ.setdefault("LAYERNORM_TYPE", "torch")

from protenix.model.modules.pairformer import PairformerBlock
from protenix.model.modules.transformer import AtomTransformer, AttentionPairBias
from protenix.model.triangular.triangular import TriangleAttention, TriangleAttentionEndingNode


class TestStartingNode(TriangleSuite):
    family = "Protenix triangle"
    cls: Any = TriangleAttention

    def make(self) -> nn.Module:
        return fill(self.cls(CHANNELS, WIDTH, HEADS))

    def test_kernels_are_not_needed(self) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = self.seen(model(**given))
            patch(model, tol=1e-4)
            found = model(**given, triangle_attention="cuequivariance", inplace_safe=True)
            assert relative(self.seen(found), expected) < 2e-4


class TestEndingNode(TestStartingNode):
    cls = TriangleAttentionEndingNode


class TestTrunk(InnerSuite):
    family = "Protenix pair bias"
    inner = "attention"
    is_masked = False
    has_s = False

    def make(self) -> nn.Module:
        return fill(AttentionPairBias(self.has_s, n_heads=HEADS, c_a=CHANNELS, c_s=CHANNELS, c_z=CHANNELS))

    def inputs(self, pairs: Any) -> dict[str, Any]:
        return {"a": tokens(2), "s": None, "z": pairs(2)}

    def bias_parameters(self, model: Any) -> list[nn.Parameter]:
        return [*model.layernorm_z.parameters(), *model.linear_nobias_z.parameters()]


class TestDiffusion(TestTrunk, ReusedSuite):
    has_s = True

    def inputs(self, pairs: Any) -> dict[str, Any]:
        """Three samples for each of two proteins, of one bias."""
        samples = tokens(6).unflatten(0, (2, 3))
        return {"a": samples, "s": samples.flip(-1), "z": pairs(2, 1)}

    def test_fused_bias(self) -> None:
        """The model folds the norm of the pairs into the projection, pairs come with their channels first."""
        model, given = self.make(), self.inputs(smooth_pairs)
        given = {"a": given["a"][0], "s": given["s"][0], "z": smooth_pairs(1).movedim(-1, 1)}
        with torch.no_grad():
            expected = model(**given, enable_efficient_fusion=True)
            patch(model, tol=1e-4)
            assert 0 < relative(model(**given, enable_efficient_fusion=True), expected) < 2e-4


def test_windows_of_atoms_are_left() -> None:
    sizes = {"c_atom": CHANNELS, "c_atompair": CHANNELS, "n_blocks": 2, "n_heads": HEADS}
    report = supports(nn.ModuleDict({"atoms": AtomTransformer(**sizes)}))
    assert [entry.note for entry in report.left] == ["windows of atoms, too small for factors"] * 2


def test_windows_outside_of_an_atom_transformer_are_left_to_the_model() -> None:
    model = fill(AttentionPairBias(n_heads=HEADS, c_a=CHANNELS, c_s=CHANNELS, c_z=CHANNELS))
    a: Tensor = tokens(1)
    z = torch.randn(1, 4, 32, 128, CHANNELS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(a, a, z, n_queries=32, n_keys=128)
        patch(model)
        assert torch.equal(model(a, a, z, n_queries=32, n_keys=128), expected)


@pytest.mark.parametrize("chunk", [None, 64])
def test_a_block_of_the_pairformer(chunk: int | None) -> None:
    """Without padding, since its single attention has no mask."""
    block = fill(PairformerBlock(HEADS, CHANNELS, CHANNELS, CHANNELS, WIDTH, HEADS, 2))
    given = {"s": tokens(1), "z": smooth_pairs(1), "pair_mask": None, "chunk_size": chunk}
    given["inplace_safe"] = chunk is not None
    check_block(block, given, ["Protenix triangle"] * 2 + ["Protenix pair bias"], LENGTH)
