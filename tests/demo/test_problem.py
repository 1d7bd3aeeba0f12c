from __future__ import annotations

import pytest
import torch

from flashbias.attention import attention
from flashbias.biases import SquaredDistance
from flashbias.demo.problem import METHODS, Problem, forward, make_problem, tiny, training_step, truth

PARAMETERS = ["query", "key", "value", "weight"]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(1, num_heads=4, head_dim=16, device=torch.device("cpu"), dtype=torch.float32)


def reference(problem: Problem) -> torch.Tensor:
    """The library's own oracle in float64, for the truth that the demo works out by itself."""
    coordinates, weight = problem.coordinates.double(), problem.weight.double()
    bias = SquaredDistance(weight.shape[0])(coordinates, weight=weight)
    q, k, v = (x.double() for x in problem.parameters[:3])
    return attention(q, k, v, bias, impl="reference")


def test_truth_is_that_of_the_oracle(problem: Problem) -> None:
    (out,), _ = truth(problem)
    torch.testing.assert_close(out, reference(problem)[:, :, problem.scored].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_output_agrees_with_truth(problem: Problem, method: str) -> None:
    (out,), _ = truth(problem)
    torch.testing.assert_close(forward(problem, METHODS[method])[0].double(), out, rtol=0, atol=1e-4)


def test_gradients_are_as_good_as_those_of_the_matrix(problem: Problem) -> None:
    _, gradients = truth(problem)
    found = {method: training_step(problem, METHODS[method]) for method in METHODS}
    for name, dense, factored, true in zip(PARAMETERS, *found.values(), gradients, strict=True):
        assert error(dense, true) < 1e-4
        assert error(factored, true) < 2 * error(dense, true) + 2**-20, name


def error(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true).abs().max() / true.abs().max())


def test_heads_have_length_scales_that_double(problem: Problem) -> None:
    lengths = (0.5 / problem.weight.detach()).sqrt()
    torch.testing.assert_close(lengths, torch.tensor([4.0, 8.0, 16.0, 32.0]))


def test_tiny_is_a_problem_of_its_own(problem: Problem) -> None:
    small = tiny(problem)
    assert small.query.shape[2] == 64
    for gradient in training_step(small, METHODS["factored"]):
        assert torch.isfinite(gradient).all()
    assert problem.query.grad is None
