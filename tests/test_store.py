from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.decompose.made_up_device import write_coefficients

import flashbias as fb
from flashbias.decompose import HeadReport, Report, compress
from flashbias.decompose.cross import compress_function
from flashbias.store import FORMAT, load, save


def header(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata() or {}


def assert_same(found: fb.FactoredBias, expected: fb.FactoredBias) -> None:
    for name in ("phi_q", "phi_k", "table", "code_q", "code_k"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert torch.equal(one, other)
    assert found.ranks == expected.ranks


@pytest.fixture
def report() -> Report:
    heads = tuple(
        HeadReport(h, "low rank", 2 + h, 3e-4 * h, 0.1, float("inf"), 7.5, 0.99, {1: 0.5, 2 + h: 3e-4 * h})
        for h in range(2)
    )
    return Report(1e-3, (2, 8, 9), heads, "", 0, "float32", 21, "a GPU", "every query, key and value", seconds=0.25)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bias.safetensors"


class TestRoundTrip:
    @given(
        batch=st.sampled_from([(), (2,), (1, 3)]),
        heads=st.sampled_from([(1, 1), (3, 1), (1, 3), (3, 3)]),
        lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        rank=st.integers(0, 4),
        table=st.sampled_from([None, 1, 3]),
        has_codes=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )
    def test_any_factored_bias(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        batch: tuple[int, ...],
        heads: tuple[int, int],
        lengths: tuple[int, int],
        rank: int,
        table: int | None,
        has_codes: bool,
        dtype: torch.dtype,
    ) -> None:
        table_heads = max(heads)
        if rank == 0 and table is None:
            rank = 1
        n, m = lengths
        codes = (torch.arange(n) * 2, torch.arange(m, dtype=torch.int32)) if table and has_codes else (None, None)
        bias = fb.FactoredBias(
            torch.randn(*batch, heads[0], n, rank).to(dtype),
            torch.randn(*batch, heads[1], m, rank).to(dtype),
            None if table is None else torch.randn(table_heads, table),
            *codes,
            ranks=[rank // (1 + h) for h in range(table_heads)],
        )
        path = tmp_path_factory.mktemp("store") / "x.safetensors"
        save(bias, path)
        assert_same(load(path), bias)

    def test_a_mixed_bias(self, path: Path) -> None:
        part = fb.FactoredBias(torch.randn(2, 8, 3), torch.randn(2, 9, 3), ranks=(1, 3))
        bias = fb.MixedBias((part, torch.randn(1, 8, 9)), heads=((0, 2), (1,)))
        save(bias, path)
        found = load(path)
        assert isinstance(found, fb.MixedBias)
        assert found.heads == bias.heads
        assert_same(found.parts[0], part)
        assert torch.equal(found.dense(), bias.dense())
        assert header(path)["flashbias.ranks"] == "1 - 3"

    def test_parts_that_their_groups_share(self, path: Path) -> None:
        shared = fb.FactoredBias(torch.randn(1, 8, 3), torch.randn(1, 9, 3), ranks=(2,))
        bias = fb.MixedBias((shared, torch.randn(1, 8, 9)), heads=((0, 3, 4), (2, 1)))
        save(bias, path)
        assert torch.equal(load(path).dense(), bias.dense())
        assert header(path)["flashbias.ranks"] == "2 - - 2 2"

    def test_the_report_comes_back_as_a_report(self, path: Path, report: Report) -> None:
        bias = fb.FactoredBias(torch.randn(2, 8, 3), torch.randn(2, 9, 3), report=report)
        save(bias, path)
        found = load(path).report
        assert found == report
        assert found.heads[1].certificates == {1: 0.5, 3: 3e-4}
        assert str(found) == str(report)
        mixed = fb.MixedBias((bias,), ((0, 1),), report)
        save(mixed, path)
        assert load(path).report == report

    def test_what_compress_returns(self, path: Path, tmp_path: Path) -> None:
        x = torch.linspace(0, 1, 40)
        bias = compress(torch.exp(-((x[:, None] - x) ** 2))[None], device=write_coefficients(tmp_path), table=None)
        save(bias, path)
        found = load(path)
        assert_same(found, bias)
        assert found.report == bias.report
        q = k = v = torch.randn(1, 1, 40, 8)
        assert torch.equal(fb.attention(q, k, v, found), fb.attention(q, k, v, bias))

    def test_what_compress_function_returns(self, path: Path) -> None:
        x = torch.linspace(0, 1, 60)[:, None]
        bias = compress_function(lambda a, b: torch.exp(-((a - b.mT) ** 2)), x, tol=0.05)
        save(bias, path)
        assert load(path).report == bias.report

    def test_tensors_that_share_memory_or_are_not_contiguous(self, path: Path) -> None:
        phi = torch.randn(2, 3, 8).mT.requires_grad_()
        bias = fb.FactoredBias(phi, phi.expand(2, 8, 3))
        save(bias, path)
        assert torch.equal(load(path).phi_k, phi)
        assert not load(path).requires_grad


class TestHeader:
    def test_it_says_what_is_promised(self, path: Path, report: Report) -> None:
        bias = fb.FactoredBias(torch.randn(2, 8, 3), torch.randn(2, 9, 3), ranks=(2, 3), report=report)
        save(bias, path, metadata={"model": "mine"})
        found = header(path)
        assert found["flashbias.format"] == str(FORMAT)
        assert found["flashbias.version"] == fb.__version__
        assert (found["flashbias.tol"], found["flashbias.certificate"]) == ("0.001", "0.0003")
        assert found["flashbias.ranks"] == "2 3"
        assert found["model"] == "mine"
        assert set(load_file(path)) == {"phi_q", "phi_k"}

    @pytest.mark.parametrize(
        ("metadata", "error", "said"),
        [
            ({"flashbias.tol": "0"}, ValueError, "must not begin with 'flashbias.'"),
            ({"model": 3}, TypeError, "strings to strings, got 'model': 3"),
        ],
    )
    def test_metadata_that_cannot_be_used(
        self, path: Path, metadata: dict[str, str], error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error, match=said):
            save(fb.Alibi(2)(4, 4), path, metadata=metadata)
        assert not path.exists()

    def test_what_is_no_bias_or_has_a_strange_report(self, path: Path) -> None:
        with pytest.raises(TypeError, match="must be a FactoredBias or a MixedBias"):
            save(torch.zeros(3), path)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be one of Report, CrossReport to be stored, got dict"):
            save(dataclasses.replace(fb.Alibi(2)(4, 4), report={}), path)
        assert not path.exists()


class TestWhatCannotBeLoaded:
    def test_a_foreign_file(self, path: Path) -> None:
        save_file({"phi_q": torch.zeros(1, 2, 3)}, path)
        with pytest.raises(ValueError, match="holds no bias of this library"):
            load(path)

    def test_a_newer_format(self, path: Path) -> None:
        save_file({"x": torch.zeros(1)}, path, {"flashbias.format": str(FORMAT + 1), "flashbias.version": "9.9"})
        with pytest.raises(ValueError, match=rf"has format {FORMAT + 1}, written by flashbias 9.9; .* install a newer"):
            load(path)

    def test_a_file_cut_short(self, path: Path) -> None:
        save(fb.Alibi(2)(40, 40), path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="is cut short"):
            load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"flashbias.format": "one"},
            {"flashbias.bias": "{"},
            {"flashbias.bias": json.dumps({"kind": "Other", "groups": [{}]})},
            {"flashbias.bias": json.dumps({"kind": "FactoredBias", "groups": []})},
            {"flashbias.bias": json.dumps({"kind": "FactoredBias", "groups": [{"ranks": [99, 1]}]})},
            {"flashbias.bias": json.dumps({"kind": "MixedBias", "groups": [{"form": "dense", "heads": [0]}]})},
            {"flashbias.report": json.dumps({"kind": "Report", "tol": 1})},
            {"flashbias.report": json.dumps({"kind": "Unknown"})},
        ],
        ids=lambda change: "-".join(change.values())[:40],
    )
    def test_a_damaged_header(self, path: Path, change: dict[str, str]) -> None:
        save(fb.Alibi(2)(4, 4), path)
        save_file(load_file(path), path, {**header(path), **change})
        with pytest.raises(ValueError, match=r"bias.safetensors is damaged"):
            load(path)

    def test_a_missing_tensor(self, path: Path) -> None:
        save(fb.Alibi(2)(4, 4), path)
        tensors, found = load_file(path), header(path)
        tensors.pop("phi_k")
        save_file(tensors, path, found)
        with pytest.raises(ValueError, match="is damaged: KeyError: 'phi_k'"):
            load(path)


def test_an_interrupted_save_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(fb.Alibi(2)(4, 4), path)
    before = path.read_bytes()

    def interrupted(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(fb.Alibi(2)(8, 8), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_replaced_later_does_not_change_a_bias(path: Path) -> None:
    bias = fb.Alibi(2)(4, 4)
    save(bias, path)
    found = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(found, bias)


def test_fields_that_are_none_of_a_report() -> None:
    with pytest.raises(ValueError, match="not the fields of a report"):
        Report.from_dict({"tol": 1})
    with pytest.raises(ValueError, match="not the fields of a report"):
        Report.from_dict({"heads": [{"certificates": None}]})
