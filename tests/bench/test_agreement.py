"""The reference is checked against autograd through a dense softmax in float64."""

import math

import pytest
import torch

from flashbias.bench import agreement
from flashbias.bench.agreement import Reference, max_rel_error
from flashbias.bench.cases import CASES, Case

NAMES = ["full-32", "alibi-64-8k", "swin-49", "triangle-512", "mesh-32k"]


def dense_results(inputs, biased, grads):
    """Output and gradients by autograd, with the N×M matrix."""
    inputs = inputs.flat()
    case = inputs.case
    names = ("query", "key", "value", "phi_q", "phi_k")
    q, k, v, phi_q, phi_k = (getattr(inputs, name).double().requires_grad_() for name in names)
    bias = (phi_q @ phi_k.mT).detach().expand(phi_q.shape[0], case.num_heads, -1, -1).clone().requires_grad_()
    scores = case.scale * q @ k.mT
    if biased:
        # The matrix takes part twice with weight one half, so that both it and the factors get a gradient.
        scores = scores + (bias + phi_q @ phi_k.mT) / 2
    if case.is_causal:
        hidden = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    out = torch.softmax(scores, -1) @ v
    results = {"out": out.detach()}
    if grads:
        leaves = {"query": q, "key": k, "value": v}
        if biased:
            leaves |= {"phi_q": phi_q, "phi_k": phi_k, "bias": bias}
        found = torch.autograd.grad(out, tuple(leaves.values()), inputs.dout.double())
        results |= dict(zip(leaves, found, strict=True))
        for name in ("phi_q", "phi_k", "bias"):
            if name in results:
                results[name] = 2 * results[name]
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("grads", [True, False])
def test_reference_equals_autograd(name, biased, grads, monkeypatch):
    monkeypatch.setattr(agreement, "BLOCK_SCORES", 1500)  # several blocks of rows, and of batch entries
    inputs = CASES[name].small().inputs(torch.float32, "cpu")
    reference = Reference.compute(inputs, biased=biased, grads=grads)
    results = dense_results(inputs, biased, grads)
    results = {key: value for key, value in results.items() if key in reference.tensors}
    assert set(results) == set(reference.tensors)
    assert max_rel_error(results, reference) < 1e-6


@pytest.mark.parametrize("block", [1, 49 * 49, 2 * 49 * 49, 10**9])
def test_blocks_cover_every_query_once(block, monkeypatch):
    monkeypatch.setattr(agreement, "BLOCK_SCORES", block)
    seen = torch.zeros(5, 49, dtype=torch.int)
    for batch, queries in agreement._blocks(5, 49):
        seen[batch, queries] += 1
    assert (seen == 1).all()


def test_some_heads_are_checked_where_all_would_cost_too_much(monkeypatch):
    monkeypatch.setattr(agreement, "CHECKED_SCORES", 3 * 32**2)
    case = Case("wide", (1,), 7, 32, 8, 2)
    inputs = case.inputs(torch.float32, "cpu")
    reference = Reference.compute(inputs, biased=True, grads=True)
    assert reference.heads == (0, 3, 6)
    assert max_rel_error(dense_results(inputs, True, True), reference) < 1e-6


def test_all_heads_are_checked_where_a_gradient_sums_over_them(monkeypatch):
    monkeypatch.setattr(agreement, "CHECKED_SCORES", 1)
    inputs = CASES["mesh-32k"].small().inputs(torch.float32, "cpu")
    reference = Reference.compute(inputs, biased=True, grads=True)
    assert reference.heads == (0, 1)
    assert max_rel_error(dense_results(inputs, True, True), reference) < 1e-6


@pytest.fixture(scope="module")
def swin():
    inputs = CASES["swin-49"].small().inputs(torch.float32, "cpu")
    return Reference.compute(inputs, biased=True, grads=True), dense_results(inputs, True, True)


@pytest.mark.parametrize("name", ["out", "query", "key", "value", "phi_q", "phi_k", "bias"])
def test_every_result_is_looked_at(swin, name):
    reference, results = swin
    results = {key: value.clone() for key, value in results.items()}
    results[name] *= 1.05
    assert max_rel_error(results, reference) == pytest.approx(0.05, rel=1e-2)


def test_one_wrong_window_does_not_hide(swin):
    reference, results = swin
    out = results["out"].clone()
    out[-1, -1] = 0
    assert max_rel_error({"out": out}, reference) == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_is_infinitely_wrong(swin, value):
    reference, results = swin
    out = results["out"].clone()
    out[0, 0, 3, 5] = value
    assert max_rel_error({"out": out}, reference) == math.inf


def test_a_wrong_entry_of_a_dense_gradient_survives_the_projection(swin):
    reference, results = swin
    bias = results["bias"].clone()
    bias[0, 1, 7, 11] += bias[0, 1].norm()
    assert max_rel_error({"bias": bias}, reference) > 0.3


def test_another_shape_raises(swin):
    reference, results = swin
    with pytest.raises(ValueError, match="out has shape"):
        max_rel_error({"out": results["out"][:, :, :-1]}, reference)
