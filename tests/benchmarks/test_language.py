"""The field of language at a size for a CPU: its text, both trainings, its rows and its picture."""

from __future__ import annotations

import argparse
import csv
import json
import lzma
from pathlib import Path

import pytest
import torch
from benchmarks.fields import language
from benchmarks.fields.language import data, model, picture
from benchmarks.fields.language.model import GPT, Shape

from flashbias.files import whole_file

WORDS = b"the quick brown fox jumps over the lazy dog and reads on "


def documents(count: int = 60) -> list[tuple[str, bytes]]:
    """Named texts, of which some are held out."""
    return [(f"package/{i}.txt", b"%d " % i + WORDS * 30) for i in range(count)]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The command line of a small run, with text in the cache folder."""
    monkeypatch.setenv("FLASHBIAS_CACHE", str(tmp_path / "cache"))
    with whole_file(tmp_path / "cache" / "language.xz") as part:
        part.write_bytes(data.pack(documents()))
    parser = argparse.ArgumentParser()
    language.add_arguments(parser)
    given = parser.parse_args(["--steps", "40"])
    about = {"subcommand": "language", "out": tmp_path, "picture": tmp_path / "language.png", "device": "cpu"}
    about |= {"threads": 1, "seed": 0, "small": True, "fetch": False, "load": 0.0, "started": "", "commit": "none"}
    return argparse.Namespace(**vars(given), **about)


def test_small_run(arguments: argparse.Namespace) -> None:
    language.run(arguments)
    with (arguments.out / "language.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["status"].startswith(("error", "wrong"))]

    def losses(part: str, **where: str) -> torch.Tensor:
        chosen = [row for row in rows if row["part"] == part and all(row[key] == x for key, x in where.items())]
        return torch.tensor([float(row["loss"]) for row in chosen])

    dense, factored = (losses("train", provider=form) for form in ("dense", "factored"))
    assert len(dense) == 8 and float(dense[-1]) < 0.8 * float(dense[0])
    torch.testing.assert_close(factored, dense, rtol=0.0, atol=1e-3)
    held_out = losses("held-out")
    assert len(held_out) == 12 and float(held_out.max() - held_out.min()) < 0.2
    assert len(losses("position", provider="factored")) == 4
    timed = {(row["pass"], row["provider"]) for row in rows if row["part"] == "attention" and row["status"] == "ok"}
    assert timed == {(p, who) for p in ("fwd", "fwdbwd") for who in ("ours/auto", "eager/transformers")}
    read = [row for row in rows if row["part"] == "prefill"]
    assert [(row["case"], row["provider"]) for row in read] == [
        (name, provider) for name in ("BLOOM", "MPT") for provider in ("eager", "patched")
    ]
    assert all(float(row["agreement"]) == 1.0 and float(row["error"]) < 1e-5 for row in read)
    summary = json.loads((arguments.out / "language.json").read_text())["summary"]
    assert summary["steps"] == 40 and summary["curves_apart_at_most"] < 1e-3
    assert arguments.picture.read_bytes().startswith(b"\x89PNG")


def test_what_fails_is_a_row_and_the_rest_goes_on(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "DenseSelfAttention", None)
    monkeypatch.setattr(picture, "draw", lambda folder, path: None)
    arguments.parts, arguments.steps = ["train"], 10
    language.run(arguments)
    with (arguments.out / "language.csv").open(newline="") as file:
        first, *others = csv.DictReader(file)
    assert (first["part"], first["provider"]) == ("train", "dense") and first["status"].startswith("error: TypeError")
    read = [(row["attention"], row["status"][:5]) for row in others if row["part"] == "held-out"]
    assert read == [("dense", "error"), *[("factored", "ok")] * 3]
    trained = [row for row in others if row["part"] == "train"]
    assert [(row["provider"], row["step"], row["status"]) for row in trained] == [
        ("factored", "5", "ok"),
        ("factored", "10", "ok"),
    ]


def test_a_training_ends_when_its_seconds_are_over(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "draw", lambda folder, path: None)
    arguments.parts, arguments.seconds = ["train"], 0.0
    language.run(arguments)
    assert json.loads((arguments.out / "language.json").read_text())["summary"]["steps"] == 5


def test_text_is_divided_by_document(arguments: argparse.Namespace) -> None:
    text = data.load()
    parts = [bytes(part.tolist()) for part in (text.train, text.held_out)]
    contents = [set(part.split(b"\0")) - {b""} for part in parts]
    assert not contents[0] & contents[1] and all(contents)
    assert contents[0] | contents[1] == {content for _, content in documents()}
    assert all(part.endswith(b"dog and reads on \0") for part in parts)


def test_a_broken_file_is_refused(arguments: argparse.Namespace) -> None:
    (data.cache_folder() / "language.xz").write_bytes(lzma.compress(WORDS))
    with pytest.raises(ValueError, match=r"language\.xz holds 1 parts, expected 2"):
        data.load()


def test_plain_text_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<head><title>x</title></head><body><p>a &amp; b</p>\n \n\n<script>no()</script>c\0</body>")
    assert data.plain(page) == b"a & b\n\nc"


def test_full_size_has_twenty_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(Shape(), "factored").parameters()) > 20_000_000


def test_both_forms_are_one_model() -> None:
    shape = Shape(16, 2, 2)
    dense, factored = (GPT(shape, form).draw_parameters(3) for form in ("dense", "factored"))
    factored.load_state_dict(dense.state_dict())
    tokens = torch.randint(256, (2, 50))
    torch.testing.assert_close(factored(tokens), dense(tokens), rtol=0.0, atol=1e-6)
    later = tokens.clone()
    later[:, 30:] = 0
    torch.testing.assert_close(dense(later)[:, :30], dense(tokens)[:, :30], rtol=0.0, atol=1e-6)
