"""Attentions of Boltz-1 and Boltz-2 with random weights: the package's own classes, unpatched and patched."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.integrations.protein.suite import (
    CHANNELS,
    HEADS,
    LENGTH,
    WIDTH,
    PairSuite,
    ReusedSuite,
    TriangleSuite,
    check_block,
    fill,
    relative,
    rough_pairs,
    smooth_pairs,
    tokens,
    valid,
)
from torch import Tensor, nn

from flashbias.integrations import patch, supports

pytest.importorskip("boltz", reason="`make protein` installs it")

from boltz.model.layers import attention as boltz1
from boltz.model.layers import attentionv2 as boltz2
from boltz.model.layers import pairformer
from boltz.model.layers.triangular_attention.attention import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
)
from boltz.model.modules import transformers, transformersv2, trunk


class TestStartingNode(TriangleSuite):
    family = "Boltz triangle"
    cls: Any = TriangleAttentionStartingNode

    def make(self) -> nn.Module:
        return fill(self.cls(CHANNELS, WIDTH, HEADS))

    def test_kernels_are_not_needed(self) -> None:
        """With factors, the choice of a kernel that is not installed makes no difference."""
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = self.seen(model(**given))
            patch(model, tol=1e-4)
            assert relative(self.seen(model(**given, use_kernels=True)), expected) < 2e-4


class TestEndingNode(TestStartingNode):
    cls = TriangleAttentionEndingNode


class TokenSuite(PairSuite):
    """Three samples for each of two proteins."""

    multiplicity = 1

    def inputs(self, pairs: Any) -> dict[str, Any]:
        mask = valid(2).repeat_interleave(self.multiplicity, 0)
        return {"s": tokens(2 * self.multiplicity), "z": pairs(2), "mask": mask, "multiplicity": self.multiplicity}

    def seen(self, out: Tensor) -> Tensor:
        return out[:, : int(valid(2).sum(-1).min())]

    def bias_parameters(self, model: Any) -> list[nn.Parameter]:
        return list(model.proj_z.parameters())


class TestBoltz1Trunk(TokenSuite):
    family = "Boltz-1 pair bias"

    def make(self) -> nn.Module:
        return fill(boltz1.AttentionPairBias(CHANNELS, CHANNELS, HEADS))


class TestBoltz1Diffusion(TokenSuite, ReusedSuite):
    family = "Boltz-1 pair bias"
    multiplicity = 3

    def make(self) -> nn.Module:
        return fill(boltz1.AttentionPairBias(CHANNELS, CHANNELS, HEADS, initial_norm=False))

    @pytest.mark.parametrize("pairs", [smooth_pairs, rough_pairs], ids=["factors", "own"])
    def test_the_cache_of_the_model(self, pairs: Any) -> None:
        model, given = self.make(), self.inputs(pairs)
        with torch.no_grad():
            expected = self.seen(model(**given))
            patch(model, tol=1e-4)
            cache: dict[str, Tensor] = {}
            assert relative(self.seen(model(**given, model_cache=cache)), expected) < 2e-4
            assert cache["z"].shape == (2, HEADS, LENGTH, LENGTH)
            given["z"] = torch.zeros(())
            assert relative(self.seen(model(**given, model_cache=cache)), expected) < 2e-4


class TestBoltz2Trunk(TokenSuite):
    family = "Boltz-2 pair bias"

    def make(self) -> nn.Module:
        return fill(boltz2.AttentionPairBias(CHANNELS, CHANNELS, HEADS))

    def inputs(self, pairs: Any) -> dict[str, Any]:
        given = super().inputs(pairs)
        return {**given, "k_in": given["s"].flip(-1)}


class TestBoltz2Diffusion(TestBoltz2Trunk, ReusedSuite):
    multiplicity = 3

    def make(self) -> nn.Module:
        return fill(boltz2.AttentionPairBias(CHANNELS, num_heads=HEADS, compute_pair_bias=False))

    def inputs(self, pairs: Any) -> dict[str, Any]:
        def heads(*batch: int) -> Tensor:
            return pairs(*batch, channels=HEADS) if pairs in (smooth_pairs, rough_pairs) else pairs(*batch)[..., :HEADS]

        return super().inputs(heads)


def test_one_bias_for_all_samples() -> None:
    """A batch of one bias broadcasts to the samples, as in the model's own code."""
    model = fill(boltz2.AttentionPairBias(CHANNELS, CHANNELS, HEADS))
    s = tokens(3)
    given = {"s": s, "k_in": s, "z": smooth_pairs(1), "mask": valid(1)}
    with torch.no_grad():
        expected = model(**given)
        patch(model, tol=1e-4)
        assert 0 < relative(model(**given), expected) < 2e-4


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("chunk", [None, 64])
def test_a_block_of_the_pairformer(version: int, chunk: int | None) -> None:
    make: Any = trunk.PairformerLayer if version == 1 else partial(pairformer.PairformerLayer, v2=True)
    block = make(CHANNELS, CHANNELS, HEADS, 0.25, WIDTH, HEADS)
    keep = valid(1)
    masks = {"mask": keep, "pair_mask": keep[:, :, None] * keep[:, None]}
    given = {"s": tokens(1), "z": smooth_pairs(1), **masks, "chunk_size_tri_attn": chunk}
    check_block(fill(block), given, ["Boltz triangle"] * 2 + [f"Boltz-{version} pair bias"], int(keep.sum()))


@pytest.mark.parametrize("module", [transformers, transformersv2], ids=["boltz1", "boltz2"])
def test_windows_of_atoms_are_left(module: Any) -> None:
    more = {"dim_pairwise": CHANNELS} if module is transformers else {}
    model = module.AtomTransformer(32, 128, depth=2, heads=HEADS, dim=CHANNELS, dim_single_cond=CHANNELS, **more)
    report = supports(nn.ModuleDict({"atoms": model}))
    assert [entry.note for entry in report.left] == ["windows of atoms, too small for factors"] * 2
    assert len(report) == 2


@pytest.mark.parametrize("version", [1, 2])
def test_keys_of_other_places_are_left_to_the_model(version: int) -> None:
    """The same attention outside of an AtomTransformer, called for a window of keys."""
    module = boltz1 if version == 1 else boltz2
    model = fill(module.AttentionPairBias(CHANNELS, CHANNELS, HEADS))
    s, z, mask = tokens(2), smooth_pairs(2)[:, :, :40], valid(2)

    def to_keys(x: Tensor) -> Tensor:
        return x[:, :40]

    more = {"to_keys": to_keys, "mask": mask} if version == 1 else {"k_in": to_keys(s), "mask": to_keys(mask)}
    with torch.no_grad():
        expected = model(s, z, **more)
        patch(model)
        assert torch.equal(model(s, z, **more), expected)
