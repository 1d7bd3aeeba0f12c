"""FlashABB patched: the structure of trastuzumab's variable domains, against the model as it was."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.suite import Squares, gradients, relative, snapshot
from tests.realdata.test_flash_abb import HEAVY, LIGHT, NUM_LAYERS
from torch import Tensor

from flashbias.factored import FactoredBias
from flashbias.integrations import call, patch, supports, unpatch
from flashbias.integrations.patching import RECORD
from flashbias.integrations.protein.flash_abb import FlashABB, FlashABBEncoder, point_bias

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]

FV = f"{HEAVY}|{LIGHT}"
SHORTER = f"{HEAVY[:110]}|{LIGHT[:100]}"
ALPHA = 1  # place of Cα among a residue's atoms: N, Cα, C, O


@pytest.fixture(scope="module")
def package(flash_abb_folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(str(flash_abb_folder))
        return importlib.import_module("flash_abb")


@pytest.fixture(scope="module")
def folder(package: Any) -> Any:
    """Predicts structures; `flabb` is its module."""
    return package.pretrained(device="cpu")


@pytest.fixture(scope="module")
def expected(folder: Any) -> Tensor:
    (found,) = alpha_carbons(folder, FV)
    return found


@pytest.fixture(scope="module")
def expected_padded(folder: Any) -> list[Tensor]:
    """Of a batch whose first sequence is padded."""
    return alpha_carbons(folder, SHORTER, FV)


@pytest.fixture
def model(folder: Any) -> Any:
    """Unpatched before and after each test."""
    yield folder.flabb
    if RECORD in folder.flabb.__dict__:
        unpatch(folder.flabb)


def alpha_carbons(folder: Any, *sequences: str) -> list[Tensor]:
    """Cα positions in ångströms, `[residues, 3]` for each sequence."""
    with torch.no_grad():
        positions = folder(list(sequences)).bb_coords[..., ALPHA, :]
    return [x[: len(sequence) - 1] for x, sequence in zip(positions, sequences, strict=True)]


def farthest(found: Tensor, expected: Tensor) -> float:
    """Largest distance between the two positions of a residue; nothing is superposed."""
    return float((found - expected).norm(dim=-1).max())


def test_predicts_a_fold(expected: Tensor) -> None:
    """So that there is something to compare: residues in a chain are neighbours, and both domains have their bridge."""
    heavy, light = expected[: len(HEAVY)], expected[len(HEAVY) :]
    for chain, sequence, pair in ((heavy, HEAVY, (21, 95)), (light, LIGHT, (22, 87))):
        steps = chain.diff(dim=0).norm(dim=-1)
        assert 3.6 < steps.median() < 3.9
        assert 2.5 < steps.min() < steps.max() < 4.2  # shorter at a cis proline
        assert [sequence[i] for i in pair] == ["C", "C"]
        assert 5.0 < (chain[pair[0]] - chain[pair[1]]).norm() < 7.5


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_alpha_carbons_stay_where_they_are(folder: Any, model: Any, expected: Tensor, impl: str) -> None:
    """1e-3 Å is promised. Float32 moves them by some 1e-6."""
    report = patch(model, impl=impl)
    (found,) = alpha_carbons(folder, FV)
    assert len(report.replaced) == len(report) == NUM_LAYERS
    assert {(entry.family, entry.rank, entry.certificate) for entry in report} == {(FlashABB.name, 14, 0.0)}
    assert farthest(found, expected) < 1e-4


def test_a_padded_batch(folder: Any, model: Any, expected_padded: list[Tensor]) -> None:
    patch(model)
    for found, expected in zip(alpha_carbons(folder, SHORTER, FV), expected_padded, strict=True):
        assert farthest(found, expected) < 1e-4
    (alone,) = alpha_carbons(folder, SHORTER)
    assert farthest(alone, expected_padded[0]) < 1e-4


@pytest.mark.parametrize("without", ["bias", "mask"])
def test_would_see_it(
    folder: Any, model: Any, expected_padded: list[Tensor], without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias or a mask that is lost moves residues by far more than the tests above allow."""
    original = call.attention

    def crippled(q: Tensor, k: Tensor, v: Tensor, bias: FactoredBias | None, **options: Any) -> Any:
        options["attn_mask"] = None if without == "mask" else options["attn_mask"]
        return original(q, k, v, None if without == "bias" else bias, **options)

    monkeypatch.setattr(call, "attention", crippled)
    patch(model)
    assert farthest(alpha_carbons(folder, SHORTER, FV)[0], expected_padded[0]) > 1e-2


