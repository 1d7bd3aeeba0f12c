"""The vision field at a tiny size: every part runs, agrees, and is written; what fails is a row."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.fields import vision
from benchmarks.fields.vision import data, full, kernels, small
from benchmarks.fields.vision.record import Record


def arguments(out: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    vision.add_arguments(parser)
    about = {"subcommand": "vision", "out": out, "picture": out / "vision.png", "device": "cpu", "threads": 1}
    about |= {"seed": 0, "small": True, "fetch": False, "load": 0.0, "started": "now"}
    return parser.parse_args([*options], argparse.Namespace(**about))


def images(count: int) -> data.Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, data.PIXELS, data.PIXELS), generator=generator, dtype=torch.uint8)
    return data.Images(pixels, torch.arange(count) % data.CLASSES)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tiny run."""
    out = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(small, "load", lambda: (images(8), images(6)))
        vision.run(arguments(out, "--epochs", "1"))
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> list[dict[str, str]]:
    with (written / "vision.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_part_is_measured_and_nothing_failed(rows: list[dict[str, str]]):
    assert tuple(rows[0]) == Record.columns
    parts = {"step", "train", "compress", "layer", "speed", "full", "full-step", "attention"}
    assert {row["part"] for row in rows} == parts
    assert {row["status"] for row in rows if row["part"] != "layer"} == {"ok"}


def test_exact_ways_agree(rows: list[dict[str, str]]):
    exact = ("as it is", "dense SDPA", "exact table")
    found = [float(row["difference"]) for row in rows if row["provider"] in exact and row["difference"]]
    assert len(found) > 20 and max(found) < 1e-4


def test_factors_keep_their_certificate_and_differ(rows: list[dict[str, str]]):
    sharp = [
        row for row in rows if row["part"] == "full" and row["provider"] == "factors" and row["weights"] == "sharp"
    ]
    for row in sharp:
        assert float(row["certificate"]) <= float(row["tol"]) and int(row["rank"]) > 0
        assert 0 < float(row["difference"]) < 1
    free = [float(row["difference"]) for row in rows if row["provider"] == "bias-free" and row["difference"]]
    assert sharp and min(free) > 0.1, "a bias that is left out must show"


def test_the_files_suffice_for_the_picture(written: Path):
    before = (written / "vision.png").read_bytes()
    (written / "vision.png").unlink()
    vision.run(arguments(written, "--draw"))
    assert (written / "vision.png").read_bytes() == before
    summary = json.loads((written / "vision.json").read_text())["summary"]
    assert {"test_accuracy", "epochs", "exact table, sharp", "share_of_attention"} <= set(summary)


def test_the_small_model_is_timed_again_with_the_tables_that_were_learned(written: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"vision\.npz, which holds the learned tables, is missing"):
        vision.run(arguments(tmp_path, "--parts", "small-speed"))
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    vision.run(arguments(tmp_path, "--parts", "small-speed"))
    before, after = (list(csv.DictReader((folder / "vision.csv").open())) for folder in (written, tmp_path))
    assert [row for row in before if row["part"] != "speed"] == [row for row in after if row["part"] != "speed"]
    same = ("provider", "batch", "tol", "form", "rank", "status")
    first, second = ([[row[c] for c in same] for row in rows if row["part"] == "speed"] for rows in (before, after))
    assert len(first) == 4 and first == second


def test_what_fails_is_a_row_and_a_wrong_result_has_no_time(tmp_path: Path):
    record = Record(arguments(tmp_path))
    with record.row("full", provider="broken"):
        raise RuntimeError("no such kernel\nand more")
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": [1], "num_heads": [1]}
    model = full._sharpened(full.Swinv2Model(full.Swinv2Config(**shape)).eval())
    inference = full._Inference(record, model, torch.randn(2, 3, 32, 32))
    inference.peer("forgets the bias", full.ways.bias_free(None))
    broken, wrong = record.rows
    assert broken["status"] == "error: RuntimeError: no such kernel"
    assert str(wrong["status"]).startswith("wrong") and wrong["ms"] == ""


def test_kernels_are_summed_by_name_and_gaps_are_what_lies_between():
    spans = [("a", 10.0, 14.0), ("b", 0.0, 4.0), ("a", 5.0, 9.0), ("c", 11.0, 12.0)]  # c runs beside a
    assert kernels.by_name(spans) == [("a", 2, 8.0), ("b", 1, 4.0), ("c", 1, 1.0), ("gaps", 0, 2.0)]
    many = [(str(i), 2.0 * i, 2.0 * i + 1 + 0.1 * (i < 8)) for i in range(10)]
    found = kernels.by_name(many)
    assert [name for name, *_ in found] == [*map(str, range(8)), "others", "gaps"]
    assert found[-2] == ("others", 2, 2.0) and found[-1][2] == pytest.approx(8 * 0.9 + 1.0)
    assert kernels.by_name([]) == [("gaps", 0, 0.0)]


def test_augmented_images_are_shifted_or_mirrored_ones():
    torch.manual_seed(0)
    picture = small._input(images(1).pixels)
    padded = torch.nn.functional.pad(picture[0, 0], (small.SHIFT,) * 4, value=-small.MEAN / small.SPREAD)
    windows = padded.unfold(0, data.PIXELS, 1).unfold(1, data.PIXELS, 1).flatten(0, 1)
    allowed = torch.cat([windows, windows.flip(-1)])
    made = small._augmented(picture.expand(40, -1, -1, -1))[:, 0]
    places = (made[:, None] == allowed).all((-2, -1))
    assert places.any(1).all() and places.any(0).sum() > 10


def test_packed_images_are_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "TRAIN", 3)
    monkeypatch.setattr(data, "TEST", 2)
    known = images(5)
    contents = (known.pixels[:3], known.pixels[3:], known.labels[:3].byte(), known.labels[3:].byte())

    def fetched(package: str, name: str, sha256: str) -> Path:
        place = next(i for i, file in enumerate(data.FILES) if file[0] == name)
        path = tmp_path / name
        path.write_bytes(gzip.compress(bytes(data.FILES[place][1]) + np.asarray(contents[place]).tobytes()))
        return path

    monkeypatch.setattr(data, "fetched", fetched)
    train, test = data.load()
    assert torch.equal(torch.cat([train.pixels, test.pixels]), known.pixels)
    assert torch.equal(torch.cat([train.labels, test.labels]), known.labels)
    assert [path.name for path in tmp_path.iterdir()] == ["fashion-mnist.xz"]


def test_a_file_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "fashion-mnist.xz"
    path.write_bytes(data.lzma.compress(b"short"))
    monkeypatch.setattr(data, "fetch", lambda: path)
    with pytest.raises(ValueError, match="holds 5 bytes, expected 54950000; remove it"):
        data.load()


def test_training_uses_no_way_whose_gradients_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = Record(arguments(tmp_path))
    monkeypatch.setattr(small, "_table_gradients", lambda *_: torch.tensor([torch.nan]))
    monkeypatch.setattr(record, "time", lambda row, call, seconds=0.0: row.update(ms=1.0))
    model = small._model(small.TINY)
    with pytest.raises(RuntimeError, match="no way of training works"):
        small._steps(record, model, images(4), small.TINY)
