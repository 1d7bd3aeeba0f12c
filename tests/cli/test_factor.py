from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import flashbias as fb
from flashbias.cli import factor as command
from flashbias.cli.app import run
from flashbias.decompose import Report
from flashbias.store import load


def smooth(heads: int, size: int = 40) -> torch.Tensor:
    x = torch.linspace(0, 1, size)
    return torch.stack([torch.exp(-((x[:, None] - x * x) ** 2) * (h + 1)) for h in range(heads)])


def noise(heads: int, size: int = 200) -> torch.Tensor:
    return 3 * torch.randn(heads, size, size, generator=torch.Generator().manual_seed(0))


def moved(bias: fb.FactoredBias | fb.MixedBias, true: torch.Tensor, is_causal: bool = False) -> float:
    """How far the output moves, relative to the diameter of the values."""
    q, k, v = torch.randn(3, *true.shape[:2], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = fb.attention(3 * q, 3 * k, v, bias.to(torch.float64), is_causal=is_causal)
    mask = true.double()
    if is_causal:
        mask = mask.masked_fill(torch.ones(true.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(3 * q, 3 * k, v, mask)
    diameter = torch.cdist(v, v).amax((-1, -2))
    return float(((out - expected).norm(dim=-1).amax(-1) / diameter).max())


def test_factors_are_stored_and_keep_the_promise(
    folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bias = smooth(3)
    np.save("bias.npy", bias.numpy())
    assert run(["factor", "bias.npy", "-o", "new/factors.safetensors", "--tol", "0.01", "--no-table", *device]) == 0
    found = load("new/factors.safetensors")
    assert isinstance(found, fb.FactoredBias) and found.table is None
    assert isinstance(found.report, Report) and found.report.tol == 0.01 >= found.report.certificate
    assert moved(found, bias) <= found.report.certificate
    out = capsys.readouterr().out
    assert str(found.report) in out
    assert "wrote new/factors.safetensors" in out and "in place of 9.4 KiB" in out
    with safe_open("new/factors.safetensors", "pt") as file:
        assert file.metadata()["source"] == "bias.npy"


def test_a_table(folder: Path, device: list[str]) -> None:
    family = fb.WindowBias(2, (5, 6))
    torch.nn.init.normal_(family.weight)
    torch.save({"a": {"weight": family.weight.detach()}}, "swin.pt")
    arguments = ["factor", "swin.pt", "--key", "a.weight", "--window", "5x6", "-o", "t.safetensors", *device]
    assert run(arguments) == 0
    found = load("t.safetensors")
    assert isinstance(found, fb.FactoredBias) and found.table is not None
    torch.testing.assert_close(found.dense(), family().dense().detach())


def test_a_table_that_costs_more_than_the_matrix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the measured times of an H200; asked for, it is stored all the same."""
    family = fb.WindowBias(2, (24, 24))
    torch.nn.init.normal_(family.weight)
    torch.save(family.weight.detach(), "swin.pt")
    arguments = ["factor", "swin.pt", "--window", "24x24", "--batch", "64", "--head-dim", "32", "-o", "t.safetensors"]
    assert run(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert "a table would take" in said
    assert said.endswith("; try a larger --tol, or --allow-dense, or --exact-table")
    assert run([*arguments, "--exact-table"]) == 0
    found = load("t.safetensors")
    assert isinstance(found, fb.FactoredBias) and found.table is not None
    torch.testing.assert_close(found.dense(), family().dense().detach())


def test_exact_table_and_no_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("bias.npy", smooth(1).numpy())
    assert run(["factor", "bias.npy", "-o", "f.safetensors", "--exact-table", "--no-table"]) == 2
    assert "--exact-table does not go with --no-table" in capsys.readouterr().err


def test_a_mask_is_noted(folder: Path, device: list[str]) -> None:
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    np.save("bias.npy", smooth(1).masked_fill(hidden, float("nan")).numpy())
    arguments = ["factor", "bias.npy", "--mask", "causal", "-o", "f.safetensors", "--no-table", *device]
    assert run(arguments) == 0
    assert moved(load("f.safetensors"), smooth(1), is_causal=True) <= 1e-3
    with safe_open("f.safetensors", "pt") as file:
        assert file.metadata()["mask"] == "causal"


def test_a_refusal_writes_nothing_and_exits_with_1(
    folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("bias.npy", noise(2).numpy())
    assert run(["factor", "bias.npy", "-o", "new/f.safetensors", *device]) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.strip()]
    assert line.startswith("flashbias: no form keeps tol 0.001 at less than the predicted time of a dense bias")
    assert line.endswith("; try a larger --tol, or --allow-dense")
    assert captured.out == ""
    assert [path.name for path in folder.iterdir()] == ["bias.npy"]


def test_dense_heads_are_kept_when_allowed(folder: Path, device: list[str]) -> None:
    bias = torch.cat([smooth(2, 200), noise(1)])
    np.save("bias.npy", bias.numpy())
    arguments = ["factor", "bias.npy", "-o", "f.safetensors", "--allow-dense", "--no-table", *device]
    assert run(arguments) == 0
    found = load("f.safetensors")
    assert isinstance(found, fb.MixedBias)
    assert sorted(h.form for h in found.report.heads) == ["dense", "low rank", "low rank"]
    assert moved(found, bias) <= 1e-3


def test_layers_go_into_files_of_their_own(folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    layers = torch.stack([smooth(2), 2 * smooth(2)])
    np.save("bias.npy", layers.numpy())
    assert run(["factor", "bias.npy", "-o", "f.safetensors", *device]) == 2
    assert "bias.npy holds 2 layers: put {layer} into --out" in capsys.readouterr().err
    assert run(["factor", "bias.npy", "-o", "f-{layer}.safetensors", "--no-table", *device]) == 0
    for n, bias in enumerate(layers):
        assert moved(load(f"f-{n}.safetensors"), bias) <= 1e-3
    assert run(["factor", "bias.npy", "--layer", "1", "-o", "one.safetensors", "--no-table", *device]) == 0
    assert torch.equal(load("one.safetensors").dense(), load("f-1.safetensors").dense())


def test_one_layer_that_is_refused_keeps_all_from_being_written(
    folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a.0": smooth(1, 200), "a.1": noise(1)}, "bias.safetensors")
    arguments = ["factor", "bias.safetensors", "--key", "a.*", "-o", "f-{layer}.safetensors", "--no-table", *device]
    assert run(arguments) == 1
    assert "flashbias: a.1: no form keeps tol" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["bias.safetensors"]


@pytest.mark.parametrize("max_rank", ["2", "30"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rank_and_dtype_of_factors(folder: Path, device: list[str], max_rank: str, dtype: str) -> None:
    np.save("bias.npy", smooth(1).numpy())
    options = ["--max-rank", max_rank, "--factor-dtype", dtype, "--no-table"]
    code = run(["factor", "bias.npy", "-o", "f.safetensors", *options, *device])
    assert code == (1 if max_rank == "2" else 0)
    if code == 0:
        found = load("f.safetensors")
        assert isinstance(found, fb.FactoredBias)
        assert found.phi_q.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bias.npy"], "--out"),
        (["nope.npy", "-o", "f.safetensors"], "nope.npy"),
        (["bias.npy", "-o", "f.pt"], "--out must end in .safetensors, got f.pt"),
        (["bias.npy", "-o", "folder.safetensors"], "is a folder"),
        (["factors.safetensors", "-o", "factors.safetensors"], "--out is factors.safetensors, the file to read"),
        (["bias.npy", "-o", "f.safetensors", "--max-rank", "0"], "--max-rank must be at least 1, got 0"),
        (["bias.npy", "-o", "f.safetensors", "--factor-dtype", "int8"], "--factor-dtype must be float32 or bfloat16"),
        (["bias.npy", "-o", "f.safetensors", "--tol", "2"], "tol must be a number in (0, 1), got 2.0"),
        (["nan.npy", "-o", "f.safetensors"], "not finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("bias.npy", np.zeros((3, 4, 4), dtype=np.float32))
    np.save("nan.npy", np.full((3, 4, 4), np.nan, dtype=np.float32))
    save_file({"x": torch.zeros(1, 4, 4)}, "factors.safetensors")
    (folder / "folder.safetensors").mkdir()
    before = sorted(path.name for path in folder.iterdir())
    assert run(["factor", *arguments]) == 2
    captured = capsys.readouterr()
    assert len([line for line in captured.err.splitlines() if line.strip()]) == 1, captured.err
    assert captured.err.lstrip().startswith("flashbias: ") and said in captured.err
    assert captured.out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("where", ["compress", "write"])
def test_an_interruption_leaves_no_half_file(
    where: str, folder: Path, device: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("bias.npy", smooth(1).numpy())

    def interrupted(tensors: object, name: str = "", **kwargs: object) -> None:
        if name:
            Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    if where == "write":
        monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    else:
        monkeypatch.setattr(command, "compress", lambda *args, **kwargs: interrupted(None))
    assert run(["factor", "bias.npy", "-o", "f.safetensors", "--no-table", *device]) == 130
    assert capsys.readouterr().out == ""
    assert [path.name for path in folder.iterdir()] == ["bias.npy"]
