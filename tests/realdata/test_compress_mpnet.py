"""all-mpnet-base-v2: what becomes of the whole model when its learned bias is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.biases import RelativeBuckets
from flashbias.decompose import NotLowRankError, compress
from flashbias.decompose.bound import certificate, row_spread
from flashbias.decompose.relative import codes_of_positions
from flashbias.decompose.split import split

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]

TEXT = Path(__file__).with_name("lincoln.txt")
SEQLEN, NUM_HEADS = 512, 12
HIDDEN = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def bias(mpnet_folder: Path) -> Tensor:
    """`[12, 512, 512]`, one for all layers."""
    from safetensors import safe_open

    module = RelativeBuckets(NUM_HEADS)
    with safe_open(mpnet_folder / "model.safetensors", framework="pt") as weights:
        module.load_state_dict({"weight": weights.get_tensor("encoder.relative_attention_bias.weight")})
    return module(SEQLEN, SEQLEN).dense().detach()


@pytest.fixture(scope="module")
def hidden(mpnet_folder: Path) -> HIDDEN:
    """The last hidden state, `[512, 768]`, of a real text, when the model has another bias."""
    from transformers import AutoTokenizer, MPNetModel

    model = MPNetModel.from_pretrained(mpnet_folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(mpnet_folder)(
        TEXT.read_text(), truncation=True, max_length=SEQLEN, return_tensors="pt"
    )
    own = model.encoder.compute_position_bias

    def run(bias: Tensor) -> Tensor:
        def compute_position_bias(*args: object, **options: object) -> Tensor:
            assert own(*args, **options).shape == bias[None].shape
            return bias[None]

        model.encoder.compute_position_bias = compute_position_bias
        with torch.no_grad():
            return model(**tokens).last_hidden_state[0].double()

    return run


@pytest.fixture(scope="module")
def truth(hidden: HIDDEN, bias: Tensor) -> Tensor:
    return hidden(bias)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def test_no_small_rank_will_do(bias: Tensor):
    with pytest.raises(
        NotLowRankError, match=r"up to rank 64 factors reach 0\.9.* in 12 of 12 heads; tables were not"
    ) as caught:
        compress(bias, 0.02, table=None, max_rank=64)
    report = caught.value.report
    assert report.shape == (12, 512, 512)
    for head in report.heads:
        # Far from the tolerance, and hardly nearer than at rank 4: every rank loses the spike at the diagonal.
        assert head.form == "dense" and head.rank == 64
        assert head.certificate > 0.9 and head.certificates[64] > head.certificates[4] - 0.05


def test_the_exact_table_is_found(bias: Tensor, hidden: HIDDEN, truth: Tensor):
    found = compress(bias, 0.02, table="exact")
    assert isinstance(found, fb.FactoredBias)
    assert found.rank == 0 and found.table is not None and found.table.shape[1] < 2 * 128
    assert {head.form for head in found.report.heads} == {"table"}
    assert found.report.certificate <= 1e-6
    assert certificate(row_spread(found.dense(torch.float64) - bias)).max() <= 1e-6
    assert distance(hidden(found.dense()), truth) <= 1e-4


def test_a_near_field_of_eight_and_rank_64(bias: Tensor, hidden: HIDDEN, truth: Tensor):
    codes = codes_of_positions(torch.arange(SEQLEN), torch.arange(SEQLEN))
    heads = []
    for b in bias.double():
        table, factors = split(b, codes, 8, 64, generator=torch.Generator().manual_seed(0))
        assert table.shape == (17,) and factors.rank == 64
        heads.append(table[codes.index(8)] + factors.dense())
    found = torch.stack(heads)
    assert distance(hidden(found.float()), truth) <= 0.021
    # What is promised for every input is not much more than what happens to this one.
    assert 0.02 < float(certificate(row_spread(found - bias)).max()) < 0.25


def test_without_the_near_field_the_model_is_another(bias: Tensor, hidden: HIDDEN, truth: Tensor):
    """So that the tests above are not passed by the model alone."""
    assert distance(hidden(torch.zeros_like(bias)), truth) > 0.3
