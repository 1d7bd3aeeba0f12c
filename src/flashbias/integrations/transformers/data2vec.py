"""data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language.

https://arxiv.org/abs/2202.03555. Its vision model has BEiT's bias, exact through a table as there (`beit.py`). The
table of a layer belongs to the attention, which attends by itself, so the module's forward is replaced.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashbias.integrations.base import Changes, Options
from flashbias.integrations.transformers.attend import attend
from flashbias.integrations.transformers.beit import PatchFamily, PositionBias, bias_within
from flashbias.integrations.windows import split_heads

__all__ = ["Data2VecVision"]

FILE = "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVision"


class Data2VecVision(PatchFamily):
    """data2vec's vision encoders, and the models around them."""

    name = "Data2VecVision"
    attentions = (f"{FILE}SdpaSelfAttention", f"{FILE}SelfAttention")
    stacks = (f"{FILE}Encoder",)
    biases = (f"{FILE}RelativePositionBias",)

    def own_bias(self, model: nn.Module, attention: Any) -> nn.Module | None:
        """It belongs to the attention."""
        return attention.relative_position_bias if attention.has_relative_position_bias else None

    def shared_bias(self, stack: Any) -> nn.Module | None:
        """It belongs to the encoder."""
        return stack.relative_position_bias if stack.has_relative_position_bias else None

    def change(self, attention: Any, options: Options, changes: Changes) -> None:
        """Replace the forward."""
        super().change(attention, options, changes)
        changes.set(attention, "forward", partial(forward, attention))


def forward(
    attention: Any,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: PositionBias | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> tuple[Tensor]:
    """`Data2VecVisionSelfAttention.forward` with the table of the layer, of the encoder, or both."""
    projections = (attention.query, attention.key, attention.value)
    query, key, value = (split_heads(project(hidden_states), attention.attention_head_size) for project in projections)
    bias = relative_position_bias
    if attention.has_relative_position_bias:
        assert resolution is not None, "the model always says how large the image is"
        size = tuple(side // attention.config.patch_size for side in resolution)
        own = attention.relative_position_bias(size, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
        bias = own if bias is None else own + bias
    out = attend(
        attention,
        query,
        key,
        value,
        None if bias is None else bias_within(attention, bias, query.device),
        None,
        is_causal=False,
        scale=1.0 / math.sqrt(attention.attention_head_size),
        dropout_p=attention.dropout.p,
    )
    return (out.flatten(2),)
