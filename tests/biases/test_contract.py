"""What every registered bias family owes, whatever it computes."""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashbias as fb
from flashbias.biases import Example, registry
from flashbias.factored import relative_lookup

FAMILIES = registry()


def examples() -> list[tuple[str, str]]:
    return [(family, e.name) for family, kind in FAMILIES.items() for e in kind.examples()]


def make(family: str, name: str) -> Example:
    return next(e for e in FAMILIES[family].examples() if e.name == name)


def has_gradients(family: str, name: str) -> bool:
    example = make(family, name)
    return bool(example.inputs) or any(True for _ in example.bias.parameters())


each_example = pytest.mark.parametrize(("family", "name"), examples())
each_differentiable = pytest.mark.parametrize(("family", "name"), [pair for pair in examples() if has_gradients(*pair)])


def lookup(bias: fb.FactoredBias) -> torch.Tensor | float:
    return 0.0 if bias.table is None else relative_lookup(bias.table.double(), *bias.codes())


def magnitude(bias: fb.FactoredBias) -> torch.Tensor:
    """`|phi_q| |phi_k|^T + |table|`: what a bound on the relative error of each term multiplies."""
    terms = bias.phi_q.double().abs() @ bias.phi_k.double().abs().mT
    return terms + (0.0 if bias.table is None else lookup(bias).abs())


def assert_within_bound(factored: fb.FactoredBias, formula: torch.Tensor, bound: float) -> None:
    formula = formula.to(factored.device)
    assert factored.shape == formula.shape
    error = (factored.dense(torch.float64) - formula).abs()
    # float64 itself rounds the formula and the product of the factors.
    allowed = (bound + 2.0**-48) * magnitude(factored)
    assert bool((error <= allowed).all()), f"error {error.max():.3g}, allowed there {allowed.max():.3g}"


def as_float32(example: Example) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() for x in example.inputs)


@each_example
def test_factors_equal_formula(family: str, name: str):
    example = make(family, name)
    inputs = as_float32(example)
    factored = example.factored(inputs=inputs)
    assert factored.phi_q.dtype == factored.phi_k.dtype == torch.float32
    assert_within_bound(factored, example.formula(inputs), FAMILIES[family].about.bound)


@each_example
def test_formula_is_not_trivial(family: str, name: str):
    formula = make(family, name).formula()
    assert formula.dtype == torch.float64
    assert formula.abs().max() > 0


@each_example
@given(data=st.data())
def test_slicing_positions_equals_slicing_factors(family: str, name: str, data: st.DataObject):
    example = make(family, name)
    inputs = as_float32(example)

    def part_of(length: int) -> range:
        start = data.draw(st.integers(0, length - 1))
        return range(start, data.draw(st.integers(start + 1, length)))

    queries, keys = part_of(example.seqlen_q), part_of(example.seqlen_k)
    called = example.factored(queries, keys, inputs)
    sliced = example.factored(inputs=inputs)[queries.start : queries.stop, keys.start : keys.stop]
    assert torch.equal(called.phi_q, sliced.phi_q)
    assert torch.equal(called.phi_k, sliced.phi_k)
    assert (called.table is None) == (sliced.table is None)
    assert torch.equal(torch.as_tensor(lookup(called)), torch.as_tensor(lookup(sliced)))


@each_differentiable
def test_gradients(family: str, name: str):
    example = make(family, name)
    example.bias.double()
    inputs = tuple(x.clone().requires_grad_() for x in example.inputs)
    leaves = (*example.bias.parameters(), *inputs)

    def dense(*_: torch.Tensor) -> torch.Tensor:
        # gradcheck moves the leaves in place, and the module and the inputs are those leaves.
        return example.factored(inputs=inputs).dense(torch.float64)

    assert torch.autograd.gradcheck(dense, leaves)


@each_differentiable
def test_gradients_equal_those_of_the_formula(family: str, name: str):
    example = make(family, name)
    example.bias.double()
    inputs = tuple(x.clone().requires_grad_() for x in example.inputs)
    leaves = (*example.bias.parameters(), *inputs)
    formula = example.formula(inputs)
    upstream = torch.randn(formula.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(formula, leaves, upstream)
    found = torch.autograd.grad(example.factored(inputs=inputs).dense(torch.float64), leaves, upstream)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))


