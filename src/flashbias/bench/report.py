"""What a run leaves behind: rows of a CSV, and the tables of README and documentation made from them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

__all__ = [
    "COLUMNS",
    "PASS_TITLES",
    "Row",
    "fastest",
    "heading",
    "markdown_table",
    "markers",
    "read_rows",
    "render",
    "render_rows",
    "replace_file",
    "write_rows",
    "write_tables",
]


@dataclass(frozen=True)
class Row:
    """One line of the CSV; a number is a string, empty where there is none.

    `status` is one of `ok`, `wrong`, `oom`, `not installed`, `unsupported: …`, `error: …`, `skipped: …`.
    Only `ok` has times. `max_rel_error` is the agreement check's (`agreement.max_rel_error`). `peak_mib` is
    the memory that the call takes beyond query, key, value, dout and factors; a dense matrix that a provider
    reads counts.
    """

    case: str
    pass_name: str
    provider: str
    dtype: str
    median_ms: str = ""
    p10_ms: str = ""
    p90_ms: str = ""
    peak_mib: str = ""
    max_rel_error: str = ""
    status: str = "ok"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells one row of a run from another."""
        return self.case, self.pass_name, self.provider, self.dtype

    @property
    def family(self) -> str:
        """What stands before the slash of the provider."""
        return self.provider.split("/", 1)[0]

    @property
    def is_finished(self) -> bool:
        """Whether a resumed run keeps it."""
        return not self.status.startswith("skipped")


COLUMNS = tuple("pass" if field.name == "pass_name" else field.name for field in fields(Row))


def read_rows(path: Path) -> list[Row]:
    """Read a CSV; a last line that an interruption cut short is left out.

    Raises:
        ValueError: it is no text, or the columns are not those of a benchmark.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV: {error}") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}, got {','.join(lines[0] if lines else [])}")
    return [Row(*line) for line in lines[1:] if len(line) == len(COLUMNS)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a whole CSV at once, through a temporary name."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in rows)
    os.replace(partial, path)


def replace_file(path: Path, text: str) -> None:
    """Write text through a temporary name, so that nobody reads half a file."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)


# -------------------------------------------------------------------- tables


