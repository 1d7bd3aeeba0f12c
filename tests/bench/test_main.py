import subprocess
import sys

import pytest

from flashbias.bench.__main__ import main
from flashbias.bench.report import read_rows

SHORT = ["--small", "--device", "cpu", "--budget", "0.001", "--min-repetitions", "2", "--dtypes", "float32"]


def test_a_run_prints_rows_and_tables(tmp_path, capsys):
    arguments = [
        "--cases",
        "swin-49",
        "--passes",
        "fwd",
        "--providers",
        "ours/sdpa",
        "dense",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "[   1/2] swin-49@small" in printed
    assert "**Forward, float32: median time, ms**" in printed
    assert [row.provider for row in read_rows(tmp_path / "bench.csv")] == ["ours/sdpa", "dense/sdpa"]

    assert main(["--render", str(tmp_path / "bench.csv")]) == 0
    assert "| swin-49@small |" in capsys.readouterr().out

    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    assert main(["--write-tables", str(tmp_path), str(readme)]) == 0
    assert capsys.readouterr().out == f"updated {readme}\n"
    assert "| swin-49@small |" in readme.read_text()


def test_list_names_cases_and_providers(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "mesh-32k" in printed
    assert "1×8×32186×16 R5" in printed
    assert "ours/sdpa" in printed


def test_the_paper_is_a_suite_of_its_own(tmp_path, capsys):
    assert main(["paper", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "pangu-fine" in printed
    assert "mesh-32k" not in printed

    chosen = ["--cases", "gpt2-2k", "--passes", "fwd", "--providers", "ours/sdpa", "--out", str(tmp_path)]
    assert main([*chosen, *SHORT[:1], "paper", *SHORT[1:]]) == 0
    assert f"wrote {tmp_path / 'paper.csv'} {tmp_path / 'paper.md'}" in capsys.readouterr().out
    assert "| Table 3, forward: " in (tmp_path / "paper.md").read_text()

    page = tmp_path / "page.md"
    page.write_text("<!-- paper:begin summary --><!-- paper:end -->")
    assert main(["paper", "--write-tables", str(tmp_path), str(page)]) == 0
    assert "| Table 3, forward: " in page.read_text()
    assert main(["--write-tables", str(tmp_path), str(page)]) == 2
    assert "no bench.csv below" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["papers"],
        ["paper", "--cases", "swin-49"],
        ["--cases", "swin"],
        ["--providers", "nobody"],
        ["--dtypes", "int8"],
        ["--render", "nowhere.csv"],
        ["--time-limit", "0"],
        ["--warm", "-1"],
        ["--first", "nobody"],
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(arguments, capsys, tmp_path):
    assert main(["--out", str(tmp_path), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m flashbias.bench: error: ")
    assert error.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in (
        "--cases",
        "--providers",
        "--time-limit",
        "--isolate",
        "--warm",
        "--first",
        "--resume",
        "--write-tables",
    ):
        assert option in printed


def test_the_library_itself_does_not_load_the_benchmarks():
    code = "import sys, flashbias; sys.exit('flashbias.bench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_benchmarks_need_nothing_beyond_the_core():
    code = (
        "import sys, flashbias.bench.__main__\n"
        "sys.exit(bool({'triton', 'typer', 'rich', 'matplotlib', 'timm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
