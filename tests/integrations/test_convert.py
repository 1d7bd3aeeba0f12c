"""What `unpatched_state_dict` refuses; what it makes is tested with each library's models, in `learned.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SwinConfig, SwinModel

from flashbias.integrations import patch, unpatched_state_dict

SHAPE: dict[str, Any] = {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8}


def swin(depth: int = 1) -> Any:
    torch.manual_seed(0)
    model = SwinModel(SwinConfig(**SHAPE, depths=[depth], num_heads=[1]))
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    return model


def saved(model: Any) -> dict[str, torch.Tensor]:
    patch(model, tol=0.1, tables="factors", train_bias=True)
    return model.state_dict()


def test_a_state_dict_without_factors_comes_back_as_it_is() -> None:
    state = swin().state_dict()
    found, report = unpatched_state_dict(swin(), state)
    assert len(report) == 0 and found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


def test_a_table_that_was_not_trained_moves_by_the_error_of_its_compression() -> None:
    patched, plain = swin(), swin()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    found, report = unpatched_state_dict(plain, saved(patched))
    (entry,) = report
    moved = float((found[entry.name] - before[entry.name]).abs().max())
    assert 0 < moved < 1 and 0 < entry.certificate <= 0.2
    assert all(torch.equal(value, before[name]) for name, value in found.items() if name != entry.name)


def test_a_patched_model_is_refused() -> None:
    model = swin()
    state = saved(model)
    with pytest.raises(ValueError, match="model is patched already, got SwinModel; unpatch it first"):
        unpatched_state_dict(model, state)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        unpatched_state_dict({}, state)  # type: ignore[arg-type]


def test_a_model_of_another_configuration_is_refused() -> None:
    state = saved(swin())
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1"):
        unpatched_state_dict(swin(2), state)
    with pytest.raises(ValueError, match="state_dict has factors of 'elsewhere', which is no table over fixed places"):
        unpatched_state_dict(swin(), {**swin().state_dict(), "elsewhere_flashbias_factors.phi_q": torch.ones(1, 16, 1)})


def test_half_a_pair_of_factors_is_refused() -> None:
    state = saved(swin())
    missing = next(name for name in state if name.endswith("phi_k"))
    del state[missing]
    with pytest.raises(ValueError, match=r"phi_q' without its phi_k: both must have been saved"):
        unpatched_state_dict(swin(), state)
