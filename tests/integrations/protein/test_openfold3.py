"""Attentions of OpenFold3 with random weights: the package's own classes, unpatched and patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integrations.protein.suite import (
    CHANNELS,
    HEADS,
    WIDTH,
    InnerSuite,
    ReusedSuite,
    TriangleSuite,
    check_block,
    fill,
    relative,
    smooth_pairs,
    tokens,
    valid,
)
from torch import Tensor, nn

from flashbias.integrations import patch, supports

pytest.importorskip("openfold3", reason="`make protein` installs it")

from openfold3.core.model.latent.pairformer import PairFormerBlock
from openfold3.core.model.layers import attention_pair_bias as layers
from openfold3.core.model.layers.triangular_attention import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
)

SIZES = {"c_q": CHANNELS, "c_k": CHANNELS, "c_v": CHANNELS, "c_s": CHANNELS, "c_z": CHANNELS}


class TestStartingNode(TriangleSuite):
    family = "OpenFold3 triangle"
    cls: Any = TriangleAttentionStartingNode

    def make(self) -> nn.Module:
        return fill(self.cls(CHANNELS, WIDTH, HEADS))

    def projection(self, model: Any) -> nn.Module:
        return model.linear_z

    def test_transposed_bias(self) -> None:
        model, given = self.make(), {**self.inputs(smooth_pairs), "transpose_bias": True}
        with torch.no_grad():
            expected = self.seen(model(**given))
            other = self.seen(model(**self.inputs(smooth_pairs)))
            patch(model, tol=1e-4)
            assert 0 < relative(self.seen(model(**given)), expected) < 2e-4
        assert relative(other, expected) > 1e-2

    def test_templates(self) -> None:
        """One dimension more."""
        model, pairs = self.make(), smooth_pairs(2, 3)
        with torch.no_grad():
            expected = model(pairs)
            patch(model, tol=1e-4)
            assert 0 < relative(model(pairs), expected) < 2e-4

    def test_kernels_are_not_needed(self) -> None:
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = self.seen(model(**given))
            patch(model, tol=1e-4)
            found = model(**given, use_deepspeed_evo_attention=True, inplace_safe=True)
            assert relative(self.seen(found), expected) < 2e-4


class TestEndingNode(TestStartingNode):
    cls = TriangleAttentionEndingNode


class TestPairBias(InnerSuite):
    family = "OpenFold3 pair bias"
    bias_layers = ("layer_norm_z", "linear_z")

    def make(self) -> nn.Module:
        return fill(layers.AttentionPairBias(**SIZES, c_hidden=WIDTH, no_heads=HEADS))

    def inputs(self, pairs: Any) -> dict[str, Any]:
        return {"a": tokens(2), "z": pairs(2), "mask": valid(2)}

    def seen(self, out: Tensor) -> Tensor:
        return out[..., : int(valid(2).sum(-1).min()), :]

    def bias_parameters(self, model: Any) -> list[nn.Parameter]:
        return [x for name in self.bias_layers for x in getattr(model, name).parameters()]

    @pytest.mark.parametrize("option", ["use_high_precision_attention", "use_cueq_triangle_kernels", "use_lma"])
    def test_options(self, option: str) -> None:
        """Kernels get a dimension more; with factors none of them is needed."""
        model, given = self.make(), self.inputs(smooth_pairs)
        with torch.no_grad():
            expected = self.seen(model(**given))
            patch(model, tol=1e-4)
            assert 0 < relative(self.seen(model(**given, **{option: True})), expected) < 2e-4
        assert self.only_calls(model).factored == 1


class TestDiffusion(TestPairBias, ReusedSuite):
    family = "OpenFold3 diffusion"
    bias_layers = ("linear_z",)

    def make(self) -> nn.Module:
        return fill(layers.DiffusionAttentionPairBias(**SIZES, c_hidden=WIDTH, no_heads=HEADS))

    def inputs(self, pairs: Any) -> dict[str, Any]:
        """Three samples for each of two proteins, of one bias."""
        samples = tokens(6).unflatten(0, (2, 3))
        return {"a": samples, "s": samples.flip(-1), "z": pairs(2, 1), "mask": valid(2, 1)}


def test_windows_of_atoms_are_left() -> None:
    model = fill(layers.CrossAttentionPairBias(**SIZES, c_hidden=WIDTH, no_heads=HEADS, n_query=32, n_key=128))
    (entry,) = supports(model).left
    assert (entry.family, entry.note) == ("OpenFold3 atoms", "windows of atoms, too small for factors")


@pytest.mark.parametrize("chunk", [None, 64])
def test_a_block_of_the_pairformer(chunk: int | None) -> None:
    """It calls the attention about ending nodes with transposed pairs and a bias to be transposed."""
    sizes = {"c_hidden_pair_bias": WIDTH, "c_hidden_mul": CHANNELS, "c_hidden_pair_att": WIDTH}
    heads = {"no_heads_pair_bias": HEADS, "no_heads_pair": HEADS}
    more = {"transition_type": "swiglu", "transition_n": 2, "pair_dropout": 0.25, "fuse_projection_weights": False}
    block = fill(PairFormerBlock(CHANNELS, CHANNELS, **sizes, **heads, **more, inf=1e9))
    keep = valid(1)
    masks = {"single_mask": keep, "pair_mask": keep[:, :, None] * keep[:, None]}
    given = {
        "s": tokens(1),
        "z": smooth_pairs(1),
        **masks,
        "_attn_chunk_size": chunk,
        "inplace_safe": chunk is not None,
    }
    check_block(block, given, ["OpenFold3 triangle"] * 2 + ["OpenFold3 pair bias"], int(keep.sum()))
