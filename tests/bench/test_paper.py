import json
import re

import pytest

from flashbias.bench import CASES, SUITES, write_tables
from flashbias.bench.paper import EXPERIMENTS, PAPER_CASES, render_paper, write_page
from flashbias.bench.report import Row, read_rows, write_rows

SHAPES = {
    "gpt2-2k": ((1, 50, 2048, 32), 2),
    "swinv2-stage1": ((1024, 4, 576, 32), 16),
    "swinv2-stage2": ((256, 8, 576, 32), 16),
    "swinv2-stage3": ((64, 16, 576, 32), 16),
    "swinv2-stage4": ((64, 32, 144, 32), 16),
    "car-8k": ((1, 8, 8192, 16), 5),
    "car-16k": ((1, 8, 16384, 16), 5),
    "car-32k": ((1, 8, 32186, 16), 5),
    "pairformer-1218": ((1, 1218, 4, 1218, 32), 96),
    "pangu-fine": ((30, 744, 144, 32), 56),
    "pangu-coarse": ((15, 768, 144, 32), 56),
}


def ok(case, pass_name, provider, median, peak="", dtype="bfloat16"):
    return Row(case, pass_name, provider, dtype, str(median), str(median), str(median), peak, "1e-3")


def lines(text, title="**The paper and this library, bfloat16**"):
    """Cells of the comparison, by table and pass."""
    rows = [line.strip("| ").split(" | ") for line in text.split(title)[1].splitlines() if line.startswith("| Table")]
    return {cells[0].split(":")[0]: cells for cells in rows}


@pytest.fixture
def page_of(tmp_path):
    def make(rows):
        path = tmp_path / "paper.csv"
        write_rows(path, rows)
        facts = {"device": "NVIDIA H200", "started": "2026-01-02T03:04:05+00:00", "packages": {"torch": "2.11.0"}}
        path.with_suffix(".json").write_text(json.dumps(facts))
        return path

    return make


# -------------------------------------------------------------------- cases and figures


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_paper(name):
    case = PAPER_CASES[name]
    assert ((*case.batch, case.num_heads, case.seqlen, case.head_dim), case.rank) == SHAPES[name]
    assert case.shared
    assert case.is_causal == name.startswith("gpt2")


def test_every_case_is_listed_here():
    assert list(PAPER_CASES) == list(SHAPES)
    assert not set(PAPER_CASES) & set(CASES)  # a row's name says which case it is


@pytest.mark.parametrize(("paper", "frozen"), [("swinv2-stage1", "swin-576"), ("car-32k", "mesh-32k")])
def test_shapes_agree_with_the_frozen_cases_of_the_same_models(paper, frozen):
    a, b = PAPER_CASES[paper], CASES[frozen]
    assert (a.shape, a.bias, a.is_causal, a.shared) == (b.shape, b.bias, b.is_causal, b.shared)


def test_widths_are_those_of_the_models():
    for name, channels in (("gpt2-2k", 1600), ("swinv2-stage1", 128), ("swinv2-stage4", 1024), ("car-32k", 128)):
        assert PAPER_CASES[name].num_heads * PAPER_CASES[name].head_dim == channels


def test_layers_are_those_of_the_models():
    layers = [(e.table, sum(count for _, count in e.calls)) for e in EXPERIMENTS]
    assert layers == [(3, 48), (4, 24), (5, 8), (5, 8), (5, 8), (6, 96), (7, 4), (7, 12)]


def test_windows_hold_all_tokens_of_64_images():
    for stage, (name, side) in enumerate((("swinv2-stage1", 96), ("swinv2-stage2", 48), ("swinv2-stage3", 24)), 1):
        case = PAPER_CASES[name]
        assert case.batch[0] * case.seqlen == 64 * side**2, stage
    for name, heads, places in (("pangu-fine", 6, 8 * 186 * 360), ("pangu-coarse", 12, 8 * 96 * 180)):
        pangu = PAPER_CASES[name]
        assert pangu.batch[0] * pangu.num_heads // heads * pangu.seqlen == places


