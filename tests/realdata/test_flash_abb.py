"""FlashABB 0.0.5: the point-distance bias of a published antibody model, rebuilt from its points.

Its code turns the bias into 36 columns of queries and keys; `SquaredDistance` needs 14.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import flashbias as fb
from flashbias.biases import SquaredDistance

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]

# Trastuzumab's variable domains, heavy and light (PDB entry 1N8Z, chains B and A).
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
    "SRWGGDGFYAMDYWGQGTLVTVSS"
)
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
NUM_LAYERS = 8
NUM_POINTS = 4


@dataclass(frozen=True)
class Layer:
    """What one attention layer of the model received and returned, as it ran."""

    q: Tensor  # [1, H, N, 16], scaled
    k: Tensor  # [1, H, N, 16]
    v: Tensor  # [1, H, N, 168]
    out: Tensor  # [1, H, N, 168]
    columns: int  # of the model's own factors
    x_q: Tensor  # [1, H, N, 12]: four points in space
    x_k: Tensor  # [1, H, N, 12]
    weight: Tensor  # [H]

    def truth(self) -> Tensor:
        """Dense softmax in float64, from the same float32 numbers."""
        x_q, x_k = self.x_q.double(), self.x_k.double()
        square = (x_q[..., :, None, :] - x_k[..., None, :, :]).square().sum(-1)
        scores = self.q.double() @ self.k.double().mT - self.weight.double()[:, None, None] * square
        return torch.softmax(scores, dim=-1) @ self.v.double()


class Recorder(TorchFunctionMode):
    """Keeps the arguments and the result of each call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((*(x.clone() for x in args[:3]), out.clone()))
        return out


def points_of(module: Any, state: Tensor, frames: Any) -> tuple[Tensor, Tensor]:
    """The query and key points of a layer in space, `[1, H, N, 4 * 3]` each."""
    local = torch.stack(module.linear_points(state).chunk(3, dim=-1), dim=-1)
    local = local.unflatten(-2, (module.no_heads, -1))
    points = frames[..., None, None].apply(local).transpose(1, 2)
    x_q, x_k, _ = points.split([NUM_POINTS, NUM_POINTS, module.no_v_points], dim=-2)
    return x_q.flatten(-2), x_k.flatten(-2)


@pytest.fixture(scope="module")
def layers(flash_abb_folder: Path) -> list[Layer]:
    sys.path.insert(0, str(flash_abb_folder))
    try:
        from flash_abb import pretrained
    finally:
        sys.path.remove(str(flash_abb_folder))

    model = pretrained(random_init=True, device="cpu")
    weights = flash_abb_folder / "flash_abb" / "weights" / "flabb_weights.pt"
    model.flabb.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    attentions = model.flabb.model.ipa_layers
    inputs: list[tuple[Any, ...]] = []  # (module, state, frames) of each layer
    for module in attentions:
        module.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0], args[2])))
    with torch.no_grad(), Recorder() as recorder:
        model([f"{HEAVY}|{LIGHT}"])
    assert len(recorder.calls) == len(inputs) == NUM_LAYERS

    found = []
    for (module, state, frames), (q, k, v, out) in zip(inputs, recorder.calls, strict=True):
        width = module.c_hidden
        with torch.no_grad():
            x_q, x_k = points_of(module, state, frames)
            strength = torch.nn.functional.softplus(module.head_weights)
            weight = 0.5 * strength * math.sqrt(1.0 / (3.0 * (NUM_POINTS * 9.0 / 2.0)))
        columns = q.shape[-1] - width
        found.append(Layer(q[..., :width], k[..., :width], v, out, columns, x_q, x_k, weight))
    return found


def test_is_the_published_model_on_the_whole_domain(layers: list[Layer]):
    for layer in layers:
        assert layer.q.shape == (1, 12, len(HEAVY) + len(LIGHT), 16)
        assert layer.columns == 36
    # Points that moved: in the last layer residues are spread over tens of ångströms.
    assert layers[-1].x_k.std() > 5.0


@pytest.mark.parametrize("index", range(NUM_LAYERS))
def test_the_dense_formula_is_what_the_model_computes(layers: list[Layer], index: int):
    """Else the test below would prove nothing. The model's own 36 columns are not centred, hence 1e-3."""
    layer = layers[index]
    torch.testing.assert_close(layer.out.double(), layer.truth(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("index", range(NUM_LAYERS))
def test_fourteen_columns_equal_the_dense_softmax(layers: list[Layer], index: int, impl: str):
    layer = layers[index]
    bias = SquaredDistance(12)(layer.x_q, layer.x_k, weight=layer.weight)
    assert bias.rank <= 14
    out = fb.attention(layer.q, layer.k, layer.v, bias, scale=1.0, impl=impl)
    error = (out.double() - layer.truth()).abs().max()
    assert error <= 3e-5
