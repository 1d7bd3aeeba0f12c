"""FlashABB: its dense point-distance biases, as they are in the model on a real antibody, are found to be low rank."""

from __future__ import annotations

import pytest
import torch
from tests.realdata.test_flash_abb import NUM_LAYERS, Layer, layers
from torch import Tensor

import flashbias as fb
from flashbias.decompose import compress
from flashbias.decompose.bound import certificate, row_spread

__all__ = ["layers"]  # a fixture

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]


def dense_bias(layer: Layer) -> Tensor:
    """`[H, N, N]`: minus the weighted squared distance of points, from the model's float32 numbers."""
    x_q, x_k = layer.x_q[0].double(), layer.x_k[0].double()
    square = (x_q[..., :, None, :] - x_k[..., None, :, :]).square().sum(-1)
    return -layer.weight.double()[:, None, None] * square


@pytest.mark.parametrize("index", range(NUM_LAYERS))
def test_rank_thirteen(layers: list[Layer], index: int):
    """Four points in space: 12 products and the keys' squares; the queries' squares are constants of rows."""
    layer = layers[index]
    b = dense_bias(layer)
    bias = compress(b, 1e-3, table=None, factor_dtype=torch.float32)
    assert isinstance(bias, fb.FactoredBias)
    assert bias.rank == 13 <= 14
    assert bias.report.certificate <= 1e-3
    assert float(certificate(row_spread(bias.dense(torch.float64) - b)).max()) <= 1e-3
    assert bias.report.cost_ms < bias.report.dense_ms
    out = fb.attention(layer.q, layer.k, layer.v, bias, scale=1.0)
    assert float((out.double() - layer.truth()).abs().max()) <= 3e-5


def test_bfloat16_factors_keep_the_promise_too(layers: list[Layer]):
    """Where they are chosen: more columns, fewer products."""
    for layer in layers[::3]:
        b = dense_bias(layer)
        bias = compress(b, 1e-3, table=None)
        assert isinstance(bias, fb.FactoredBias)
        assert float(certificate(row_spread(bias.dense(torch.float64) - b)).max()) <= 1e-3