def test_every_experiment_but_one_is_reported_forward_and_the_paper_is_never_slower_than_a_dense_bias():
    for experiment in EXPERIMENTS:
        assert ("fwd" in experiment.reported) != (experiment.title == "Pangu-Weather, coarse scale")
        for reported in experiment.reported.values():
            factored, dense = reported.figures["factored"], reported.figures["dense bias"]
            assert factored is not None
            assert dense is None or factored.time < dense.time
        assert experiment.difference.endswith(".")


# -------------------------------------------------------------------- the page


def test_a_model_of_several_cases_is_the_sum_over_its_layers(page_of):
    rows = [ok(f"swinv2-stage{s}", "fwd", "ours/triton", s, f"{10 * s}.0") for s in (1, 2, 3, 4)]
    rows += [ok(f"swinv2-stage{s}", "fwd", "dense/flex", 2 * s, "300.0") for s in (1, 2, 3)]
    rows += [ok("swinv2-stage4", "fwd", "dense/sdpa-cudnn", 1.5), ok("swinv2-stage4", "fwd", "dense/flex", 9)]
    rows += [ok("swinv2-stage1", "fwd", "bias-free/fa4", 0.5)]
    (cells,) = lines(render_paper(page_of(rows))).values()
    case, paper, ours, difference = cells
    assert "18 calls of `swinv2-stage3`: 64×16×576×32" in case
    assert paper.startswith("factored 0.19, dense bias 0.23, no bias 0.18, original code 0.473 s per batch of 64<br>")
    assert "dense bias / factored **1.21**" in paper
    assert "memory: factored 9429, dense bias 11448" in paper
    factored, dense = 2 * 1 + 2 * 2 + 18 * 3 + 2 * 4, 2 * 2 + 2 * 4 + 18 * 6 + 2 * 1.5
    assert ours.startswith(f"factored {factored} (triton), dense bias {dense:g} (flex, sdpa-cudnn) ms per pass; ")
    assert "no bias without a number" in ours  # one stage alone is no model
    assert f"dense bias / factored **{dense / factored:.2f}**" in ours
    assert ours.endswith("memory: factored 40 MiB, of the largest call")
    assert "Attention alone against a whole model; NVIDIA H200 and bfloat16 against one A100 and fp16." in difference


def test_what_ran_out_of_memory_says_so_on_both_sides(page_of):
    rows = [
        ok("car-32k", "fwdbwd", "ours/triton", 13.5),
        ok("car-32k", "fwdbwd", "dense/sdpa-cudnn", 27.0),
        Row("car-32k", "fwdbwd", "dense+grad/flex", "bfloat16", status="oom"),
    ]
    _, paper, ours, _ = lines(render_paper(page_of(rows)))["Table 5, forward and backward"]
    assert paper.startswith("factored 51.1 s per 100 iterations; dense bias out of memory")
    assert "/ factored" not in paper
    assert ours.startswith("factored 108 (triton), dense bias 216 (sdpa-cudnn) ms per pass; dense bias with gradient")
    assert "dense bias / factored **2.00**" in ours


def test_a_pass_that_the_paper_does_not_time_has_our_figure_alone(page_of):
    _, paper, ours, _ = lines(render_paper(page_of([ok("pangu-fine", "fwdbwd", "ours/triton", 1)])))[
        "Table 7, forward and backward"
    ]
    assert (paper, ours) == ("not reported", "factored 4 (triton) ms per pass")


def test_frozen_alibi_is_not_compared_with_a_gradient_to_its_bias(page_of):
    rows = [
        ok("gpt2-2k", "fwdbwd", "ours/triton", 1),
        ok("gpt2-2k", "fwdbwd", "dense+grad/flex", 9),
        ok("gpt2-2k", "fwdbwd", "alibi/flex", 1.5),
        ok("gpt2-2k", "fwdbwd", "bias-free/fa4", 0.8),
    ]
    _, _, ours, _ = lines(render_paper(page_of(rows)))["Table 3, forward and backward"]
    assert "with gradient" not in ours
    assert "ALiBi in place / factored **1.50**, factored / no bias **1.25**" in ours


def test_each_dtype_has_a_table_and_a_summary_has_nothing_else(page_of):
    path = page_of([ok("gpt2-2k", "fwd", "ours/triton", 1, dtype=dtype) for dtype in ("bfloat16", "float16")])
    summary = render_paper(path, summary=True)
    assert (
        "float16 against one A100" in lines(summary, "**The paper and this library, float16**")["Table 3, forward"][3]
    )
    assert "median time" not in summary
    assert "**Forward, float16: median time, ms**" in render_paper(path)


