"""The weather field at a tiny size: every part runs, agrees, and is written; what fails is a row."""

from __future__ import annotations

import argparse
import csv
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.fields import weather
from benchmarks.fields.weather import data, factors, picture, speed, train
from benchmarks.fields.weather.factors import Spectrum
from benchmarks.fields.weather.model import Size, WindModel
from benchmarks.fields.weather.record import Record
from scipy.io import netcdf_file

import flashbias as fb

WINDOW = (2, 3, 4)


def arguments(out: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    weather.add_arguments(parser)
    about = {"subcommand": "weather", "out": out, "picture": out / "weather.png", "device": "cpu", "threads": 1}
    about |= {"seed": 0, "small": True, "fetch": False, "load": 0.0, "started": "now"}
    return parser.parse_args([*options], argparse.Namespace(**about))


def winds(months: int = 60) -> data.Winds:
    """Waves that a season moves and noise; 13 latitudes make two windows of padded tokens."""
    generator = torch.Generator().manual_seed(0)
    longitude = torch.arange(24) * (2 * torch.pi / 24)
    season = torch.arange(months)[:, None, None, None] * (2 * torch.pi / 12)
    wave = 5 * torch.cos(longitude + season + torch.arange(2)[:, None, None])
    return data.Winds(wave + torch.randn(months, 2, 13, 24, generator=generator), torch.linspace(-90, 90, 13))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tiny run."""
    out = tmp_path_factory.mktemp("weather")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "load", winds)
        monkeypatch.setattr(train, "TINY", Size(8, 2, 2, WINDOW))
        monkeypatch.setattr(speed, "TINY", replace(speed.TINY, window=WINDOW))
        monkeypatch.setattr(picture, "draw", lambda *_: None)
        weather.run(arguments(out, "--epochs", "40"))  # after one epoch the tables hardly matter
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> list[dict[str, str]]:
    with (written / "weather.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_part_is_measured_and_nothing_failed(rows: list[dict[str, str]]):
    assert tuple(rows[0]) == Record.columns
    assert {row["part"] for row in rows} == {"step", "train", "score", "rank", "compress", "tables", "attention"}
    assert {row["status"] for row in rows} == {"ok"}


def test_exact_ways_agree(rows: list[dict[str, str]]):
    exact = ("dense SDPA", "exact table", "model, exact table")
    found = [float(row["difference"]) for row in rows if row["provider"] in exact and row["difference"]]
    assert len(found) == 5 and max(found) < 1e-4


def test_factors_come_nearer_with_their_rank_and_keep_their_certificate(rows: list[dict[str, str]]):
    cuts = [row for row in rows if row["part"] == "rank"]
    for column in ("certificate", "difference"):
        values = [float(row[column]) for row in cuts]
        assert len(values) == 8 and values[0] > 2 * values[-1] >= 0
    for row in rows:
        if row["provider"].startswith("compress") and row["certificate"]:
            assert float(row["certificate"]) <= float(row["tol"])


def test_the_files_suffice_for_the_picture(written: Path):
    weather.run(arguments(written, "--draw"))
    assert (written / "weather.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((written / "weather.json").read_text())["summary"]
    assert {"rmse model", "rmse climatology", "kept_epoch", "ms exact table", "attention_shape"} <= set(summary)


def test_speed_alone_takes_the_tables_that_were_learned(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "TINY", replace(speed.TINY, window=WINDOW))
    monkeypatch.setattr(picture, "draw", lambda *_: None)
    with pytest.raises(FileNotFoundError, match=r"weather\.npz, which holds the learned tables, is missing"):
        weather.run(arguments(tmp_path, "--parts", "speed"))
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    weather.run(arguments(tmp_path, "--parts", "speed"))
    before, after = (list(csv.DictReader((folder / "weather.csv").open())) for folder in (written, tmp_path))
    timed = ("tables", "attention")
    assert [row for row in before if row["part"] not in timed] == [row for row in after if row["part"] not in timed]
    same = ("provider", "weights", "tol", "rank", "status")
    first, second = ([[row[c] for c in same] for row in rows if row["part"] in timed] for rows in (before, after))
    assert len(first) > 8 and first == second


def test_what_fails_is_a_row(tmp_path: Path):
    record = Record(arguments(tmp_path))
    with record.row("attention", provider="broken"):
        raise RuntimeError("no such kernel\nand more")
    assert record.rows[0]["status"] == "error: RuntimeError: no such kernel"


def test_windows_are_cut_and_joined_again_and_a_shift_sees_over_the_edge():
    model = WindModel(Size(8, 2, 2, WINDOW), (13, 16))
    x = torch.randn(2, 2, 7, 8, 8)
    for attention in model.attentions:
        windows = attention._cut(x)
        assert windows.shape == (2 * 2, attention.bias.num_types, 24, 8)
        assert torch.equal(attention._joined(windows, 2), x)
    straight, shifted = model.attentions
    assert torch.equal(straight._cut(x)[0, 0].unflatten(0, WINDOW), x[0, :, :3, :4])
    across = shifted._cut(x)[1, 1].unflatten(0, WINDOW)
    assert torch.equal(across, x[0, :, 2:5][:, :, [6, 7, 0, 1]])


def test_a_model_whose_last_layer_is_zero_predicts_the_damped_anomaly():
    known = winds(60)
    months = torch.tensor(known.held_out)
    study = train.Study(known, WindModel(train.TINY, (13, 24)))
    assert torch.allclose(study.predicted(months), known.guess(months))


def test_neither_climatology_nor_damping_sees_later_months():
    known = winds(60)
    later = known.field.clone()
    later[known.taught.stop :] += 100
    changed = data.Winds(later, known.latitudes)
    assert torch.equal(changed.climatology, known.climatology)
    assert torch.equal(changed.damping, known.damping)
    assert (known.taught.stop, known.validation.stop, known.held_out.stop) == (24, 36, 60)


def test_errors_are_weighted_by_area():
    known = winds(60)
    months = torch.tensor([40])
    off = known.field[months].clone()
    off[:, 0] += 2.0
    assert torch.allclose(known.errors(off, months), torch.tensor([[2.0, 0.0]]), atol=1e-5)
    pole = known.field[months].clone()
    pole[:, :, 0] += 50
    assert float(known.errors(pole, months).max()) < 1e-2


def test_a_cut_keeps_its_certificate():
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 12, dtype=torch.float64)
    form, bounds, kept = Spectrum.of(matrices).cut(5)
    q, k, v = torch.randn(3, 1, 3, 12, 4, dtype=torch.float64)
    out = fb.attention(q, k, v, form.to(torch.float64))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=matrices[None])
    assert isinstance(out, torch.Tensor)
    moved = (out - expected).norm(dim=-1).amax((0, 2))
    assert bool((moved <= bounds * torch.cdist(v, v).amax((0, 2, 3))).all()) and float(moved.min()) > 0
    assert 0.5 < kept < 1


def test_a_layer_whose_tables_are_of_full_rank_stays_a_table():
    torch.manual_seed(0)
    bias = fb.EarthSpecificBias(1, windows=(1, 1))
    torch.nn.init.normal_(bias.weight, std=0.5)
    matrices = bias().dense().detach()
    kept, found = (factors._certified_or_table(matrices, bias, tol) for tol in (0.01, 0.5))
    assert kept.report is None and torch.equal(kept.dense(), matrices)
    row: dict[str, object] = {}
    factors.fill_ranks(row, [kept, found])
    assert found.report is not None and row["rank"] == max(found.report.ranks) > 0
    assert str(row["note"]).startswith("1 of 2 are factors, the others exact tables; 1 heads")


def test_packed_winds_are_those_of_the_file_and_missing_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path))
    path = tmp_path / data.NAME
    known = winds(14)
    _write(path, known)
    monkeypatch.setattr(data, "fetched", lambda *_: path)
    loaded = data.load()
    assert (loaded.field - known.field).abs().max() <= 0.51 * data.UNIT
    assert torch.equal(loaded.latitudes, known.latitudes)
    assert [file.name for file in tmp_path.iterdir()] == ["winds.npz"]
    known.field[3, 1, 2, 5] = data.MISSING
    _write(path, known)
    with pytest.raises(ValueError, match="lacks 1 values"):
        data.packed(path)


def _write(path: Path, known: data.Winds) -> None:
    with netcdf_file(path, "w") as file:
        for name, size in zip(("TIME", "FNOCY", "FNOCX"), (len(known), 13, 24), strict=True):
            file.createDimension(name, size)
        file.createVariable("FNOCY", "d", ("FNOCY",))[:] = np.asarray(known.latitudes)
        for component, name in enumerate(("UWND", "VWND")):
            file.createVariable(name, "f", ("TIME", "FNOCY", "FNOCX"))[:] = known.field[:, component].numpy()


def test_the_example_runs():
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "weather.py"))
    assert "window" in example["main"](steps=2, places=(2, 6, 8), window=(2, 3, 4))