def test_the_bias_is_the_formula_of_its_points(model: Any) -> None:
    attention = model.model.ipa_layers[-1]
    x_q, x_k = 20.0 * torch.randn(2, 2, attention.no_heads, 9, attention.no_qk_points, 3, dtype=torch.float64)
    with torch.no_grad():
        bias = point_bias(attention, x_q, x_k)
        square = (x_q[..., :, None, :, :] - x_k[..., None, :, :, :]).square().sum((-2, -1))
        weight = torch.nn.functional.softplus(attention.head_weights.double()) * math.sqrt(1 / (3 * (4 * 9 / 2)))
    assert bias.rank == 14
    assert relative(bias.dense(torch.float64), -0.5 * weight[:, None, None] * square) < 1e-6  # float32 softplus


def test_gradients(folder: Any, model: Any) -> None:
    """Of positions and confidence, in every parameter that has one."""

    def out() -> Tensor:
        found = folder([SHORTER]).output
        return torch.cat([found["positions"][-1].flatten(), found["plddt"].flatten()])

    expected = gradients(model, out())
    patch(model)
    found = gradients(model, out())
    model.zero_grad()
    assert found.keys() == expected.keys()
    assert any(name.endswith("head_weights") for name in expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        size = max(float(gradient.abs().max()), 1e-4 * largest)
        assert float((found[name] - gradient).abs().max()) < 1e-3 * size, name


def test_unpatched_positions_are_the_same_bits(folder: Any, model: Any, expected: Tensor) -> None:
    before = snapshot(model)
    assert supports(model) == patch(model)
    assert snapshot(model) != before
    unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(alpha_carbons(folder, FV)[0], expected)


# -------------------------------------------------------------------- the encoder of sequence and structure


@pytest.fixture(scope="module")
def encoder(package: Any) -> Any:
    """`sss` is its module; the predictor inside is none, and is patched by itself: `sss.folder.flabb`."""
    return package.pretrained_sss(device="cpu")


def test_embeddings_without_a_square(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they come, the encoder forms the probabilities of all pairs, and on a CPU so does the predictor."""
    length = len(HEAVY) + len(LIGHT)
    with Squares(length) as before:
        expected = encoder([FV, SHORTER]).embeddings
    report = patch(encoder.sss)
    patch(encoder.sss.folder.flabb)
    try:
        found = encoder([FV, SHORTER]).embeddings
        monkeypatch.setattr(call, "attention", lambda q, k, v, *_, **__: q.new_zeros(*q.shape[:-1], v.shape[-1]))
        with Squares(length) as after:
            encoder([FV, SHORTER])
    finally:
        unpatch(encoder.sss.folder.flabb)
        unpatch(encoder.sss)
    assert [(entry.family, entry.rank) for entry in report.replaced] == 6 * [(FlashABBEncoder.name, 14)]
    assert relative(found[0], expected[0]) < 1e-4
    residues = len(SHORTER) - 1
    assert relative(found[1, :residues], expected[1, :residues]) < 1e-4
    assert before.found
    assert after.found == []


def test_probabilities_are_refused(encoder: Any) -> None:
    model = encoder.sss
    tokens = encoder.alphabet([FV], pad=True, w_extra_tkns=False)
    patch(model)
    try:
        with pytest.raises(NotImplementedError, match="return_attn_weights=True"):
            model([FV], tokens, return_attn_weights=True)
    finally:
        unpatch(model)
