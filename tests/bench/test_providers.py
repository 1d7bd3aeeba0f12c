import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flashbias.bench import peers, providers
from flashbias.bench.agreement import TOLERANCE, Reference, max_rel_error
from flashbias.bench.cases import CASES, Case
from flashbias.bench.providers import FAMILIES, Provider, find_providers, provider_names, registry

SMALL = [
    case.small()
    for case in CASES.values()
    if case.name in ("full-32", "alibi-64-8k", "swin-49", "triangle-512", "mesh-32k")
]
CPU_PROVIDERS = [name for name in provider_names() if name.endswith(("/sdpa", "/sdpa-math", "/reference"))]


def error_of(name: str, case: Case, dtype: torch.dtype, grads: bool) -> float:
    provider = registry()[name]
    inputs = case.inputs(dtype, "cpu")
    prepared = provider.prepare(inputs, grads)
    results = prepared.named(prepared.run(grads))
    expected = {"out"}
    if grads:
        expected |= {"query", "key", "value"}
        if case.learns_bias and provider.family in ("ours", "concat", "ours-deterministic"):
            expected |= {"phi_q", "phi_k"}
        if provider.family == "dense+grad":
            expected |= {"bias"}
    assert set(results) == expected
    return max_rel_error(results, Reference.compute(inputs, biased=provider.biased, grads=grads))


