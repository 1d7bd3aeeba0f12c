"""The package builds, and what is built works where it is installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import flashbias

ROOT = Path(__file__).parents[1]
VERSION = flashbias.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel, and sees torch and the like of this one behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, str(wheel(built))], check=True)
    site = next((folder / "lib").glob("python3.*/site-packages"))
    # A line of a .pth file adds a folder and does not follow that folder's own .pth files, so that an
    # editable install of the library stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def wheel(folder: Path) -> Path:
    return folder / f"flashbias-{VERSION}-py3-none-any.whl"


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), "-P", *arguments], capture_output=True, text=True, cwd=cwd)


def test_wheel_holds_the_library_and_nothing_else(built: Path) -> None:
    names = set(zipfile.ZipFile(wheel(built)).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"flashbias", f"flashbias-{VERSION}.dist-info"}
    assert "flashbias/demo/data/2xhe.json" in names
    assert "flashbias/py.typed" in names
    assert f"flashbias-{VERSION}.dist-info/licenses/LICENSE" in names
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_sdist_holds_what_is_needed_to_build_and_test(built: Path) -> None:
    with tarfile.open(built / f"flashbias-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
    }
    assert wanted <= names
    assert "tests/test_package.py" in names
    assert not any(name.startswith((".venv", "results", "dist", "site")) for name in names)


def test_metadata(built: Path) -> None:
    with zipfile.ZipFile(wheel(built)) as archive:
        metadata = archive.read(f"flashbias-{VERSION}.dist-info/METADATA").decode()
        scripts = archive.read(f"flashbias-{VERSION}.dist-info/entry_points.txt").decode()
    assert "Requires-Python: >=3.11" in metadata
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].partition(">")[0] for line in core) == ["numpy", "torch"]
    assert "flashbias = flashbias.cli:main" in scripts


def test_installed_library_attends(installed: Path, tmp_path: Path) -> None:
    code = (
        "import torch, flashbias as fb; q = torch.randn(1, 2, 8, 16); "
        "bias = fb.FactoredBias(torch.randn(2, 8, 3), torch.randn(1, 8, 3)); "
        "print(fb.attention(q, q, q, bias).shape, fb.__file__)"
    )
    answer = run(installed, "-c", code, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "torch.Size([1, 2, 8, 16])" in answer.stdout
    assert str(installed.parents[1]) in answer.stdout, "another flashbias was imported"


def test_installed_demo_finds_its_protein(installed: Path, tmp_path: Path) -> None:
    code = "from flashbias.demo.protein import crystal; print(crystal(2).shape)"
    answer = run(installed, "-c", code, cwd=tmp_path)
    assert answer.stdout.strip() == "(1572, 3)", answer.stderr


def test_installed_command(installed: Path, tmp_path: Path) -> None:
    script = installed.with_name("flashbias")
    answer = subprocess.run([str(script), "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (answer.returncode, answer.stdout.strip()) == (0, f"flashbias {VERSION}"), answer.stderr
