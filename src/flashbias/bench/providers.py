"""Everything that is timed: this library's implementations, and the ways around it that users have today.

A provider's name is `FAMILY/WHO`:

| family | what runs | compared with |
|---|---|---|
| `ours` | `flashbias.attention` with the factors | bias |
| `ours-deterministic` | the same, `deterministic=True` | bias |
| `ours-bias-free` | the same kernel, `bias=None` | no bias |
| `bias-free` | a peer without any bias: the ceiling | no bias |
| `alibi` | a peer that computes ALiBi in place | bias |
| `dense` | a peer that reads the N×M matrix, which is given to it | bias |
| `dense+grad` | the same, with a gradient to the matrix | bias |
| `concat` | a peer on `[q, phi_q], [k, phi_k]`; the concatenation is timed | bias |
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import flashbias as fb
from flashbias.bench.cases import Case, Inputs, flatten
from flashbias.bench.peers import PEERS, Peer, Unsupported, round_up

__all__ = ["Prepared", "Provider", "find_providers", "provider_names", "registry"]

FAMILIES = (
    "ours",
    "ours-bias-free",
    "ours-deterministic",
    "bias-free",
    "alibi",
    "dense",
    "dense+grad",
    "concat",
)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A provider made ready for one case: everything that is given to it exists, nothing is computed yet.

    Args:
        forward: computes the output, in the provider's own layout.
        leaves: tensors that a gradient is taken to, by name: `query, key, value, phi_q, phi_k, bias`.
        dout: gradient of the output, in the provider's own layout.
        unpack: `[B, H, N, d]` from the layout of output, query, key and value.
        unpack_factor: the same for factors.
        matrix_bytes: size of the dense bias that the provider reads, 0 if none.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    dout: Tensor
    unpack: Callable[[Tensor], Tensor] = flatten
    unpack_factor: Callable[[Tensor], Tensor] = flatten
    matrix_bytes: int = 0

    def run(self, grads: bool) -> tuple[Tensor, ...]:
        """The region that is timed: the output, and with `grads` every gradient after it."""
        if not grads:
            with torch.no_grad():
                return (self.forward(),)
        out = self.forward()
        return out, *torch.autograd.grad(out, tuple(self.leaves.values()), self.dout)

    def named(self, results: Sequence[Tensor]) -> dict[str, Tensor]:
        """What `run` returned, by name and with one batch dimension, for the agreement check."""
        names = ("out", *self.leaves)[: len(results)]
        return {name: self._flat(name, value.detach()) for name, value in zip(names, results, strict=True)}

    def _flat(self, name: str, value: Tensor) -> Tensor:
        if name == "bias":
            return value.reshape(-1, *value.shape[-3:])
        return self.unpack_factor(value) if name in ("phi_q", "phi_k") else self.unpack(value)


def _always(case: Case, pass_name: str) -> bool:
    return True


@dataclass(frozen=True)
class Provider:
    """Something to time.

    Args:
        name: `FAMILY/WHO`.
        prepare: makes it ready for inputs; the second argument says whether gradients are wanted.
            Raises `Unsupported` where it cannot do the case.
        module: package that must be importable, if any.
        biased: whether its output carries the bias.
        applies: whether the combination of case and pass makes sense at all; if not, it has no row.
        devices: device types on which it can run.
        in_family: device types on which the family's name includes it.
    """

    name: str
    prepare: Callable[[Inputs, bool], Prepared]
    module: str | None = None
    biased: bool = True
    applies: Callable[[Case, str], bool] = _always
    devices: tuple[str, ...] = ("cuda", "cpu")
    in_family: tuple[str, ...] = ("cuda", "cpu")

    @property
    def family(self) -> str:
        """What stands before the slash."""
        return self.name.split("/", 1)[0]

    def is_installed(self) -> bool:
        """Whether the package that it needs can be found."""
        if self.module is None:
            return True
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # its parent package is missing
            return False


# -------------------------------------------------------------------- selection


@functools.cache
def registry() -> dict[str, Provider]:
    """Every provider by name, this library's first, in the order in which they run."""
    peers = PEERS.values()
    found = [
        *_ours(),
        *(_bias_free(peer) for peer in peers if "none" in peer.biases),
        *(_alibi(peer) for peer in peers if "alibi" in peer.biases),
        *(_dense(peer, False) for peer in peers if "dense" in peer.biases),
        *(_dense(peer, True) for peer in peers if "dense" in peer.biases),
        *(_concat(peer) for peer in peers if "none" in peer.biases and peer.concat),
    ]
    return {provider.name: provider for provider in found}


def provider_names() -> list[str]:
    """Names of all providers, whether or not they can run on this machine."""
    return list(registry())