def test_small_versions_are_said_to_prove_nothing(page_of):
    text = render_paper(page_of([ok("gpt2-2k@small", "fwd", "ours/sdpa", 1)]))
    assert "say nothing about the paper's" in lines(text)["Table 3, forward"][3]


def test_what_has_no_time_is_listed_with_the_reason_and_has_no_line(page_of):
    rows = [
        ok("gpt2-2k", "fwd", "ours/triton", 1),
        Row("gpt2-2k", "fwd", "bias-free/fa4", "bfloat16", status="not installed"),
        Row("gpt2-2k", "fwdbwd", "ours/triton", "bfloat16", status="wrong"),
        Row("pangu-fine", "fwd", "ours/triton", "bfloat16", status="skipped: time limit"),
        Row("pangu-fine", "fwd", "dense/flex", "bfloat16", status="skipped: time limit"),
    ]
    text = render_paper(page_of(rows))
    assert list(lines(text)) == ["Table 3, forward"]
    assert "- Table 3, forward and backward: GPT-2 1.5B, ALiBi (wrong)\n" in text
    assert "- Table 7, forward: Pangu-Weather, fine scale (skipped: time limit)\n" in text
    assert "Not installed in this run, so in no column: `fa4`.\n" in text
    assert "| pangu-fine |" not in text


def test_a_run_without_any_time_says_so(page_of):
    text = render_paper(page_of([Row("gpt2-2k", "fwd", "ours/triton", "bfloat16", status="oom")]))
    assert "**The paper and this library, bfloat16**: nothing was timed\n" in text
    assert "- Table 3, forward: GPT-2 1.5B, ALiBi (oom)\n" in text


def test_rows_of_other_cases_make_no_page(page_of):
    with pytest.raises(ValueError, match="holds no row of the paper's cases, which are gpt2-2k"):
        render_paper(page_of([ok("swin-49", "fwd", "ours/sdpa", 1)]))


def test_the_page_can_be_brought_up_to_date_in_a_document(page_of, tmp_path):
    path = page_of([ok("gpt2-2k", "fwd", "ours/triton", 1)])
    page = write_page(path)
    assert page == tmp_path / "paper.md"
    assert page.read_text().startswith("# The paper's tables\n")
    document = tmp_path / "copy.md"
    document.write_text(page.read_text())
    assert write_tables(tmp_path, [document], "paper", render_paper) == []  # it is what was written
    page_of([ok("gpt2-2k", "fwd", "ours/triton", 2)])
    assert write_tables(tmp_path, [document], "paper", render_paper) == [document]
    assert "factored 96 (triton)" in document.read_text()
    document.write_text("<!-- bench:begin --><!-- bench:end -->")
    with pytest.raises(ValueError, match="one <!-- paper:begin -->"):
        write_tables(tmp_path, [document], "paper", render_paper)


# -------------------------------------------------------------------- the suite


def test_a_small_run_agrees_with_float64_and_can_be_resumed(tmp_path):
    options = {"small": True, "device": "cpu", "budget_s": 0.001, "min_repetitions": 2}
    suite = SUITES["paper"]
    arguments = (["fwd"], ["ours/sdpa", "dense/sdpa"], ["float32"], tmp_path)
    some, page = suite.run(["gpt2-2k"], *arguments, **options)
    assert (some, page) == (tmp_path / "paper.csv", tmp_path / "paper.md")
    first = read_rows(some)
    path, page = suite.run(None, *arguments, **options, resume=True)
    rows = read_rows(path)
    assert rows[: len(first)] == first
    assert {row.status for row in rows} == {"ok"}
    assert [row.case for row in rows[::2]] == [f"{name}@small" for name in PAPER_CASES]
    assert len(re.findall(r"^\| Table [3-7], forward", page.read_text(), re.MULTILINE)) == len(EXPERIMENTS)
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match=r"unknown case 'swin-49'; cases are gpt2-2k"):
        suite.run(["swin-49"], *arguments, **options)
