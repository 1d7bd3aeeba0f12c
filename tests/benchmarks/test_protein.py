"""The field of proteins: its task, its block with each form of bias, a whole run at a tiny size, and its example."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.fields import protein
from benchmarks.fields.protein import data, picture, speed, train
from benchmarks.fields.protein.block import Pairformer
from benchmarks.fields.protein.model import TriangleAttention, feature_count, materialised, residue_features
from benchmarks.fields.protein.sketch import sketched
from benchmarks.fields.protein.speed import SMALL_SHAPES, Timing, timings
from benchmarks.fields.protein.task import BINS, Example, draw, example, score

from flashbias.bench.measure import Measurement

EXAMPLE = Path(__file__).parents[2] / "examples" / "protein.py"
CPU = torch.device("cpu")


def walk(length: int, family: int) -> data.Chain:
    """A chain that is folded at random."""
    generator = torch.Generator().manual_seed(family)
    places = 3.0 * torch.randn(length, 3, generator=generator).cumsum(0)
    return data.Chain(f"chain{family}", family, torch.randint(20, (length,), generator=generator), places)


TIMINGS = [
    Timing("block", name, 16, "forward", "ok", Measurement(ms, ms, ms, None, 5), 0.0)
    for name, ms in (("factors", 1.0), ("open code", 3.0), ("SDPA", 2.0), ("no bias (SDPA)", 0.5))
]
CHAINS = [walk(40 + 4 * family, family) for family in range(8)]


def test_families_are_not_split():
    relatives = [replace(chain, family=chain.family % 4) for chain in CHAINS]
    kept, held = data.split(relatives)
    assert len(kept) + len(held) == 8 and held and kept
    assert not {c.family for c in kept} & {c.family for c in held}


def test_near_copies_are_dropped_and_relatives_share_a_family():
    first, other = walk(200, 1), walk(200, 2)
    copy = replace(first, name="copy", types=first.types[:150])
    relative = replace(other, name="relative", types=torch.cat([first.types[:20], other.types[20:]]))
    found = data._distinct(iter([first, copy, other, relative]))
    assert [(c.name, c.family) for c in found] == [("chain1", 0), ("chain2", 1), ("relative", 0)][:2]
    unlike = walk(200, 3)
    relative = replace(unlike, name="relative", types=torch.cat([first.types[:20], unlike.types[20:]]))
    assert [c.family for c in data._distinct(iter([first, other, relative]))] == [0, 1, 0]


PDB = """\
ATOM      1  CA  ALA A   1       1.000   2.000   3.000  1.00  0.00           C
ATOM      2  CB AALA A   1       4.000   5.000   6.000  1.00  0.00           C
ATOM      3  CB BALA A   1       9.000   9.000   9.000  1.00  0.00           C
ATOM      4  CA  GLY A   2       7.000   8.000   9.000  1.00  0.00           C
ATOM      5  CB  SER A   3       7.000   8.000   9.000  1.00  0.00           C
ENDMDL
ATOM      6  CA  GLY A   4       0.000   0.000   0.000  1.00  0.00           C
"""


def test_structures_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "SHORTEST", 1)
    (tmp_path / "a.pdb").write_text(PDB)
    (chain,) = data._chains(tmp_path / "a.pdb")
    assert "".join(data.RESIDUES[i] for i in chain.types) == "AG"  # the serine has no C-alpha
    assert chain.places.tolist() == [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]


def test_landmarks_alone_are_known_and_hidden_pairs_asked_for():
    chain = walk(60, 0)
    given = example(chain.types[None], chain.places[None], torch.Generator().manual_seed(0))
    seen = given.known[0] < BINS
    assert 0 < int(seen.sum()) < 1500
    assert torch.equal(given.known[0][seen], given.target[0][seen])
    assert not bool((given.asked[0] & seen).any())
    assert not bool(torch.diagonal(given.asked[0], 5).any())
    assert draw(CHAINS, 3, 40, torch.Generator()).types.shape == (3, 40)


def test_scores_of_a_model_that_knows_and_of_one_that_does_not():
    target = torch.randint(BINS, (1, 30, 30))
    asked = Example(torch.zeros(1, 30), target, torch.maximum(target, target.mT), torch.ones(1, 30, 30).bool())
    known = score(20.0 * torch.nn.functional.one_hot(asked.target, BINS).float(), asked)
    assert known.auc == 1.0 and known.loss < 1e-5
    blind = score(torch.zeros(1, 30, 30, BINS), asked)
    assert blind.auc == pytest.approx(0.5) and blind.loss == pytest.approx(math.log(BINS), rel=1e-5)


def test_features_need_no_projection_of_all_pairs():
    triangle = TriangleAttention(8, 2, 4)
    z = torch.randn(1, 128, 128, 8)
    features = residue_features(z, triangle.to_bias)
    assert features.shape == (1, 128, feature_count(8, 2))
    of_rows = features[..., 24 : 24 + 128].unflatten(-1, (64, 2))
    expected = triangle.matrix(z).unflatten(-1, (64, 2)).mean(-1)  # [B, H, N, segments]
    torch.testing.assert_close(of_rows, expected.movedim(1, -1))
    torch.testing.assert_close(features[..., 8:16], z.mean(1))


def test_a_sketch_of_its_rank_is_the_bias_itself():
    torch.manual_seed(0)
    project = torch.nn.Linear(6, 2, bias=False)
    z = torch.einsum("bir,bjr,rc->bijc", torch.randn(2, 40, 5), torch.randn(2, 40, 5), torch.randn(5, 6))
    bias = project(z).movedim(-1, 1)
    centred = bias - bias.mean(-1, keepdim=True)
    torch.testing.assert_close(sketched(z, project, rank=5).dense(), centred, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sketched(z, project, rank=3).dense(), centred, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_block_with_factors_is_one_with_their_product(whole: bool):
    torch.manual_seed(0)
    block = Pairformer(16, 24, 2, 2, 4, whole=whole)
    s, z = torch.randn(1, 20, 24), torch.randn(1, 20, 20, 16)
    updates = []
    for form in ("factors", "product", "none"):
        out = block.use(form, materialised, materialised)(s, z)
        updates.append(torch.cat([(after - before).flatten() for before, after in zip((s, z), out, strict=True)]))
    factors, product, none = updates
    torch.testing.assert_close(factors, product, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(factors, none, rtol=1e-3, atol=1e-4)


def test_all_providers_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "measure", lambda *_, **__: Measurement(1.0, 1.0, 1.0, None, 1))
    found = list(timings(replace(SMALL_SHAPES, tokens=((24, ("forward+backward",)),)), CPU))
    assert {timing.scope for timing in found} == {"triangle", "attentions", "block"}
    for timing in found:
        assert (
            timing.status == "ok"
            and timing.difference is not None
            and timing.difference < (1e-2 if "bfloat16" in timing.provider else 1e-5)
        )


def test_a_run_leaves_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "load", lambda: CHAINS)
    small = replace(train.SMALL, steps=4, distill_steps=4, tune_steps=2, longest=32)
    monkeypatch.setattr(protein, "SMALL", small)
    monkeypatch.setattr(protein, "timings", lambda *_: iter(TIMINGS))
    parser = argparse.ArgumentParser()
    protein.add_arguments(parser)
    arguments = parser.parse_args([])
    vars(arguments).update(subcommand="protein", out=tmp_path, picture=tmp_path / "p.png", device="cpu")
    vars(arguments).update(threads=1, seed=0, small=True, fetch=False, commit="none", load=0.0, started="now")
    protein.run(arguments)
    rows = list(csv.DictReader((tmp_path / "protein.csv").open(newline="")))
    assert {row["status"] for row in rows} == {"ok"}
    kinds = [(row["what"], row["rank"]) for row in rows if row["auc"]]
    assert kinds[:4] == [("matrix", ""), ("no bias", ""), ("matrix truncated", "4"), ("sketched factors", "4")]
    assert kinds[4:7] == [("factors", "4"), ("factors, tuned", "4"), ("factors, tuned, bfloat16", "4")]
    assert [what for what, _ in kinds[7:]] == [f"table + {what}" for what, _ in kinds[4:7]]
    summary = json.loads((tmp_path / "protein.json").read_text())["summary"]
    assert summary["block, 16, forward"]["open code / factors"] == 3.0
    with np.load(tmp_path / "protein-maps.npz") as maps:
        assert maps["factors 4"].shape == maps["contacts"].shape
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    first = json.loads((tmp_path / "protein.json").read_text())
    arguments.parts, arguments.commit = ["speed"], "later"
    monkeypatch.setattr(picture, "draw", lambda *_: None)
    protein.run(arguments)
    assert len(list(csv.DictReader((tmp_path / "protein.csv").open(newline="")))) == len(rows), "other parts stay"
    about = json.loads((tmp_path / "protein.json").read_text())
    assert (about["commit"], about["summary"].pop("kept")) == ("later", {"train": first["commit"]})
    assert about["summary"]["matrix"] == first["summary"]["matrix"]


def test_a_part_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch):
    def found():
        yield protein._row("train", "matrix")
        raise ValueError("no chains")

    assert [row["status"] for row in protein._guarded("train", found())] == ["ok", "error: ValueError: no chains"]


def test_example(capsys: pytest.CaptureFixture[str]):
    conclusion = runpy.run_path(str(EXAMPLE))["main"](steps=20, residues=48)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(conclusion)
    errors = [float(x) for x in re.findall(r"^ +\d+ +[\d.]+ +([\d.]+)", printed, re.MULTILINE)]
    assert len(errors) == 3 and all(0 < error < 1.5 for error in errors)