def render(csv_path: Path | str, *, summary: bool = False) -> str:
    """Make Markdown tables of one run, one for each pass and dtype.

    Args:
        csv_path: written by `run`; the JSON beside it, if there, gives the heading.
        summary: times alone, without memory and without the reasons for missing numbers.

    Returns:
        Markdown: times in milliseconds, the fastest provider of each family named beside its time, and ratios
        within the run. Rows without a number are listed below the tables with the reason.

    Raises:
        ValueError: the file is not a benchmark's, or holds no row.
    """
    path = Path(csv_path)
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} holds no row")
    parts = [heading(path.with_suffix(".json")), render_rows(rows, summary=summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_rows(rows: Sequence[Row], *, summary: bool = False) -> str:
    """The tables of `render` without its heading."""
    parts = []
    for pass_name, dtype in dict.fromkeys((row.pass_name, row.dtype) for row in rows):
        chosen = [row for row in rows if (row.pass_name, row.dtype) == (pass_name, dtype)]
        title = f"{PASS_TITLES.get(pass_name, pass_name)}, {dtype}"
        parts.append(f"**{title}: median time, ms**\n\n{_time_table(chosen)}")
        if not summary and any(row.peak_mib for row in chosen):
            parts.append(f"**{title}: peak memory of the same, MiB**\n\n{_memory_table(chosen)}")
    if not summary and (missing := _without_number(rows)):
        parts.append(missing)
    return "\n\n".join(parts)


PASS_TITLES = {"fwd": "Forward", "fwdbwd": "Forward and backward"}

# Title of a column, and the families whose fastest provider it shows.
_FAMILY_COLUMNS = (
    ("ours", "ours"),
    ("ours, repeatable", "ours-deterministic"),
    ("ours, no bias", "ours-bias-free"),
    ("no bias, fastest peer", "bias-free"),
    ("concat", "concat"),
    ("ALiBi in place", "alibi"),
    ("dense bias", "dense"),
    ("dense bias with gradient", "dense+grad"),
)

_RATIO_COLUMNS = (
    ("ours / no bias", "ours", "bias-free"),
    ("ours / own no bias", "ours", "ours-bias-free"),
    ("dense / ours", "dense", "ours"),
    ("dense with gradient / ours", "dense+grad", "ours"),
)


Winners = dict[str, dict[str, Row | None]]  # case -> family -> its fastest row


def _winners(rows: Sequence[Row]) -> Winners:
    winners: Winners = {}
    for case in dict.fromkeys(row.case for row in rows):
        best = {family: fastest(rows, case, family) for _, family in _FAMILY_COLUMNS}
        if ours := best["ours"]:  # compare an implementation with itself
            for family in ("ours-bias-free", "ours-deterministic"):
                same = [row for row in rows if row.provider == ours.provider.replace("ours", family)]
                best[family] = fastest(same, case, family)
        winners[case] = best
    return winners


def _time_table(rows: Sequence[Row]) -> str:
    """One line for each case; a column appears if any case has a number for it."""
    winners = _winners(rows)
    columns = _used_columns(winners)
    shown = {family for _, family in columns}
    ratios = [column for column in _RATIO_COLUMNS if {column[1], column[2]} <= shown]
    titles = [title for title, *_ in (*columns, *ratios)]
    lines = []
    for case, best in winners.items():
        cells = [_time_cell(best[family]) for _, family in columns]
        cells += [_ratio_cell(best[over], best[under]) for _, over, under in ratios]
        lines.append([case, *cells])
    return markdown_table(["case", *titles], lines)


def _memory_table(rows: Sequence[Row]) -> str:
    winners = _winners(rows)
    columns = _used_columns(winners)
    lines = [[case, *(_memory_cell(best[family]) for _, family in columns)] for case, best in winners.items()]
    return markdown_table(["case", *(title for title, _ in columns)], lines)


def _used_columns(winners: Winners) -> list[tuple[str, str]]:
    return [column for column in _FAMILY_COLUMNS if any(best[column[1]] for best in winners.values())]


def markdown_table(titles: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """Make a Markdown table.

    Args:
        titles: of the columns.
        lines: cells.
        numbers: whether all columns but the first hold numbers, which stand to the right.
    """
    rows = [titles, ["---"] + ["---:" if numbers else "---"] * (len(titles) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fastest(rows: Sequence[Row], case: str, family: str) -> Row | None:
    """The row of a family with the shortest time on a case, None if none has a number."""
    timed = [row for row in rows if row.case == case and row.family == family and row.status == "ok"]
    return min(timed, key=lambda row: float(row.median_ms), default=None)


def _time_cell(row: Row | None) -> str:
    return "–" if row is None else f"{float(row.median_ms):.3f} {row.provider.split('/', 1)[1]}"


def _ratio_cell(over: Row | None, under: Row | None) -> str:
    return "–" if over is None or under is None else f"**{float(over.median_ms) / float(under.median_ms):.2f}**"


def _memory_cell(row: Row | None) -> str:
    return "–" if row is None or not row.peak_mib else f"{float(row.peak_mib):.0f}"


def _without_number(rows: Sequence[Row]) -> str:
    """What could not be timed, by reason and provider."""
    reasons: dict[str, dict[str, dict[str, list[str]]]] = {}
    several = len({row.dtype for row in rows}) > 1
    for row in rows:
        if row.status != "ok":
            what = f"{row.pass_name} {row.dtype}" if several else row.pass_name
            reasons.setdefault(row.status, {}).setdefault(row.provider, {}).setdefault(what, []).append(row.case)
    if not reasons:
        return ""
    items = []
    for reason, providers in reasons.items():
        cells = []
        for provider, whats in providers.items():
            same: dict[tuple[str, ...], list[str]] = {}
            for what, cases in whats.items():
                same.setdefault(tuple(cases), []).append(what)
            where = "; ".join(f"{', '.join(what)}: {' '.join(cases)}" for cases, what in same.items())
            cells.append(f"`{provider}` ({where})")
        items.append(f"- {reason}: " + ", ".join(cells))
    return "<details><summary>Without a number</summary>\n\n" + "\n".join(items) + "\n\n</details>"


def heading(json_path: Path) -> str:
    """Say where a run was measured, from the JSON beside its CSV; nothing if there is none."""
    if not json_path.exists():
        return ""
    environment = json.loads(json_path.read_text())
    packages = environment.get("packages", {})
    versions = [f"{name} {version}" for name, version in packages.items() if version]
    parts = [environment.get("device", ""), *versions, f"measured {environment.get('started', '')[:10]}"]
    if commit := environment.get("commit"):
        parts.append(f"commit {commit[:10]}{'-dirty' if commit.endswith('-dirty') else ''}")
    return "Measured on " + ", ".join(part for part in parts if part) + "."


def markers(name: str) -> tuple[str, str, str]:
    """What stands before generated tables in a document, before a summary of them, and after either."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:begin summary -->", f"<!-- {name}:end -->"


def write_tables(
    results_dir: Path | str, files: Iterable[Path | str], name: str = "bench", make: Callable[..., str] = render
) -> list[Path]:
    """Put the tables of every run of one name below a folder between the markers of documents.

    What stands between `<!-- bench:begin -->` and `<!-- bench:end -->` is replaced; the rest is left alone. With
    `<!-- bench:begin summary -->` the document gets a summary. Another name has markers of that name.

    Args:
        results_dir: searched for `NAME.csv`, also in folders of its own, as in `benchmarks/results/h200/`; other
            results may lie beside them.
        files: Markdown files with one pair of markers each.
        name: of the runs.
        make: makes the tables of one run, from the path of its CSV and `summary`, as `render` does.

    Returns:
        The files whose text has changed.

    Raises:
        ValueError: there is no CSV, or a file does not have exactly one pair of markers.
    """
    results_dir = Path(results_dir)
    found = sorted(results_dir.rglob(f"{name}.csv"))
    if not found:
        raise ValueError(f"no {name}.csv below {results_dir}")
    _, begin_summary, end = markers(name)
    changed = []
    for file in map(Path, files):
        old = file.read_text()
        begin = _begin_marker(file, old, name)
        text = "\n".join(make(path, summary=begin == begin_summary) for path in found)
        before, rest = old.split(begin)
        new = f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"
        if new != old:
            replace_file(file, new)
            changed.append(file)
    return changed


def _begin_marker(file: Path, text: str, name: str) -> str:
    """The marker before the tables, of which there is one, as of the marker after them."""
    begin, begin_summary, end = markers(name)
    begins = [marker for marker in (begin, begin_summary) for _ in range(text.count(marker))]
    if len(begins) != 1 or text.count(end) != 1 or text.index(begins[0]) > text.index(end):
        raise ValueError(f"{file} must have one {begin} (or {begin_summary}) and, after it, one {end}")
    return begins[0]
