"""Window tables: the sign of the offset, the class token, three dimensions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.biases import WindowBias

sides = st.integers(1, 5)


def filled(module: WindowBias, weight: torch.Tensor) -> WindowBias:
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


@given(height=sides, width=sides, num_heads=st.integers(1, 3))
def test_equals_swin(height: int, width: int, num_heads: int):
    from transformers.models.swin.modeling_swin import SwinRelativePositionBias

    theirs = SwinRelativePositionBias(num_heads, (height, width))
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = filled(WindowBias(num_heads, (height, width)), theirs.relative_position_bias_table)
    assert torch.equal(ours().dense(), theirs()[0])


@given(size=sides, num_heads=st.integers(1, 3))
def test_equals_beit_with_its_class_token(size: int, num_heads: int):
    from transformers import BeitConfig
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    config = BeitConfig(hidden_size=4 * num_heads, num_attention_heads=num_heads, image_size=2 * size, patch_size=2)
    theirs = BeitRelativePositionBias(config)
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = filled(WindowBias(num_heads, (size, size), True), theirs.relative_position_bias_table)
    # Their forward resamples the table even to its own size, which rounds; so read it by their index.
    index = theirs.generate_relative_position_index((size, size))
    expected = theirs.relative_position_bias_table[index].permute(2, 0, 1)
    assert torch.equal(ours().dense(), expected)
    torch.testing.assert_close(ours().dense(), theirs((size, size))[0])


@pytest.mark.parametrize("window", [(2, 3, 4), (1, 5, 2), (2, 6, 12)])
def test_three_dimensions_pair_by_pair(window: tuple[int, int, int]):
    module = WindowBias(2, window)
    dense = module().dense()
    places = list(itertools.product(*(range(side) for side in window)))
    (_, height, width) = window
    for i, j in itertools.product(range(len(places)), range(0, len(places), 5)):
        dz, dy, dx = (a - b + side - 1 for a, b, side in zip(places[i], places[j], window, strict=True))
        row = (dz * (2 * height - 1) + dy) * (2 * width - 1) + dx
        assert torch.equal(dense[:, i, j], module.weight[row])


def test_offset_is_query_minus_key():
    """The first row of the models' table belongs to the first query and the last key."""
    module = WindowBias(1, (2, 2))
    dense = module().dense()[0]
    assert dense[0, 3] == module.weight[0, 0]
    assert dense[3, 0] == module.weight[-1, 0]


def test_class_token_entries():
    module = filled(WindowBias(1, (2, 3), True), torch.arange(18.0)[:, None])
    dense = module().dense()[0]
    assert dense[0, 0] == 17.0
    assert dense[0, 1:].tolist() == [15.0] * 6
    assert dense[1:, 0].tolist() == [16.0] * 6
    assert torch.equal(dense[1:, 1:], filled(WindowBias(1, (2, 3)), torch.arange(15.0)[:, None])().dense()[0])


@pytest.mark.parametrize("class_token", [False, True])
def test_gradient_reaches_each_row_as_often_as_it_is_used(class_token: bool):
    module = WindowBias(1, (3, 3), class_token)
    module().dense().sum().backward()
    used = module.weight.grad.flatten()
    assert used[12] == 9.0
    assert used[0] == used[24] == 1.0
    if class_token:
        assert used[25:].tolist() == [9.0, 9.0, 1.0]
    assert used.sum() == module.num_tokens**2


def test_visible_tokens_only():
    module = WindowBias(2, (4, 4), class_token=True)
    visible = torch.tensor([0, 3, 4, 11, 16])
    expected = module().dense()[:, visible][:, :, visible]
    assert torch.equal(module(visible, visible).dense(), expected)


def test_is_exact_at_rank_zero():
    bias = WindowBias(4, (12, 12), class_token=True)()
    assert bias.rank == 0
    assert bias.table.shape == (4, 23 * 23 + 4)


def test_deferred_initialisation():
    with torch.device("meta"):
        module = WindowBias(2, (3, 2), class_token=True)
    module.to_empty(device="cpu")
    module.reset_parameters()
    fresh = WindowBias(2, (3, 2), class_token=True)
    for name in ("code_q", "code_k"):
        assert torch.equal(module.get_buffer(name), fresh.get_buffer(name))


@pytest.mark.parametrize("window", [(7,), (2, 2, 2, 2), (0, 3), (3, -1), (2.7, 2), 7])
def test_bad_windows(window: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"window must be 2 or 3 positive integers, got [(\d]"):
        WindowBias(2, window)
