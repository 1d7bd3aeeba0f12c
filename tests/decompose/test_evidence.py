"""`python -m benchmarks.decomposition` at a tiny size: each subcommand runs and leaves what it should."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.decomposition import mesh

ROOT = Path(__file__).parents[2]


def run(subcommand: str, out: Path, *options: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The lines of the CSV and what the JSON says, which is all that there is in the folder."""
    command = [sys.executable, "-m", "benchmarks.decomposition", subcommand, "--out", str(out), "--threads", "1"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert sorted(path.name for path in out.iterdir()) == [f"{subcommand}.csv", f"{subcommand}.json"]
    with (out / f"{subcommand}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    about = json.loads((out / f"{subcommand}.json").read_text())
    assert about["packages"]["torch"] and about["threads"] == 1 and about["load_average_at_start"] >= 0
    return rows, about["summary"]


def test_cross(tmp_path: Path):
    obj = tmp_path / "mesh.obj.gz"
    places = torch.rand(600, 3, generator=torch.Generator().manual_seed(0)).tolist()
    with gzip.open(obj, "wt") as file:
        file.writelines(["# a mesh\n", *(f"v {x} {y} {z}\n" for x, y, z in places), "vn 0 0 1\n", "f 1 2 3\n"])
    rows, _ = run("cross", tmp_path / "out", "--obj", str(obj), "--tol", "0.1", "--entries", "2000")
    assert [row["kernel"] for row in rows] == ["distance", "gaussian", "matern"]
    for row in rows:
        assert row["status"] == "ok" and row["points"] == "600"
        assert 0 < int(row["rank"]) < 600 and float(row["peak_rss_gib"]) > 0
        assert 0 < float(row["rms_error"]) < float(row["max_error"]) < 0.12


def test_swin(tmp_path: Path):
    rows, summary = run("swin", tmp_path / "out", "--layers", "2", "--window", "12")
    assert [row["tokens"] for row in rows] == ["144"] * 2 and summary["heads"] == 8
    for row in rows:
        # Which form pays is a matter of measured prices; what the promise takes is not.
        assert row["status"] in ("ok", "refused") and float(row["factors_reach_least"]) > 0
        assert float(row["certificate"]) <= 1e-3 or row["status"] == "refused"
        assert len(row["ranks"].split()) == 4
        assert all(0 < int(rank) < 144 for rank in row["ranks_needed"].split())


def test_certificates(tmp_path: Path):
    picture = tmp_path / "picture.png"
    rows, summary = run("certificates", tmp_path / "out", "--problems", "6", "--picture", str(picture))
    assert len(rows) == 6 and summary["above"] == 0
    assert all(float(row["random_error"]) <= float(row["certificate"]) for row in rows)
    # The worst case is what the certificate says: neither may be computed wrongly without the other.
    for row in rows:
        assert float(row["two_key_error"]) == pytest.approx(float(row["certificate"]), rel=1e-5, abs=1e-11)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.realdata
def test_the_motorbike():
    try:
        path = mesh.motorbike()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    assert mesh.vertices(path).shape == (132_871, 3)
