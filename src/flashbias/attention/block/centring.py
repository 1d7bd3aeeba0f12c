"""What an implementation measures phi_k of a block from, and what that takes from the scores of each row."""

from __future__ import annotations

from torch import Tensor

from flashbias.attention import packing
from flashbias.attention.call import Call
from flashbias.factored import FactoredBias

__all__ = ["has_reference", "own_columns", "own_rows", "reference_of", "row_constant"]


def has_reference(call: Call) -> bool:
    """Whether some implementation measures phi_k of a block from elsewhere than zero."""
    return call.bias is not None and call.bias.rank > 0 and call.varlen is None and call.seqlen_k > 0


def reference_of(call: Call, impl: str) -> Tensor | None:
    """What a named implementation measures phi_k from in the scores of each query: see `row_reference`."""
    bias = call.bias
    if bias is None or not has_reference(call):
        return None
    if impl == "reference":
        starts, length = packing.reference_starts(call.seqlen_q, call.seqlen_k, bias.device, tiled=False)
    elif packing.is_packed(bias.phi_q, bias.phi_k, call.query.dtype):
        tiled = packing.is_tile_centred(call.seqlen_k, call.query.dtype)
        starts, length = packing.reference_starts(call.seqlen_q, call.seqlen_k, bias.device, tiled=tiled)
    else:
        return None
    return packing.centre_of(own_rows(bias), starts, length)


def row_constant(call: Call, impl: str) -> Tensor | float:
    """What centring takes from the scores of each row."""
    rows = reference_of(call, impl)
    return 0.0 if rows is None or call.bias is None else packing.row_sums(own_columns(call.bias), rows)


def own_columns(bias: FactoredBias) -> Tensor:
    """phi_q with zeros in the columns that a head does not have."""
    return bias.phi_q if bias.ranks is None else bias.phi_q.masked_fill(~bias.rank_mask()[:, None, :], 0.0)


def own_rows(bias: FactoredBias) -> Tensor:
    """phi_k likewise; where heads share it, with zeros in the columns that none of them has."""
    if bias.ranks is None:
        return bias.phi_k
    own = bias.rank_mask()
    own = own if bias.phi_k.shape[-3] > 1 else own.any(dim=0, keepdim=True)
    return bias.phi_k.masked_fill(~own[:, None, :], 0.0)
