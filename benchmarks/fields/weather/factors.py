"""The bias of all windows of the trained model as factors: what that does to its predictions."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.fields.weather.record import Record
from benchmarks.fields.weather.train import Study, with_forms
from benchmarks.record import Row
from torch import Tensor

import flashbias as fb
from flashbias.decompose.bound import certificate, row_spread
from flashbias.factored import FactoredBias
from flashbias.files import whole_file

__all__ = ["PAPER_RANK", "Spectrum", "certified", "factor", "fill_ranks"]

PAPER_RANK = 56
"""Which FlashBias takes for Pangu-Weather."""

RANKS = (4, 8, 16, 32, PAPER_RANK, 96, 128)
TOLERANCES = (0.1, 0.03, 0.01)
SHOWN_TOL = 0.1


def factor(record: Record, study: Study) -> None:
    """By rank, then by tolerance."""
    months = torch.tensor(study.winds.held_out, device=record.device)
    if record.arguments.small:
        months = months[:2]
    expected = study.predicted(months)
    _by_rank(record, study, months, expected)
    record.write()
    shown = _by_tolerance(record, study, months, expected)
    _save(record, study, {"without factors": expected[0], **shown}, months[0])
    record.write()


@dataclass(frozen=True)
class Spectrum:
    """An SVD of `[H, N, N]`, rows centred first: a constant of a row changes no probability."""

    centred: Tensor
    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> Spectrum:
        """In float64, on the CPU."""
        matrices = matrices.double().cpu()
        centred = matrices - matrices.mean(-1, keepdim=True)
        return cls(centred, *torch.linalg.svd(centred))

    def cut(self, rank: int) -> tuple[FactoredBias, Tensor, float]:
        """The first terms; the bound on the output of each head, and the share of the squares that is kept."""
        left, right = self.left[..., :rank] * self.values[:, None, :rank], self.right[:, :rank].mT
        spread = row_spread(left @ right.mT - self.centred).amax(-1)
        kept = self.values[:, :rank].square().sum() / self.values.square().sum()
        return FactoredBias(left.float().contiguous(), right.float().contiguous()), certificate(spread), float(kept)


def certified(matrices: Tensor, tol: float) -> FactoredBias:
    """Factors that `compress` vouches for, as many columns as they take."""
    found = fb.compress(matrices.float(), tol=tol, table=None, max_rank=matrices.shape[-1])
    assert isinstance(found, FactoredBias)
    return found


def _matrices(study: Study) -> list[Tensor]:
    return [attention.bias().dense().detach().cpu() for attention in study.model.attentions]


def _by_rank(record: Record, study: Study, months: Tensor, expected: Tensor) -> None:
    """Predictions with the product of the factors as a matrix: the difference is theirs, and not a kernel's."""
    spectra = [Spectrum.of(matrices) for matrices in _matrices(study)]
    with record.row("rank", provider="no bias", rank=0, energy=0.0) as row:
        bounds = [float(certificate(row_spread(spectrum.centred).amax())) for spectrum in spectra]
        row["certificate"] = f"{max(bounds):.3e}"
        nothing = [torch.zeros_like(spectrum.centred) for spectrum in spectra]
        _compare(row, study, with_forms(study, nothing, months), months, expected)
    for rank in RANKS:
        with record.row("rank", provider="SVD", rank=rank) as row:
            forms, bounds, kept = zip(*(spectrum.cut(rank) for spectrum in spectra), strict=True)
            row["certificate"], row["energy"] = f"{float(torch.cat(bounds).max()):.3e}", round(min(kept), 6)
            found = with_forms(study, [form.dense() for form in forms], months)
            _compare(row, study, found, months, expected)


def _by_tolerance(record: Record, study: Study, months: Tensor, expected: Tensor) -> dict[str, Tensor]:
    """Likewise, and with one tolerance through the kernels; returns a month of that."""
    matrices, shown = _matrices(study), {}
    for tol in TOLERANCES[:1] if record.arguments.small else TOLERANCES:
        forms: list[FactoredBias] = []
        with record.row("compress", provider="compress", tol=tol) as row:
            began = time.perf_counter()
            forms = [_certified_or_table(m, a.bias, tol) for m, a in zip(matrices, study.model.attentions, strict=True)]
            row["seconds"] = round(time.perf_counter() - began, 2)
            fill_ranks(row, forms)
            found = with_forms(study, [form.dense() for form in forms], months)
            _compare(row, study, found, months, expected)
        if forms and tol == SHOWN_TOL:
            with record.row("compress", provider="compress, in the kernel", tol=tol) as row:
                found = with_forms(study, forms, months)
                _compare(row, study, found, months, expected)
                shown[f"tol {tol:g}"] = found[0]
    return shown


def _certified_or_table(matrices: Tensor, bias: fb.EarthSpecificBias, tol: float) -> FactoredBias:
    """A layer for which no factors keep the promise stays the exact table."""
    try:
        return certified(matrices, tol)
    except fb.NotLowRankError:
        return bias().detach().to("cpu")


def fill_ranks(row: Row, forms: list[FactoredBias]) -> None:
    """Of those that are factors: the largest and the smallest rank of a head, and the largest bound."""
    reports = [form.report for form in forms if form.report is not None]
    row["note"] = f"{len(reports)} of {len(forms)} are factors, the others exact tables"
    if reports:
        ranks = torch.tensor([head.rank for report in reports for head in report.heads])
        row["rank"], row["smallest_rank"] = int(ranks.max()), int(ranks.min())
        row["certificate"] = f"{max(report.certificate for report in reports):.3e}"
        row["note"] = f"{row['note']}; {len(ranks)} heads, median rank {int(ranks.median())}"


def _compare(row: Row, study: Study, found: Tensor, months: Tensor, expected: Tensor) -> None:
    """`difference`: root mean square of what the fields move by, weighted by area, in m/s."""
    moved = ((found - expected).square() * study.winds.weights).mean().sqrt()
    row["difference"] = f"{float(moved):.2e}"
    study.score(row, found, months)


def _save(record: Record, study: Study, shown: dict[str, Tensor], month: Tensor) -> None:
    """A held-out month as it was and as predicted, and the learned tables."""
    fields = {"truth": study.winds.field[month], **shown}
    arrays = {name: field.float().cpu().numpy().astype(np.float16) for name, field in fields.items()}
    arrays["tables"] = study.tables().float().cpu().numpy().astype(np.float16)
    arrays["latitudes"] = study.winds.latitudes.cpu().numpy()
    with whole_file(record.arguments.out / "weather.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
