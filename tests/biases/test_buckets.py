"""Relative buckets: equal to the models' own functions, at every distance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashbias.biases import RelativeBuckets, relative_bucket

FURTHEST = 100_000


@pytest.fixture(scope="module")
def t5_bucket():
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket


@pytest.fixture(scope="module")
def distances() -> torch.Tensor:
    return torch.arange(-FURTHEST, FURTHEST + 1)


def through_the_table(module: RelativeBuckets, distance: torch.Tensor) -> torch.Tensor:
    """The bucket at which the table, with its constant tails, really ends up."""
    reach = module.max_distance
    return module.get_buffer("bucket")[distance.clamp(-reach, reach) + reach]


SETTINGS = [(32, 128), (32, 20), (64, 128), (8, 17), (4, 9), (320, 800)]


@pytest.mark.parametrize(("num_buckets", "max_distance"), SETTINGS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_equals_t5_at_every_distance(
    t5_bucket, distances: torch.Tensor, num_buckets: int, max_distance: int, bidirectional: bool
):
    if not bidirectional and max_distance <= num_buckets // 2:
        max_distance = num_buckets
    expected = t5_bucket(distances, bidirectional, num_buckets, max_distance)
    assert torch.equal(relative_bucket(distances, num_buckets, max_distance, bidirectional), expected)
    module = RelativeBuckets(1, num_buckets, max_distance, bidirectional)
    assert torch.equal(through_the_table(module, distances), expected)


@pytest.mark.parametrize(("num_buckets", "max_distance"), SETTINGS)
def test_equals_mpnet_at_every_distance(distances: torch.Tensor, num_buckets: int, max_distance: int):
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    expected = MPNetEncoder.relative_position_bucket(distances, num_buckets, max_distance)
    module = RelativeBuckets(1, num_buckets, max_distance)
    assert torch.equal(through_the_table(module, distances), expected)


@given(per_direction=st.integers(2, 80), beyond=st.integers(1, 600), bidirectional=st.booleans())
def test_equals_t5_for_any_setting(t5_bucket, per_direction: int, beyond: int, bidirectional: bool):
    num_buckets = per_direction * (2 if bidirectional else 1)
    max_distance = per_direction // 2 + beyond
    distance = torch.arange(-1500, 1501)
    module = RelativeBuckets(1, num_buckets, max_distance, bidirectional)
    expected = t5_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(through_the_table(module, distance), expected)


def test_every_bucket_is_used_and_no_other():
    for bidirectional, used in ((True, 31), (False, 32)):
        module = RelativeBuckets(1, bidirectional=bidirectional)
        # Bucket 16 of the bidirectional ones would be "zero steps ahead", which does not occur.
        assert len(module.get_buffer("bucket").unique()) == used


@pytest.mark.parametrize("is_decoder", [False, True])
def test_equals_a_t5_layer(is_decoder: bool):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=24, num_heads=3, d_kv=8, is_decoder=is_decoder)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    torch.nn.init.normal_(layer.relative_attention_bias.weight)
    module = RelativeBuckets(
        3, config.relative_attention_num_buckets, config.relative_attention_max_distance, not is_decoder
    )
    with torch.no_grad():
        module.weight.copy_(layer.relative_attention_bias.weight)
    assert torch.equal(module(300, 310).dense(), layer.compute_bias(300, 310)[0])
    decoded = layer.compute_bias(1, 310, past_seen_tokens=309)[0]
    assert torch.equal(module(1, 310, query_offset=309).dense(), decoded)


def test_gradient_sums_over_every_pair_of_a_bucket():
    module = RelativeBuckets(2, 8, 16)
    module(6, 9).dense().sum().backward()
    distance = torch.arange(9)[None, :] - torch.arange(6)[:, None]
    count = torch.bincount(relative_bucket(distance, 8, 16).flatten(), minlength=8)
    assert torch.equal(module.weight.grad, count.float()[:, None].expand(-1, 2))


def test_table_does_not_grow_with_the_sequence():
    assert RelativeBuckets(12)(100_000, 100_000).nbytes == RelativeBuckets(12)(2, 2).nbytes


def test_at_positions_equals_the_range():
    module = RelativeBuckets(2, 8, 16)
    called = module(30, 40, query_offset=5).dense()
    assert torch.equal(module.at(torch.arange(5, 35), torch.arange(40)).dense(), called)


def test_half_weights_sum_their_gradient_in_float32():
    module = RelativeBuckets(1, 4, 3).to(torch.bfloat16)
    bias = module(300, 300)
    assert bias.table.dtype == torch.float32
    bias.dense().sum().backward()
    assert module.weight.grad.float().sum() == pytest.approx(300 * 300, rel=2**-8)


def test_deferred_initialisation():
    with torch.device("meta"):
        module = RelativeBuckets(2, 8, 16)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.get_buffer("bucket"), RelativeBuckets(2, 8, 16).get_buffer("bucket"))


@pytest.mark.gpu
def test_buckets_are_those_of_the_cpu_after_a_move():
    moved = RelativeBuckets(2).to("cuda").get_buffer("bucket").cpu()
    assert torch.equal(moved, RelativeBuckets(2).get_buffer("bucket"))
    with torch.device("cuda"):
        made_there = RelativeBuckets(2)
    assert torch.equal(made_there.get_buffer("bucket").cpu(), moved)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"num_buckets must be even .* got 33"):
        RelativeBuckets(2, num_buckets=33)
    with pytest.raises(ValueError, match="num_buckets"):
        RelativeBuckets(2, num_buckets=2)
    with pytest.raises(ValueError, match="num_buckets"):
        RelativeBuckets(2, num_buckets=1, bidirectional=False)
    with pytest.raises(ValueError, match=r"max_distance must exceed 8 .* got 8"):
        RelativeBuckets(2, max_distance=8)
    RelativeBuckets(2, max_distance=9)
    with pytest.raises(TypeError, match=r"position_q must be integers, got torch\.float32"):
        RelativeBuckets(2).at(torch.zeros(3), torch.arange(3))
    with pytest.raises(ValueError, match=r"position_k must be a vector, got shape \(2, 3\)"):
        RelativeBuckets(2).at(torch.arange(3), torch.zeros(2, 3, dtype=torch.int64))


def test_bad_arguments_of_the_function():
    distance = torch.arange(-9, 9)
    with pytest.raises(TypeError, match=r"distance must be integers, got torch\.float32"):
        relative_bucket(distance.float())
    with pytest.raises(ValueError, match="num_buckets must be at least 4, got 3"):
        relative_bucket(distance, num_buckets=3)
    with pytest.raises(ValueError, match="num_buckets must be at least 2, got 1"):
        relative_bucket(distance, num_buckets=1, bidirectional=False)
    with pytest.raises(ValueError, match=r"max_distance must exceed 8 .* got 8"):
        relative_bucket(distance, max_distance=8)
    assert torch.equal(relative_bucket(distance.to(torch.int8)), relative_bucket(distance))
