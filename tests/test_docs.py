"""What README and documentation tell the reader to run, runs; and what is generated is up to date."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashbias.bench import SUITES, write_tables
from flashbias.biases import registry
from flashbias.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
RESULTS = ROOT / "benchmarks" / "results"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path, program: str) -> list[str]:
    """Lines of shell that begin with a program, without their comments."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.startswith(program + " ")]


def with_some(pages: list[Path], found: object) -> list[object]:
    return [pytest.param(page, id=page.name) for page in pages if found(page)]  # type: ignore[operator]


@pytest.mark.parametrize("page", with_some(PAGES, lambda page: blocks(page, "python")))
def test_examples_run(page: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_readme_has_examples_and_both_commands() -> None:
    readme = ROOT / "README.md"
    assert blocks(readme, "python")
    assert {"make demo", "make test"} <= set(commands(readme, "make"))


@pytest.mark.parametrize("page", with_some(PAGES, lambda page: commands(page, "make")))
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(page, "make"):
        assert command.split()[1] in targets


@pytest.mark.parametrize("page", with_some(PAGES, lambda page: commands(page, "flashbias")))
def test_commands_exist_with_their_options(page: Path) -> None:
    for command in commands(page, "flashbias"):
        _, subcommand, *rest = command.split()
        answer = CliRunner().invoke(app, [subcommand, "--help"], terminal_width=200)
        assert answer.exit_code == 0, command
        for option in (word for word in rest if word.startswith("--")):
            assert option in answer.output, command


def test_site_has_a_line_for_every_bias(hooks: object) -> None:
    table = hooks.on_page_markdown("<!-- biases:table -->")  # type: ignore[attr-defined]
    for name, family in registry().items():
        assert f"[`{name}`]" in table
        assert family.about.url in table
    assert "<!-- biases:table -->" in (ROOT / "docs" / "biases.md").read_text()


@pytest.fixture
def hooks() -> object:
    import importlib.util

    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_benchmark_tables_are_those_of_the_committed_results(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / page.name
    shutil.copy(page, copy)
    if any(RESULTS.rglob("bench.csv")):
        write_tables(RESULTS, [copy])
        assert copy.read_text() == page.read_text(), "run python -m flashbias.bench --write-tables (CONTRIBUTING.md)"
    else:
        assert "No run has been committed yet." in page.read_text()


def test_tables_of_the_paper_are_those_of_the_committed_results(tmp_path: Path) -> None:
    page = ROOT / "docs" / "paper.md"
    copy = tmp_path / page.name
    shutil.copy(page, copy)
    write_tables(RESULTS, [copy], "paper", SUITES["paper"].render)
    assert copy.read_text() == page.read_text(), (
        "run python -m flashbias.bench paper --write-tables benchmarks/results docs/paper.md"
    )