@pytest.mark.parametrize("name", CPU_PROVIDERS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_providers_agree_with_float64(name, case):
    for pass_name in ("fwd", "fwdbwd"):
        if registry()[name].applies(case, pass_name):
            assert error_of(name, case, torch.float32, pass_name == "fwdbwd") < 1e-5


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_half_precision_is_within_the_tolerance_of_the_check(case):
    for name in ("ours/sdpa", "dense/sdpa", "concat/sdpa", "bias-free/sdpa"):
        assert error_of(name, case, torch.bfloat16, True) < TOLERANCE[torch.bfloat16] / 2


def test_concatenated_alibi_is_right_far_out():
    """Positions rounded to bfloat16 would be off by tens here."""
    case = Case("far", (1,), 1, 2500, 16, 2, "alibi", is_causal=True, shared=True)
    assert error_of("concat/sdpa", case, torch.bfloat16, False) < TOLERANCE[torch.bfloat16] / 2


# -------------------------------------------------------------------- which rows there are


def test_names():
    names = provider_names()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == set(FAMILIES)
    for peer in ("sdpa-efficient", "sdpa-cudnn", "sdpa-flash", "flex", "flex-fa4", "fa4"):
        assert f"concat/{peer}" in names
        assert f"bias-free/{peer}" in names
    for peer in ("sdpa-efficient", "sdpa-cudnn", "flex", "flex-fa4", "cuequivariance", "trifast"):
        assert f"dense/{peer}" in names
        assert f"dense+grad/{peer}" in names
    assert {name for name in names if name.startswith("alibi/")} == {"alibi/flex", "alibi/flex-fa4"}
    assert "dense/sdpa-flash" not in names  # it takes no bias


def test_ours_run_first():
    families = [provider.family for provider in registry().values()]
    assert families == sorted(families, key=lambda family: not family.startswith("ours"))


def test_selection_by_name_family_and_pattern():
    assert [p.name for p in find_providers(["dense/flex", "ours/sdpa"], "cuda")] == [
        "ours/sdpa",
        "dense/flex",
    ]
    dense = {p.name for p in find_providers(["dense"], "cuda")}
    assert "dense/sdpa-cudnn" in dense
    assert "dense/sdpa-math" not in dense
    assert {p.name for p in find_providers(["dense"], "cpu")} == {"dense/sdpa"}
    assert all(p.name.endswith("/fa4") for p in find_providers(["*/fa4"], "cuda"))
    own = Provider("own/one", registry()["ours/sdpa"].prepare)
    assert find_providers([own, "ours/sdpa"], "cpu") == [own, registry()["ours/sdpa"]]
    with pytest.raises(ValueError, match=r"unknown provider 'sparse'.*families"):
        find_providers(["sparse"], "cpu")


def test_rows_that_make_no_sense_are_not_there():
    alibi, full = CASES["alibi-64-8k"], CASES["full-64"]
    assert registry()["alibi/flex"].applies(alibi, "fwd")
    assert not registry()["alibi/flex"].applies(full, "fwd")
    assert not registry()["dense+grad/flex"].applies(full, "fwd")
    assert registry()["dense+grad/flex"].applies(full, "fwdbwd")


def test_a_bias_beyond_int32_is_never_given_to_flex_attention():
    for name, unsupported in (("mesh-32k", True), ("alibi-128-16k", True), ("alibi-64-8k", False)):
        case = CASES[name]
        reason = peers.PEERS["flex"].limit(case, case.num_heads * case.seqlen**2)
        assert (reason == "index overflow beyond 2^31 elements") == unsupported


def test_unsupported_is_said_before_anything_is_computed():
    inputs = CASES["full-32"].small().inputs(torch.float32, "cpu")
    with pytest.raises(peers.Unsupported, match="no gradient to the bias"):
        registry()["dense+grad/sdpa-cudnn"].prepare(inputs, True)
    with pytest.raises(peers.Unsupported, match="N rows and N columns"):
        registry()["dense/trifast"].prepare(inputs, False)
    causal = CASES["alibi-64-8k"].small().inputs(torch.float32, "cpu")
    with pytest.raises(peers.Unsupported, match="no causal mask"):
        registry()["dense/cuequivariance"].prepare(causal, False)


def test_a_package_that_is_missing_is_not_installed():
    assert not Provider("x/y", registry()["ours/sdpa"].prepare, module="no_such_package.inner").is_installed()
    assert Provider("x/y", registry()["ours/sdpa"].prepare, module="torch.nn").is_installed()


@pytest.mark.parametrize(
    ("d", "extra", "grads", "widths"),
    [
        (128, 16, True, (144, 128)),
        (64, 6, False, (72, 64)),
        (64, 6, True, (80, 64)),  # 72 is reported wrong
        (32, 8, True, (48, 32)),  # 40 does not compile
        (32, 32, True, (64, 64)),  # nor does 64 beside 32
        (32, 32, False, (64, 32)),
        (16, 15, True, (32, 32)),
    ],
)
def test_widths_for_flash_attention_4(d, extra, grads, widths):
    assert peers.PEERS["fa4"].concat_widths(d, extra, grads) == widths


# -------------------------------------------------------------------- wrappers of packages


def attend(q, k, v, bias=None, causal=False, scale=None):
    """Plain attention in [..., N, d]."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


def module(monkeypatch, name, **functions):
    parent, _, _child = name.rpartition(".")
    if parent:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    fake = ModuleType(name)
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, name, fake)


@pytest.fixture
def fake_peers(monkeypatch):
    """The calling conventions of packages that need a GPU, over plain attention."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N, H, d]
        out = attend(q, k, v, None, causal, softmax_scale)
        return out.transpose(1, 2), None

    def cuequivariance(q, k, v, bias, mask=None, scale=None, return_aux=False):
        batch, _, heads, n, _ = q.shape
        assert bias.shape == (batch, 1, heads, n, k.shape[-2])
        assert bias.dtype == torch.float32
        return attend(q, k, v, bias, scale=scale)

    def trifast(q, k, v, b, mask):
        batch, heads, rows, n, _ = q.shape
        assert b.shape == (batch, heads, n, n)
        assert mask.shape == (batch, rows, n)
        assert not mask.any()  # True hides a key there
        return attend(q, k, v, b[:, :, None])

    module(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    module(monkeypatch, "cuequivariance_torch", triangle_attention=cuequivariance)
    module(monkeypatch, "trifast", triangle_attention=trifast)


SQUARE = Case("square", (1, 24), 2, 24, 16, 4, shared=True)


@pytest.mark.parametrize("family", ["bias-free", "concat"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_flash_attention_4_wrapper(fake_peers, family, case):
    assert error_of(f"{family}/fa4", case, torch.float32, True) < 1e-5


@pytest.mark.parametrize("family", ["dense", "dense+grad"])
@pytest.mark.parametrize("case", [*(case for case in SMALL if not case.is_causal), SQUARE], ids=lambda case: case.name)
def test_cuequivariance_wrapper(fake_peers, family, case):
    assert error_of(f"{family}/cuequivariance", case, torch.float32, True) < 1e-5


@pytest.mark.parametrize("family", ["dense", "dense+grad"])
def test_trifast_wrapper(fake_peers, family):
    assert error_of(f"{family}/trifast", SQUARE, torch.float32, True) < 1e-5


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention's score functions through plain attention; the compiler is not under test."""
    from torch.nn.attention import flex_attention as flex

    def flex_attention(q, k, v, score_mod=None, block_mask=None, scale=None, kernel_options=None):
        b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (*q.shape[:3], k.shape[2])), indexing="ij")
        scores = q @ k.mT * scale
        scores = scores if score_mod is None else score_mod(scores, b, h, i, j)
        if block_mask is not None:
            scores = scores.masked_fill(~block_mask.mask_mod(b, h, i, j), -math.inf)
        return scores.softmax(-1) @ v

    monkeypatch.setattr(flex, "flex_attention", flex_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize(
    "name", ["bias-free/flex", "alibi/flex", "dense/flex", "dense+grad/flex", "concat/flex", "dense/flex-fa4"]
)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_flex_score_functions(eager_flex, name, case):
    if registry()[name].applies(case, "fwdbwd"):
        assert error_of(name, case, torch.float32, True) < 1e-5


def test_flex_attention_compiles_the_whole_call(monkeypatch):
    """One graph, captured matrix and all; traced for the CPU, where no kernel is built for it."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    case = CASES["swin-49"].small()
    assert error_of("dense/flex", case, torch.float32, False) < 1e-5


def test_dense_bias_carries_the_causal_mask_for_sdpa_only():
    flat = CASES["alibi-64-8k"].small().inputs(torch.float32, "cpu").flat()
    masked, plain = (providers._dense_bias(flat, torch.float32, masked=masked) for masked in (True, False))
    future = torch.ones(masked.shape[-2:], dtype=torch.bool).triu(1)
    assert (masked[..., future] == -math.inf).all()
    assert torch.equal(masked[..., ~future], plain[..., ~future])
    assert plain.isfinite().all()


@pytest.mark.filterwarnings("ignore:Flash attention:UserWarning")  # torch says why it declines
def test_sdpa_is_held_to_one_backend():
    attend_flash = peers.PEERS["sdpa-flash"].build(CASES["full-32"].small(), "none", torch.device("cpu"))
    q = torch.randn(1, 1, 8, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="No available kernel"):
        attend_flash(q, q, torch.randn(1, 1, 8, 16, dtype=torch.float64))
    torch.testing.assert_close(attend_flash(q, q, q), F.scaled_dot_product_attention(q, q, q))
