import csv
from pathlib import Path

import pytest
import torch

from flashbias.bench.cases import CASES, Case, case_names, find_cases, flatten

NAMES = [
    "full-128",
    "full-64",
    "full-32",
    "alibi-128-4k",
    "alibi-128-16k",
    "alibi-64-8k",
    "swin-576",
    "swin-49",
    "triangle-512",
    "triangle-1024",
    "mesh-32k",
]


def test_names_are_frozen():
    assert case_names() == NAMES


@pytest.mark.parametrize(
    ("name", "shape", "rank"),
    [
        ("full-128", (1, 16, 8192, 128), 16),
        ("full-64", (1, 16, 8192, 64), 16),
        ("full-32", (2, 4, 8192, 32), 8),
        ("alibi-128-4k", (4, 32, 4096, 128), 2),
        ("alibi-128-16k", (1, 32, 16384, 128), 2),
        ("alibi-64-8k", (1, 25, 8192, 64), 2),
        ("swin-576", (1024, 4, 576, 32), 16),
        ("swin-49", (4096, 4, 49, 32), 16),
        ("triangle-512", (1, 512, 4, 512, 32), 32),
        ("triangle-1024", (1, 1024, 4, 1024, 32), 32),
        ("mesh-32k", (1, 8, 32186, 16), 5),
    ],
)
def test_shapes_are_frozen(name, shape, rank):
    case = CASES[name]
    assert (*case.batch, case.num_heads, case.seqlen, case.head_dim) == shape
    assert case.rank == rank
    assert case.is_causal == name.startswith("alibi")


@pytest.mark.parametrize("name", NAMES)
def test_inputs_have_the_declared_shapes(name):
    case = CASES[name].small()
    inputs = case.inputs(torch.bfloat16, "cpu")
    tokens = (*case.batch, case.num_heads, case.seqlen, case.head_dim)
    for tensor in (inputs.query, inputs.key, inputs.value, inputs.dout):
        assert tensor.shape == tokens
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
    lead = tuple(1 for _ in case.batch) if case.shared else case.batch
    assert inputs.phi_q.shape == (*lead, case.num_heads, case.seqlen, case.rank)
    heads_of_keys = case.num_heads if case.bias == "low-rank" else 1
    assert inputs.phi_k.shape == (*lead, heads_of_keys, case.seqlen, case.rank)
    expected = torch.bfloat16 if case.bias == "low-rank" else torch.float32
    assert inputs.phi_q.dtype == inputs.phi_k.dtype == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_bias_is_of_order_one_and_not_constant(name):
    inputs = CASES[name].small().inputs(torch.float32, "cpu").flat()
    dense = inputs.phi_q.double() @ inputs.phi_k.double().mT
    if CASES[name].bias == "alibi":
        i = torch.arange(dense.shape[-1], dtype=torch.float64)
        assert inputs.slopes is not None
        expected = inputs.slopes.double()[:, None, None] * (i[None, :] - i[:, None])
        torch.testing.assert_close(dense, expected.expand_as(dense), atol=1e-5, rtol=0)
    else:
        assert 0.3 < dense.std() < 3
        assert dense.abs().max() < 12


def test_distance_factors_are_the_squared_distance():
    inputs = CASES["mesh-32k"].small().inputs(torch.float32, "cpu").flat()
    dense = inputs.phi_q.double() @ inputs.phi_k.double().mT
    assert (dense < 1e-5).all()  # a penalty
    diagonal = dense.diagonal(dim1=-2, dim2=-1)
    assert diagonal.abs().max() < 1e-5  # nothing between a point and itself
    weight = dense[:, :1] / dense[:, 1:2]
    off = ~torch.eye(dense.shape[-1], dtype=torch.bool)
    ratio = weight[..., off].reshape(*weight.shape[:2], dense.shape[-1], -1)
    assert (ratio.std(-1) / ratio.mean(-1)).max() < 1e-3  # one weight for every query, at all distances


def test_seed_decides_the_values():
    case = CASES["swin-49"].small()
    first, again, other = (case.inputs(torch.float32, "cpu", seed).query for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cases_draw_different_values():
    a, b = (CASES[name].small().inputs(torch.float32, "cpu").query for name in ("alibi-128-4k", "alibi-128-16k"))
    assert not torch.equal(a.flatten()[:32], b.flatten()[:32])


def test_flat_merges_the_batch_without_copying():
    inputs = CASES["triangle-512"].small().inputs(torch.float32, "cpu")
    flat = inputs.flat()
    assert flat.query.dim() == 4
    assert flat.query.data_ptr() == inputs.query.data_ptr()
    assert flat.phi_q.shape[0] == 1
    assert flatten(inputs.query).shape == flat.query.shape


def test_small_keeps_the_kind_and_changes_the_name():
    for case in CASES.values():
        small = case.small()
        assert small.name == f"{case.name}@small"
        assert (small.bias, small.rank, small.is_causal, small.shared) == (
            case.bias,
            case.rank,
            case.is_causal,
            case.shared,
        )
        assert small.seqlen <= case.seqlen
        assert small.seqlen % 2 == case.seqlen % 2


def test_find_cases():
    own = Case("own", (1,), 1, 8, 8, 2)
    assert find_cases(["swin-49", own]) == [CASES["swin-49"], own]
    assert find_cases(["swin-49"], small=True) == [CASES["swin-49"].small()]
    assert find_cases(["own"], known={"own": own}) == [own]
    with pytest.raises(ValueError, match=r"unknown case 'swin-49'; cases are own$"):
        find_cases(["swin-49"], known={"own": own})
    with pytest.raises(ValueError, match=r"unknown case 'swin-48'.*swin-49"):
        find_cases(["swin-48"])
    with pytest.raises(ValueError, match="no case given"):
        find_cases([])


def test_committed_results_speak_of_frozen_cases():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for path in results.rglob("bench.csv"):
        with path.open(newline="") as file:
            assert {row["case"] for row in csv.DictReader(file)} <= set(NAMES)