def find_providers(names: Iterable[str | Provider], device_type: str) -> list[Provider]:
    """Look providers up.

    Args:
        names: a provider's name, a family such as `dense`, a pattern such as `*/flex`, or a `Provider`.
        device_type: `cuda` or `cpu`: a family includes what is worth running there.

    Returns:
        The providers in the order in which they run, each once.

    Raises:
        ValueError: a name that fits nothing.
    """
    known = registry()
    given: list[Provider] = []
    chosen: set[str] = set()
    for name in names:
        if isinstance(name, Provider):
            given.append(name)
        elif name in known:
            chosen.add(name)
        elif name in FAMILIES:
            chosen |= {p.name for p in known.values() if p.family == name and device_type in p.in_family}
        elif matches := fnmatch.filter(known, name):
            chosen |= set(matches)
        else:
            raise ValueError(f"unknown provider {name!r}; families are {', '.join(FAMILIES)}; all: {', '.join(known)}")
    return given + [provider for name, provider in known.items() if name in chosen]


# -------------------------------------------------------------------- this library


def _ours() -> list[Provider]:
    """Every implementation; kernels also without factors and in deterministic mode."""
    portable = ("sdpa", "reference")
    kernels = [impl for impl in fb.implementations() if impl not in portable]
    families = [
        *(("ours", impl) for impl in (*kernels, *portable)),
        *(("ours-bias-free", impl) for impl in kernels),
        *(("ours-deterministic", impl) for impl in kernels),
    ]
    return [
        Provider(
            f"{family}/{impl}",
            functools.partial(_prepare_ours, impl, family),
            biased=family != "ours-bias-free",
            in_family=("cpu",) if impl in portable else ("cuda",),
        )
        for family, impl in families
    ]


def _prepare_ours(impl: str, family: str, inputs: Inputs, grads: bool) -> Prepared:
    if reason := fb.implementations()[impl]:
        raise Unsupported(reason)
    case = inputs.case
    leaves = _leaves(grads, query=inputs.query, key=inputs.key, value=inputs.value)
    query, key, value = leaves.values()
    bias = None
    if family != "ours-bias-free":
        factors = _leaves(grads and case.learns_bias, phi_q=inputs.phi_q, phi_k=inputs.phi_k)
        bias = fb.FactoredBias(factors["phi_q"], factors["phi_k"])
        leaves |= factors
    deterministic = True if family == "ours-deterministic" else None

    def forward() -> Tensor:
        out = fb.attention(
            query,
            key,
            value,
            bias,
            is_causal=case.is_causal,
            scale=case.scale,
            impl=impl,
            deterministic=deterministic,
        )
        assert isinstance(out, Tensor)  # no lse was asked for
        return out

    return Prepared(forward, _only_learned(leaves, grads), inputs.dout)


def _leaves(grads: bool, **tensors: Tensor) -> dict[str, Tensor]:
    """Tensors of the same storage that begin an autograd graph of their own."""
    return {name: tensor.detach().requires_grad_(grads) for name, tensor in tensors.items()}


def _only_learned(leaves: dict[str, Tensor], grads: bool) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad} if grads else {}


# -------------------------------------------------------------------- peers


def _provider(family: str, peer: Peer, prepare: Callable[[Peer, Inputs, bool], Prepared], **fields) -> Provider:
    return Provider(
        f"{family}/{peer.name}",
        functools.partial(prepare, peer),
        module=peer.module,
        devices=peer.devices,
        in_family=peer.in_family,
        **fields,
    )


def _bias_free(peer: Peer) -> Provider:
    return _provider("bias-free", peer, _prepare_bias_free, biased=False)


def _alibi(peer: Peer) -> Provider:
    return _provider("alibi", peer, _prepare_alibi, applies=lambda case, pass_name: case.bias == "alibi")


def _dense(peer: Peer, with_gradient: bool) -> Provider:
    if not with_gradient:
        return _provider("dense", peer, functools.partial(_prepare_dense, False))
    prepare = functools.partial(_prepare_dense, True)
    return _provider("dense+grad", peer, prepare, applies=lambda case, pass_name: pass_name == "fwdbwd")


def _concat(peer: Peer) -> Provider:
    return _provider("concat", peer, _prepare_concat)


