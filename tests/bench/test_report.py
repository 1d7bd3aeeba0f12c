import json

import pytest

from flashbias.bench import render, write_tables
from flashbias.bench.report import COLUMNS, Row, read_rows, write_rows


def ok(case, pass_name, provider, median, peak="", dtype="bfloat16"):
    return Row(case, pass_name, provider, dtype, str(median), str(median), str(median), peak, "1e-3")


ROWS = [
    ok("full-64", "fwd", "ours/triton", 0.6, "16.0"),
    ok("full-64", "fwd", "ours/sdpa", 0.9, "64.0"),
    ok("full-64", "fwd", "ours-deterministic/triton", 0.1),
    ok("full-64", "fwd", "ours-bias-free/triton", 0.5),
    ok("full-64", "fwd", "ours-bias-free/hopper", 0.4),
    ok("full-64", "fwd", "bias-free/fa4", 0.48),
    ok("full-64", "fwd", "bias-free/flex", 0.7),
    ok("full-64", "fwd", "dense/flex", 1.2, "2048.0"),
    ok("full-64", "fwd", "dense/sdpa-cudnn", 1.5),
    Row("full-64", "fwd", "dense/sdpa-efficient", "bfloat16", status="oom"),
    ok("mesh-32k", "fwd", "ours/triton", 3.0),
    ok("mesh-32k", "fwd", "ours-bias-free/hopper", 2.0),
    Row("mesh-32k", "fwd", "dense/flex", "bfloat16", status="unsupported: index overflow beyond 2^31 elements"),
    Row("mesh-32k", "fwd", "concat/fa4", "bfloat16", max_rel_error="5e-1", status="wrong"),
    ok("full-64", "fwdbwd", "ours/triton", 2.0),
    ok("full-64", "fwdbwd", "dense+grad/flex", 12.0),
    ok("full-64", "fwdbwd", "dense/flex", 4.0),
]


@pytest.fixture
def run_csv(tmp_path):
    path = tmp_path / "h200" / "bench.csv"
    path.parent.mkdir()
    write_rows(path, ROWS)
    facts = {"device": "NVIDIA H200", "started": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef"}
    path.with_suffix(".json").write_text(json.dumps({**facts, "packages": {"torch": "2.11.0", "trifast": None}}))
    return path


def table(text, title):
    """Cells of one table, by row and column name."""
    lines = text.split(title)[1].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    width = next((n for n, row in enumerate(rows[1:], 1) if row[0] == "case"), len(rows))
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:width]}


def test_rows_survive_a_round_trip(tmp_path):
    path = tmp_path / "x.csv"
    rows = [*ROWS, Row("a", "fwd", "b", "c", status='error: "quoted", and a comma')]
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)


@pytest.mark.parametrize("cut", [1, 4, 30])
def test_a_last_row_that_was_cut_short_is_left_out(tmp_path, cut):
    """Also where all of its columns have begun: `error: over` is no verdict."""
    path = tmp_path / "x.csv"
    write_rows(path, [*ROWS[:1], Row("a", "fwd", "b", "c", status="error: over the time limit of 3 s")])
    path.write_text(path.read_text()[:-cut])
    assert read_rows(path) == ROWS[:1]


def test_a_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("case,ms\nfull-64,1\n")
    with pytest.raises(ValueError, match="must have the columns case,pass"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="must have the columns"):
        render(path)
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"x\.csv is no CSV"):
        read_rows(path)
    write_rows(path, [])
    with pytest.raises(ValueError, match="holds no row"):
        render(path)


def test_render_picks_the_fastest_and_forms_ratios(run_csv):
    text = render(run_csv)
    forward = table(text, "**Forward, bfloat16: median time, ms**")
    cells = forward["full-64"]
    assert cells["ours"] == "0.600 triton"  # a deterministic run is not the one that is compared
    assert cells["ours, repeatable"] == "0.100 triton"
    assert cells["ours, no bias"] == "0.500 triton"  # the same implementation, though hopper is faster
    assert cells["no bias, fastest peer"] == "0.480 fa4"
    assert cells["dense bias"] == "1.200 flex"
    assert cells["ours / no bias"] == "**1.25**"
    assert cells["ours / own no bias"] == "**1.20**"
    assert cells["dense / ours"] == "**2.00**"
    assert "dense bias with gradient" not in cells  # nobody has a number for it in this pass
    assert forward["mesh-32k"]["dense bias"] == "–"
    assert forward["mesh-32k"]["dense / ours"] == "–"
    assert forward["mesh-32k"]["ours, no bias"] == "–"  # another implementation's is none of it
    both = table(text, "**Forward and backward, bfloat16: median time, ms**")["full-64"]
    assert both["dense with gradient / ours"] == "**6.00**"
    assert both["dense / ours"] == "**2.00**"


def test_render_shows_memory_reasons_and_environment(run_csv):
    text = render(run_csv)
    memory = table(text, "**Forward, bfloat16: peak memory of the same, MiB**")["full-64"]
    assert memory["ours"] == "16"
    assert memory["dense bias"] == "2048"
    assert memory["no bias, fastest peer"] == "–"
    assert text.startswith("Measured on NVIDIA H200, torch 2.11.0, measured 2026-01-02, commit 0123456789.")
    assert "- oom: `dense/sdpa-efficient` (fwd: full-64)" in text
    assert "- unsupported: index overflow beyond 2^31 elements: `dense/flex` (fwd: mesh-32k)" in text
    assert "- wrong: `concat/fa4` (fwd: mesh-32k)" in text


def test_write_tables_replaces_what_stands_between_the_markers(run_csv, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- bench:begin -->\nold numbers\n<!-- bench:end -->\n\nAfter.\n")
    other = tmp_path / "other.md"
    other.write_text("<!-- bench:begin --><!-- bench:end -->")
    assert write_tables(tmp_path, [readme, str(other)]) == [readme, other]
    text = readme.read_text()
    assert text == f"# Title\n<!-- bench:begin -->\n{render(run_csv)}<!-- bench:end -->\n\nAfter.\n"
    assert write_tables(tmp_path, [readme, other]) == []  # nothing new
    assert readme.read_text() == text


def test_a_summary_has_the_times_alone(run_csv, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:begin summary -->\n<!-- bench:end -->\n")
    write_tables(tmp_path, [readme])
    text = readme.read_text()
    assert table(text, "**Forward, bfloat16: median time, ms**")["full-64"]["ours / no bias"] == "**1.25**"
    assert "peak memory" not in text and "Without a number" not in text
    assert text.startswith("<!-- bench:begin summary -->\nMeasured on NVIDIA H200")


def test_other_results_may_lie_beside_a_run(run_csv, tmp_path):
    (tmp_path / "errors.csv").write_text("case,error\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:begin --><!-- bench:end -->")
    assert write_tables(tmp_path, [readme]) == [readme]


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- bench:begin summary --><!-- bench:begin --><!-- bench:end -->",
        "<!-- bench:begin --> only",
        "<!-- bench:end --><!-- bench:begin -->",
        "<!-- bench:begin --><!-- bench:end --><!-- bench:begin --><!-- bench:end -->",
    ],
)
def test_a_document_without_one_pair_of_markers_is_left_alone(run_csv, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md must have one"):
        write_tables(tmp_path, [readme])
    assert readme.read_text() == text


def test_write_tables_needs_results(tmp_path):
    with pytest.raises(ValueError, match=r"no bench\.csv below"):
        write_tables(tmp_path, [])
