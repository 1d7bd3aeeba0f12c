"""ALiBi alone, at the shapes of language models of 7B (heads of 128) and below (heads of 64), and long texts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from benchmarks.fields.language.results import Results
from torch import Tensor

import flashbias as fb
from flashbias.bench.cases import Case, Inputs, find_cases
from flashbias.bench.providers import Prepared, Provider, find_providers
from flashbias.bench.rows import Job, RowTimer, Settings

__all__ = ["CASES", "attention"]

CASES = tuple(
    Case(f"alibi-{head_dim}-{seqlen // 1024}k", (1,), 32, seqlen, head_dim, 2, "alibi", True, True)
    for head_dim, seqlen in ((128, 4096), (128, 16384), (128, 8192), (64, 4096), (64, 16384), (64, 8192))
)
"""In the order of what is wanted most, in case time runs out."""

PASSES = ("fwdbwd", "fwd")
"""With gradients first: their reference serves both."""

PEERS = (
    "alibi/flex",
    "dense/sdpa-cudnn",
    "dense/sdpa-efficient",
    "bias-free/sdpa-cudnn",
    "bias-free/fa4",
    "alibi/flex-fa4",
)

ROW_SECONDS = 25.0


def attention(results: Results) -> None:
    """Time every provider at every shape, each after its agreement with float64."""
    arguments, device = results.arguments, results.device
    shapes = {case.name: case for case in CASES}
    cases = find_cases(arguments.cases or shapes, small=arguments.small, known=shapes)
    known = {provider.name: provider for provider in (OURS, EAGER, *find_providers(PEERS, device.type))}
    providers = [known[name] for name in arguments.providers or known]
    timer = RowTimer(
        Settings(str(device), arguments.seed, 0.01, 2, ROW_SECONDS)
        if arguments.small
        else Settings(str(device), arguments.seed, 0.15, 5, ROW_SECONDS)
    )
    began = time.perf_counter()
    for case in cases[:1] if arguments.small else cases:
        time_case(results, timer, case, providers, began)
        results.write()
    timer.close()
    for name, value in ratios(results).items():
        results.summary[name] = value


def time_case(results: Results, timer: RowTimer, case: Case, providers: Sequence[Provider], began: float) -> None:
    """A row for each pass and provider of one shape."""
    dtype = "float32" if results.device.type == "cpu" else "bfloat16"
    for pass_name in PASSES:
        for provider in providers:
            if not provider.is_installed():
                continue
            job = Job(case, pass_name, provider, dtype)
            left = results.arguments.attention_seconds - (time.perf_counter() - began)
            row = timer.measure(job, min(ROW_SECONDS, left)) if left > 0 else job.row("skipped: time limit")
            results.add(
                "attention", quiet=False, case=case.name, provider=provider.name, seqlen=case.seqlen, ms=row.median_ms,
                p10_ms=row.p10_ms, p90_ms=row.p90_ms, peak_mib=row.peak_mib, error=row.max_rel_error,
                status=row.status, **{"pass": pass_name},
            )  # fmt: skip


def ratios(results: Results) -> dict[str, float]:
    """How many times as long eager and FlexAttention take as ours, by shape and pass."""
    times = {
        (row["case"], row["pass"], row["provider"]): float(str(row["ms"]))
        for row in results.rows
        if row["part"] == "attention" and row["status"] == "ok"
    }
    return {
        f"{case}_{pass_name}_{name}_over_ours": round(times[case, pass_name, rival] / ms, 3)
        for (case, pass_name, provider), ms in times.items()
        for name, rival in (("eager", EAGER.name), ("flex", "alibi/flex"))
        if provider == OURS.name and (case, pass_name, rival) in times
    }


# -------------------------------------------------------------------- providers of this field


def prepare_ours(inputs: Inputs, grads: bool) -> Prepared:
    """The call as users write it: the library chooses."""
    leaves = tokens_of(inputs, grads)
    query, key, value = leaves.values()
    bias = fb.FactoredBias(inputs.phi_q, inputs.phi_k)

    def forward() -> Tensor:
        out = fb.attention(query, key, value, bias, is_causal=True, scale=inputs.case.scale)
        assert isinstance(out, Tensor)  # no lse was asked for
        return out

    return Prepared(forward, leaves if grads else {}, inputs.dout)


def prepare_eager(inputs: Inputs, grads: bool) -> Prepared:
    """Scores, bias, mask and softmax one after the other, as MPT does in transformers.

    ALiBi is a float32 row of each head there, `slope * (j - N + 1)`, and the mask a matrix of booleans; both are made
    once for all layers, so they are not timed.
    """
    leaves = tokens_of(inputs, grads)
    query, key, value = leaves.values()
    assert inputs.slopes is not None  # every case is ALiBi
    length, device = inputs.case.seqlen, query.device
    row = inputs.slopes[:, None, None] * torch.arange(1 - length, 1, device=device)
    future = torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)

    def forward() -> Tensor:
        scores = (query @ key.mT) * inputs.case.scale + row
        scores = scores.masked_fill(future, torch.finfo(query.dtype).min)
        return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value

    return Prepared(forward, leaves if grads else {}, inputs.dout)


def tokens_of(inputs: Inputs, grads: bool) -> dict[str, Tensor]:
    """Query, key and value as leaves of an autograd graph of their own."""
    tokens = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    return {name: tensor.detach().requires_grad_(grads) for name, tensor in tokens.items()}


OURS = Provider("ours/auto", prepare_ours)
EAGER = Provider("eager/transformers", prepare_eager)