def _packed(peer: Peer, inputs: Inputs, grads: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Query, key and value as leaves, and dout, in the peer's layout."""
    flat = inputs.flat()
    pack = peer.layout.pack
    return _leaves(grads, query=pack(flat.query), key=pack(flat.key), value=pack(flat.value)), pack(flat.dout)


def _check_limit(peer: Peer, case: Case, elements: int = 0) -> None:
    if reason := peer.limit(case, elements):
        raise Unsupported(reason)


def _prepare_bias_free(peer: Peer, inputs: Inputs, grads: bool) -> Prepared:
    _check_limit(peer, inputs.case)
    leaves, dout = _packed(peer, inputs, grads)
    attend = peer.build(inputs.case, "none", dout.device)
    tokens = tuple(leaves.values())
    return Prepared(lambda: attend(*tokens), _only_learned(leaves, grads), dout, peer.layout.unpack)


def _prepare_alibi(peer: Peer, inputs: Inputs, grads: bool) -> Prepared:
    _check_limit(peer, inputs.case)
    leaves, dout = _packed(peer, inputs, grads)
    attend = peer.build(inputs.case, "alibi", dout.device)
    tokens, slopes = tuple(leaves.values()), inputs.slopes
    return Prepared(lambda: attend(*tokens, slopes), _only_learned(leaves, grads), dout, peer.layout.unpack)


def _prepare_dense(with_gradient: bool, peer: Peer, inputs: Inputs, grads: bool) -> Prepared:
    case, flat = inputs.case, inputs.flat()
    _check_limit(peer, case, flat.phi_q.shape[0] * case.num_heads * case.seqlen**2)
    if with_gradient and not peer.gradient:
        raise Unsupported("no gradient to the bias")
    leaves, dout = _packed(peer, inputs, grads)
    attend = peer.build(case, "dense", dout.device)
    dense = _dense_bias(flat, peer.bias_dtype or flat.query.dtype, masked=case.is_causal and peer.bias_masks)
    if peer.bias_squeezed and dense.shape[0] == 1:
        dense = dense[0]
    tokens = tuple(leaves.values())
    leaves |= _leaves(grads and with_gradient, bias=dense)
    dense = leaves["bias"]
    return Prepared(
        lambda: attend(*tokens, dense),
        _only_learned(leaves, grads),
        dout,
        peer.layout.unpack,
        matrix_bytes=dense.numel() * dense.element_size(),
    )


def _dense_bias(flat: Inputs, dtype: torch.dtype, masked: bool) -> Tensor:
    """The matrix `[B or 1, H, N, N]`, computed in float32, rounded once; a head at a time to save memory."""
    case = flat.case
    batch = flat.phi_q.shape[0]
    dense = torch.empty(batch, case.num_heads, case.seqlen, case.seqlen, dtype=dtype, device=flat.query.device)
    future = None
    if masked:
        future = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool, device=dense.device).triu_(1)
    for head in range(case.num_heads):
        phi_q, phi_k = (phi[:, head % phi.shape[1]].float() for phi in (flat.phi_q, flat.phi_k))
        dense[:, head] = phi_q @ phi_k.mT
        if future is not None:
            dense[:, head].masked_fill_(future, -torch.inf)
    return dense


def _prepare_concat(peer: Peer, inputs: Inputs, grads: bool) -> Prepared:
    case, flat = inputs.case, inputs.flat()
    _check_limit(peer, case)
    leaves, dout = _packed(peer, inputs, grads)
    query, key, value = leaves.values()
    pack, unpack = peer.layout.pack, peer.layout.unpack
    factors = _leaves(grads and case.learns_bias, phi_q=pack(flat.phi_q), phi_k=pack(flat.phi_k))
    phi_q, phi_k = factors.values()
    attend = peer.build(case, "none", dout.device)
    products = _products(case, phi_q.dtype, key.dtype)
    width, value_width = peer.concat_widths(case.head_dim, products * case.rank, grads)

    def forward() -> Tensor:
        # The peer scales the whole product, so that phi_q carries 1 / scale.
        columns_q, columns_k = _columns(phi_q / case.scale, phi_k, key.dtype, products)
        values = F.pad(value, (0, value_width - case.head_dim)) if value_width > case.head_dim else value
        out = attend(_beside(query, columns_q, width), _beside(key, columns_k, width), values)
        return out[..., : case.head_dim]

    return Prepared(forward, _only_learned(leaves | factors, grads), dout, unpack, unpack)


def _products(case: Case, factors: torch.dtype, tokens: torch.dtype) -> int:
    """How many products of halves stand for one column of the factors.

    One if they have the tokens' dtype. Float32 factors beside half-precision tokens are split into a high and
    a low half, hi·hi + hi·lo + lo·hi, for positions rounded to a half would give a wrong result, which has no
    number; lo·lo comes along where the padding to a multiple of 8 has room for it.
    """
    if factors == tokens:
        return 1
    d, rank = case.head_dim, case.rank
    return 4 if round_up(d + 4 * rank) == round_up(d + 3 * rank) else 3


def _columns(phi_q: Tensor, phi_k: Tensor, dtype: torch.dtype, products: int) -> tuple[list[Tensor], list[Tensor]]:
    """The columns, in `dtype`, that go beside queries and keys."""
    if products == 1:
        return [phi_q], [phi_k]
    (q_hi, q_lo), (k_hi, k_lo) = ((hi := phi.to(dtype), (phi - hi).to(dtype)) for phi in (phi_q, phi_k))
    return [q_hi, q_hi, q_lo, q_lo][:products], [k_hi, k_lo, k_hi, k_lo][:products]


def _beside(tokens: Tensor, columns: list[Tensor], width: int) -> Tensor:
    """`[tokens | columns | zeros]` of a given width, columns broadcast over what they share."""
    lead = tokens.shape[:-1]
    used = tokens.shape[-1] + sum(column.shape[-1] for column in columns)
    zeros = tokens.new_zeros(()).expand(*lead, width - used)
    return torch.cat([tokens, *(column.expand(*lead, -1) for column in columns), zeros], dim=-1)