@each_example
def test_state_dict_round_trip(family: str, name: str):
    source, target = make(family, name), make(family, name)
    with torch.no_grad():
        for parameter in source.bias.parameters():
            parameter += torch.linspace(0.5, 1.5, parameter.numel()).reshape(parameter.shape)
    file = io.BytesIO()
    torch.save(source.bias.state_dict(), file)
    file.seek(0)
    target.bias.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target.factored().dense(), source.factored().dense())
    if any(True for _ in source.bias.parameters()):
        assert not torch.equal(target.factored().dense(), make(family, name).factored().dense())


@each_example
def test_state_dict_holds_parameters_and_nothing_else(family: str, name: str):
    bias = make(family, name).bias
    assert set(bias.state_dict()) == {key for key, _ in bias.named_parameters()}


@each_example
def test_survives_a_deep_copy(family: str, name: str):
    example = make(family, name)
    before = example.factored().dense()
    copied = replace(example, bias=copy.deepcopy(example.bias))
    assert torch.equal(copied.factored().dense(), before)


@each_example
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_moves(family: str, name: str, dtype: torch.dtype):
    """Parameters are cast, as in any module; positions, slopes, frequencies and buckets are not."""
    example = make(family, name)
    inputs = as_float32(example)
    before = example.factored(inputs=inputs)
    example.bias.to(dtype)
    after = example.factored(inputs=inputs)
    assert after.phi_q.dtype in (torch.float32, torch.float64)
    assert_within_bound(after, example.formula(inputs), FAMILIES[family].about.bound)
    if not any(True for _ in example.bias.parameters()):
        assert torch.equal(after.dense(), before.dense())


@each_example
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_widened_first(family: str, name: str, dtype: torch.dtype):
    example = make(family, name)
    inputs = tuple(x.to(dtype) for x in example.inputs)
    if not all(bool(x.isfinite().all()) for x in inputs):
        inputs = tuple((x / 64).to(dtype) for x in example.inputs)
    factored = example.factored(inputs=inputs)
    assert factored.phi_q.dtype == factored.phi_k.dtype == torch.float32
    assert_within_bound(factored, example.formula(inputs), FAMILIES[family].about.bound)


@each_example
def test_moves_to_a_device(family: str, name: str):
    """The meta device stands for any: whatever was left behind on the CPU raises."""
    example = make(family, name)
    here = example.factored()
    example.bias.to("meta")
    there = example.factored(inputs=tuple(x.to("meta") for x in example.inputs))
    assert there.device.type == "meta"
    assert there.shape == here.shape
    assert there.rank == here.rank
    assert (there.table is None) == (here.table is None)


@pytest.mark.gpu
@each_example
def test_moves_to_cuda(family: str, name: str):
    example = make(family, name)
    inputs = as_float32(example)
    formula = example.formula(inputs)
    example.bias.to("cuda", torch.float32)
    there = example.factored(inputs=tuple(x.cuda() for x in inputs))
    assert there.device.type == "cuda"
    assert_within_bound(there, formula, FAMILIES[family].about.bound)


@each_example
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_attention_takes_it(family: str, name: str, impl: str):
    example = make(family, name)
    formula = example.formula()
    lead = formula.shape[:-3]
    generator = torch.Generator().manual_seed(2)

    def draw(length: int) -> torch.Tensor:
        shape = (*lead, example.bias.num_heads, length, 8)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v = draw(example.seqlen_q), draw(example.seqlen_k), draw(example.seqlen_k)
    expected = torch.softmax(q @ k.mT / 8**0.5 + formula, dim=-1) @ v
    found = fb.attention(q, k, v, example.factored(), impl=impl)
    # Factors are float32 here unless inputs make them float64; a row constant does no harm.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_declares_itself(family: str):
    about = FAMILIES[family].about
    assert all((about.title, about.formula, about.rank, about.exactness))
    assert about.url.startswith("https://")
    assert 0.0 <= about.bound < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_file_opens_with_its_paper(family: str):
    docstring = sys.modules[FAMILIES[family].__module__].__doc__ or ""
    about = FAMILIES[family].about
    assert docstring.startswith(about.title)
    assert about.url in docstring
    for word in ("b[h, i, j]", "phi_q", "phi_k", "rank", "exactness"):
        assert word in docstring, word


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Sum"])
@pytest.mark.parametrize("num_heads", [0, -1, 2.0])
def test_rejects_a_bad_number_of_heads(family: str, num_heads: int):
    arguments = {
        "RegionMask": {"num_regions": 2},
        "ShiftedWindowMask": {"size": (4, 4), "window": (2, 2)},
        "WindowBias": {"window": (2, 2)},
    }
    with pytest.raises(ValueError, match="num_heads"):
        FAMILIES[family](num_heads, **arguments.get(family, {}))
