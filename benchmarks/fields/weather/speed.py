"""Attention of Pangu-Weather's outer layer alone: 30 x 124 windows of 2 x 6 x 12 tokens, 6 heads of 32.

Its bias has 124 types of windows times 6 heads. The learned tables are those of the small model, whose windows have the
same sides, repeated as often as it takes; random ones, "fresh" (standard deviation 0.02, as training starts) and
"sharp" (0.5), say what rank a table needs that nothing was learned in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.fields.weather.factors import PAPER_RANK, Spectrum, certified, fill_ranks
from benchmarks.fields.weather.record import Record
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashbias as fb
from flashbias.factored import FactoredBias

__all__ = ["speed"]

Attend = Callable[[Tensor, Tensor, Tensor], Any]

TOLERANCES = (0.1, 0.01)
RANDOM_TABLES = 12
LARGEST_DIFFERENCE = 0.02
"""Of bfloat16 from float32, norms, for what computes the same."""


@dataclass(frozen=True)
class Size:
    """How large the layer is.

    Args:
        around: windows around the globe.
        windows: over pressure and latitude; their product is the number of types.
        heads: of a window.
        head_dim: of a head.
        distinct: how many learned tables to take.
    """

    around: int = 30
    windows: tuple[int, int] = (4, 31)
    window: tuple[int, int, int] = (2, 6, 12)
    heads: int = 6
    head_dim: int = 32
    distinct: int = 36


TINY = Size(2, (1, 2), heads=2, head_dim=8, distinct=4)


def speed(record: Record, tables: Tensor) -> None:
    """Ranks of learned and random tables, then times with the learned ones.

    Args:
        record: where rows go.
        tables: `[rows, tables]`, learned.
    """
    size = TINY if record.arguments.small else Size()
    torch.manual_seed(record.arguments.seed)
    spaced = torch.linspace(0, tables.shape[1] - 1, min(size.distinct, tables.shape[1])).long()
    learned = tables[:, spaced.to(tables.device)].float().cpu()
    found = _ranks(record, size, learned)
    record.write()
    with torch.no_grad():
        _attention(record, size, learned, found)
    record.write()


def _matrices(size: Size, tables: Tensor) -> Tensor:
    """`[tables, tokens, tokens]`."""
    return _biased(size, tables, 1, (1, tables.shape[1]))().dense().detach()


def _biased(size: Size, tables: Tensor, heads: int, windows: tuple[int, int]) -> fb.EarthSpecificBias:
    """The bias with these tables, repeated over types and heads."""
    bias = fb.EarthSpecificBias(heads, windows=windows, window=size.window)
    count = bias.num_types * heads
    with torch.no_grad():
        bias.weight.copy_(tables[:, torch.arange(count) % tables.shape[1]].unflatten(1, (bias.num_types, heads)))
    return bias


def _ranks(record: Record, size: Size, learned: Tensor) -> dict[float, FactoredBias]:
    """Of learned tables the factors by tolerance; a row for each kind of tables and tolerance."""
    few = 2 if record.arguments.small else RANDOM_TABLES
    kinds = {"learned": learned}
    kinds |= {name: std * torch.randn(len(learned), few) for name, std in (("fresh", 0.02), ("sharp", 0.5))}
    found: dict[float, FactoredBias] = {}
    for kind, tables in kinds.items():
        matrices = _matrices(size, tables)
        with record.row("tables", provider="SVD", weights=kind, rank=PAPER_RANK) as row:
            _, bounds, kept = Spectrum.of(matrices).cut(PAPER_RANK)
            row["energy"] = round(kept, 6)
            row["certificate"] = f"{float(bounds.max()):.3e}"
        for tol in TOLERANCES:
            with record.row("tables", provider="compress", weights=kind, tol=tol) as row:
                began = time.perf_counter()
                form = certified(matrices, tol)
                row["seconds"] = round(time.perf_counter() - began, 2)
                fill_ranks(row, [form])
                if kind == "learned":
                    found[tol] = form
    return found


# -------------------------------------------------------------------- times


def _attention(record: Record, size: Size, learned: Tensor, found: dict[float, FactoredBias]) -> None:
    device, dtype = record.device, record.dtype
    bias = _biased(size, learned, size.heads, size.windows).to(device)
    shape = (size.around, bias.num_types * size.heads, bias.num_tokens, size.head_dim)
    record.summary["attention_shape"] = list(shape)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    exact = bias().detach()
    wide = exact.dense()
    expected = F.scaled_dot_product_attention(*(x[:1].float() for x in (q, k, v)), attn_mask=wide[None])
    matrix = wide.to(dtype)
    del wide
    for provider, (prepare, about) in _ways(record, shape[1], matrix, exact, learned, size, found).items():
        with record.row("attention", provider=provider, **about) as row:
            run = prepare()
            difference = float((run(q, k, v)[:1].float() - expected).norm() / expected.norm())
            row["difference"] = f"{difference:.2e}"
            comparable = about["weights"] == "learned" and not about.get("rank")
            if comparable and not difference <= LARGEST_DIFFERENCE:
                row["status"] = "wrong"
                continue
            record.time(row, lambda run=run: run(q, k, v), 0.2)
            record.summary[f"ms {provider}"] = row["ms"]


def _ways(
    record: Record,
    count: int,
    matrix: Tensor,
    exact: FactoredBias,
    learned: Tensor,
    size: Size,
    found: dict[float, FactoredBias],
) -> dict[str, tuple[Callable[[], Attend], dict[str, object]]]:
    """Each provider: how to prepare it, and the columns of its row. "weights" is empty where there is no bias."""

    def repeated(form: FactoredBias) -> Attend:
        assert form.phi_q is not None and form.phi_k is not None
        index = torch.arange(count) % len(form.phi_q)
        whole = FactoredBias(form.phi_q[index], form.phi_k[index]).to(record.device)
        return lambda q, k, v: fb.attention(q, k, v, whole)

    def sdpa(backend: SDPBackend | None, mask: Tensor | None) -> Callable[[], Attend]:
        return lambda: _held_to(backend, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    dense: dict[str, object] = {"weights": "learned"}
    free: dict[str, object] = {"weights": ""}
    spread = matrix[None]
    ways: dict[str, tuple[Callable[[], Attend], dict[str, object]]] = {}
    ways["dense SDPA"] = (sdpa(None, spread), dense)
    on_gpu = record.device.type == "cuda"
    if on_gpu:
        ways["dense SDPA, efficient"] = (sdpa(SDPBackend.EFFICIENT_ATTENTION, spread), dense)
        ways["dense SDPA, cuDNN"] = (sdpa(SDPBackend.CUDNN_ATTENTION, spread), dense)
        ways["bias-free, flash"] = (sdpa(SDPBackend.FLASH_ATTENTION, None), free)
        ways["bias-free, cuDNN"] = (sdpa(SDPBackend.CUDNN_ATTENTION, None), free)
    ways["bias-free"] = (sdpa(None, None), free)
    ways["exact table"] = (lambda: lambda q, k, v: fb.attention(q, k, v, exact), dense)
    for tol, form in found.items():
        about: dict[str, object] = {
            "weights": "learned",
            "tol": tol,
            "rank": form.rank,
            "certificate": f"{form.report.certificate:.3e}",
        }
        ways[f"factors, tol {tol:g}"] = (lambda form=form: repeated(form), about)
    about = {"weights": "learned", "rank": PAPER_RANK}
    for dtype in (torch.float32, torch.bfloat16):
        ways[f"factors, rank {PAPER_RANK}, {str(dtype).removeprefix('torch.')}"] = (
            lambda dtype=dtype: repeated(Spectrum.of(_matrices(size, learned)).cut(PAPER_RANK)[0].to(dtype)),
            about,
        )
    if on_gpu:
        ways["FlexAttention"] = (lambda: _flex(matrix), dense)
    return ways


def _held_to(backend: SDPBackend | None, run: Attend) -> Attend:
    if backend is None:
        return run

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with sdpa_kernel(backend):
            return run(q, k, v)

    return attend


def _flex(matrix: Tensor) -> Attend:
    """A score function that reads the matrix, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor) -> Any:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + matrix[h, i, j]

        return flex_attention(q, k, v, score_mod)

    compiled = torch.compile(attend, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, matrix)
