from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flashbias as fb
from flashbias.cli import analyze as command
from flashbias.cli import source
from flashbias.cli.app import run


def smooth(heads: int, size: int = 40) -> torch.Tensor:
    x = torch.linspace(0, 1, size)
    return torch.stack([torch.exp(-((x[:, None] - x * x) ** 2) * (h + 1)) for h in range(heads)])


def test_a_table_on_the_terminal_and_a_page(
    folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("bias.npy", smooth(3).numpy())
    assert run(["analyze", "bias.npy", *device]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "low rank" in line and "│" in line]
    assert len(rows) == 3
    assert "Use factors of" in out and "wrote bias.html" in out
    html = (folder / "bias.html").read_text()
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")
    assert "3 heads × 40 × 40" in html
    assert "flashbias factor bias.npy --tol 0.001 --device" in html and "-o factors.safetensors</pre>" in html
    assert sorted(path.name for path in folder.iterdir()) == ["bias.html", "bias.npy"]


def test_without_a_device_the_measured_one_decides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("bias.npy", smooth(1).numpy())
    assert run(["analyze", "bias.npy"]) == 0
    assert "H200" in (folder / "bias.html").read_text()


def test_a_refusal_is_a_result(folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"bias": 3 * torch.randn(200, 200)}}, "bias.pt")
    assert run(["analyze", "bias.pt", "--out", "pages/refused.html", *device]) == 0
    out = capsys.readouterr().out
    assert "Keep it dense." in out
    assert "- It is no relative bias" in out
    html = (folder / "pages" / "refused.html").read_text()
    assert "Keep it dense." in html and "<pre>" not in html


def test_layers_of_a_pattern_with_a_window(folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tables = {f"layers.{n}.attn.bias_table": torch.randn(49, 2 + n) for n in (0, 1)}
    save_file(tables, "swin.safetensors")
    arguments = ["analyze", "swin.safetensors", "--key", "layers.*", "--window", "4x4", "--batch", "8", *device]
    assert run([*arguments, "--head-dim", "32"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.attn.bias_table" in out and "layers.1.attn.bias_table" in out
    html = (folder / "swin.html").read_text()
    assert "2 layers, 5 heads" in html and "batch 8" in html and "head_dim 32" in html
    assert html.count("place in a 4×4 window") >= 5
    assert run([*arguments, "--layer", "1"]) == 0
    assert "3 heads × 16 × 16" in (folder / "swin.html").read_text()


def test_a_mask(folder: Path, device: list[str]) -> None:
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    np.save("bias.npy", smooth(1).masked_fill(hidden, float("-inf")).numpy())
    assert run(["analyze", "bias.npy", *device]) == 2
    assert run(["analyze", "bias.npy", "--mask", "causal", *device]) == 0
    html = (folder / "bias.html").read_text()
    assert "<span>causal</span>" in html and "Blank: not read." in html and "--mask causal" in html


def test_a_part_that_pays_is_offered_with_dense_heads(folder: Path, device: list[str]) -> None:
    save_file({"0": smooth(1, 200), "1": 3 * torch.randn(1, 200, 200)}, "bias.safetensors")
    assert run(["analyze", "bias.safetensors", "--key", "*", *device]) == 0
    assert "--allow-dense -o 'factors-{layer}.safetensors'" in (folder / "bias.html").read_text().replace("&#x27;", "'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope.npy"], "nope.npy"),
        (["bias.npy", "--tol", "0"], "tol must be a number in (0, 1), got 0.0"),
        (["bias.npy", "--tol", "1.5"], "tol must be a number in (0, 1), got 1.5"),
        (["bias.npy", "--key", "x"], "there is no key 'x'"),
        (["bias.npy", "--window", "7"], "--window must be two or three sides like 24x24 or 2x6x12, got '7'"),
        (["bias.npy", "--window", "7x7"], "which is no table"),
        (["bias.npy", "--window", "7x7", "--seqlen", "4"], "exclude each other"),
        (["bias.npy", "--seqlen", "0"], "seqlen must be at least 1"),
        (["bias.npy", "--layer", "1"], "--layer must lie in 0 … 0, got 1"),
        (["bias.npy", "--mask", "padding"], "--mask must be one of causal, causal-top-left"),
        (["wide.npy", "--mask", "causal"], "not clear for 4 queries and 9 keys"),
        (["bias.npy", "--head-dim", "0"], "--head-dim must be at least 1, got 0"),
        (["bias.npy", "--batch", "-1"], "--batch must be at least 1, got -1"),
        (["bias.npy", "--training", "both"], "--training must be one of none, frozen, bias, got 'both'"),
        (["bias.npy", "--dtype", "int8"], "--dtype must be one of bfloat16"),
        (["bias.npy", "--device", "abacus"], "no coefficients for device 'abacus'"),
        (["bias.npy", "--out", "."], "is a folder"),
        (["bias.npy", "--out", "bias.npy"], "--out is bias.npy, the file to read"),
        (["bias.npy", "--out", "bias.npy/x.html"], "is no folder"),
        (["nan.npy"], "not finite"),
        (["layers.npy"], "layer 1: bias has 1 entries"),
        (["text.npy"], "is not what its name says"),
        (["text.pt"], "is not what its name says"),
        (["text.safetensors"], "is no safetensors file"),
        (["text.txt"], "must end in .npy"),
        (["integers.npy"], "must hold float16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bias = np.zeros((2, 3, 4, 4), dtype=np.float32)
    np.save("bias.npy", bias[0])
    np.save("wide.npy", np.zeros((4, 9)))
    np.save("integers.npy", np.zeros((4, 4), dtype=int))
    bias[1, 2, 3, 0] = np.nan
    np.save("layers.npy", bias)
    np.save("nan.npy", bias[1])
    for suffix in ("npy", "pt", "safetensors", "txt"):
        Path(f"text.{suffix}").write_text("this is text and nothing else")
    before = sorted(path.name for path in folder.iterdir())
    assert run(["analyze", *arguments]) == 2
    captured = capsys.readouterr()
    assert len([line for line in captured.err.splitlines() if line.strip()]) == 1, captured.err
    assert captured.err.lstrip().startswith("flashbias: ") and said in captured.err
    assert captured.out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


def test_too_little_memory_is_said_in_figures(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("bias.npy", np.zeros((2, 64, 64), dtype=np.float32))
    monkeypatch.setattr(source, "free_memory", lambda device: 1 << 10)
    assert run(["analyze", "bias.npy"]) == 1
    said = capsys.readouterr().err
    assert "the bias of 2×64×64 needs 0.0 GiB to work on, one head at a time, and 0.0 GiB are free" in said
    assert "compress_function" in said


@pytest.mark.parametrize("where", ["compress", "analyse", "render"])
def test_an_interruption_leaves_nothing(
    where: str, folder: Path, device: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("bias.npy", smooth(1).numpy())

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, where, interrupted)
    assert run(["analyze", "bias.npy", *device]) == 130
    assert capsys.readouterr().out == ""
    assert [path.name for path in folder.iterdir()] == ["bias.npy"]


def test_a_bias_of_a_family_is_recognised(folder: Path, device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    np.save("t5.npy", fb.RelativeBuckets(2, 8, 16)(96, 96).dense().detach().mul(50).numpy())
    assert run(["analyze", "t5.npy", *device]) == 0
    assert "read by position. It is exact" in capsys.readouterr().out
