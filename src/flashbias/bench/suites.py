"""Suites: which cases run together, who is timed on them, and how their rows are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashbias.bench.cases import CASES, Case, find_cases
from flashbias.bench.paper import PAPER_CASES, render_paper, write_page
from flashbias.bench.providers import FAMILIES
from flashbias.bench.report import render
from flashbias.bench.runner import run

__all__ = ["SUITES", "Suite", "find_suite"]


@dataclass(frozen=True)
class Suite:
    """Cases with a name.

    Args:
        name: of the files, unless another is given, and of the markers in documents.
        cases: by name.
        providers: families that are timed by default.
        render: makes Markdown of a CSV; it takes `summary` as well.
        write_page: writes a page of its own beside a CSV, if the suite has one.
    """

    name: str
    cases: Mapping[str, Case]
    providers: tuple[str, ...]
    render: Callable[..., str]
    write_page: Callable[[Path], Path] | None = None

    def run(self, cases: Iterable[str] | None, *arguments: Any, name: str | None = None, **options: Any) -> list[Path]:
        """Measure cases of the suite, see `flashbias.bench.run` for the arguments; return the CSV and any page."""
        path = run(find_cases(cases or self.cases, known=self.cases), *arguments, name=name or self.name, **options)
        return [path] if self.write_page is None else [path, self.write_page(path)]


SUITES = {
    suite.name: suite
    for suite in (
        Suite("bench", CASES, FAMILIES, render),
        Suite("paper", PAPER_CASES, ("ours", "bias-free", "alibi", "dense", "dense+grad"), render_paper, write_page),
    )
}


def find_suite(name: str) -> Suite:
    """Look a suite up.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]
