"""What is shown of a bias: its figures, the sentences, and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from tests.decompose.made_up_device import write_coefficients
from torch import Tensor

import flashbias as fb
from flashbias.decompose import NotLowRankError, compress, figures, page, verdict
from flashbias.decompose.figures import Analysis, HeadFigures, analyse
from flashbias.decompose.page import pixels_for, render

SIZE = 48
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; gathers what a page refers to, its ids and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := found.get(name))]
        self.ids += [value for value in [found.get("id")] if value]
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def says(self, what: str) -> bool:
        return what in re.sub(r"\s+", " ", "".join(self.text))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_coefficients(tmp_path_factory.mktemp("device"))


def smooth(heads: int = 2) -> Tensor:
    x = torch.linspace(0, 1, SIZE)
    return torch.stack([torch.exp(-((x[:, None] - x * x) ** 2) * (h + 1)) + 3 * x[:, None] for h in range(heads)])


def noise(heads: int = 2) -> Tensor:
    return 3 * torch.randn(heads, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def spiked() -> Tensor:
    """Relative along a line, with a spike at the diagonal: of full rank, and a short table."""
    table = torch.tensor([[0.0, -1.0, 5.0, 2.0, 0.5], [1.0, 0.0, -4.0, 1.0, 0.0]])
    return fb.FactoredBias.from_table(table, SIZE, SIZE).dense()


def in_a_window() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = fb.WindowBias(2, (6, 8))
        torch.nn.init.normal_(family.weight)
    return family().dense().detach()


def analysis_of(bias: Tensor, device: str, name: str = "", **options: object) -> Analysis:
    mask = options.get("mask")
    try:
        found = compress(bias, 1e-3, device=device, **options)  # type: ignore[arg-type]
    except NotLowRankError as refusal:
        found = refusal
    return analyse(name, bias, found, mask=mask if isinstance(mask, Tensor) else None, pixels=32)


@pytest.fixture(scope="module")
def analyses(device: str) -> dict[str, Analysis]:
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    return {
        "low rank": analysis_of(smooth(), device),
        "table": analysis_of(spiked(), device),
        "window": analysis_of(in_a_window(), device),
        "refused": analysis_of(noise(), device, max_rank=12),
        "mixed": analysis_of(torch.cat([smooth(1), noise(1)]), device, max_rank=12, allow_dense=True),
        "all dense": analysis_of(noise(), device, max_rank=2, allow_dense=True),
        "causal": analysis_of(smooth().masked_fill(~causal, float("nan")), device, mask=causal, table=None),
    }


class TestFigures:
    def test_forms_are_those_that_the_rest_relies_on(self, analyses: dict[str, Analysis]) -> None:
        forms = {name: [h.report.form for h in a.heads] for name, a in analyses.items()}
        assert forms == {
            "low rank": ["low rank", "low rank"],
            "table": ["table", "table"],
            "window": ["table", "table"],
            "refused": ["dense", "dense"],
            "mixed": ["low rank", "dense"],
            "all dense": ["dense", "dense"],
            "causal": ["low rank", "low rank"],
        }

    def test_spectra_are_the_singular_values(self, analyses: dict[str, Analysis]) -> None:
        b = smooth()[1].double()
        h = analyses["low rank"].heads[1]
        torch.testing.assert_close(h.spectrum, torch.linalg.svdvals(b), atol=1e-4, rtol=1e-4)
        centred = torch.linalg.svdvals(b - b.mean(1, keepdim=True))
        torch.testing.assert_close(h.centred, centred, atol=1e-4, rtol=1e-4)
        assert h.centred[0] < h.spectrum[0]

    @pytest.mark.parametrize("name", ["low rank", "refused", "table"])
    def test_bounds_are_those_of_the_truncated_svd(self, analyses: dict[str, Analysis], name: str) -> None:
        b = {"low rank": smooth, "refused": noise, "table": spiked}[name]()[0].double()
        centred = b - b.mean(1, keepdim=True)
        u, s, vh = torch.linalg.svd(centred)
        h = analyses[name].heads[0]
        assert h.ranks == tuple(sorted(set(h.ranks))) and h.ranks[0] == 1 and h.ranks[-1] == SIZE
        for rank, certificate in zip(h.ranks, h.certificates, strict=True):
            error = u[:, :rank] * s[:rank] @ vh[:rank] - b
            expected = torch.tanh((error.amax(1) - error.amin(1)).amax() / 4)
            assert certificate == pytest.approx(float(expected), abs=2e-5)

    def test_the_rank_for_a_tolerance_is_the_smallest(self, analyses: dict[str, Analysis]) -> None:
        for analysis in analyses.values():
            for h in analysis.heads:
                rank = h.rank_for(1e-3)
                assert rank is not None
                assert h.certificate_at(rank) <= 1e-3
                assert rank == 1 or (h.certificate_at(rank - 1) > 1e-3 and rank - 1 in h.ranks)

    def test_the_rank_of_the_energy(self, analyses: dict[str, Analysis]) -> None:
        h = analyses["refused"].heads[0]
        shares = h.centred.square().cumsum(0) / h.centred.square().sum()
        assert shares[h.energy_rank - 1] >= 0.99 > shares[h.energy_rank - 2]
        assert replace(h, centred=torch.zeros(4)).energy_rank == 0

    def test_the_error_is_a_part_of_what_is_allowed(self, analyses: dict[str, Analysis]) -> None:
        h = analyses["low rank"].heads[0]
        spread = 2 * float(h.error.max()) * 4 * torch.atanh(torch.tensor(1e-3)) / 2
        assert torch.tanh(spread / 4) == pytest.approx(h.report.certificate, rel=1e-3)
        assert float(analyses["refused"].heads[0].error.max()) > 1
        assert float(analyses["table"].heads[0].error.max()) < 1e-3
        assert float(analyses["mixed"].heads[1].error.max()) == 0

    def test_what_is_relative_is_said(self, analyses: dict[str, Analysis]) -> None:
        assert {a.heads[0].relative for n, a in analyses.items() if n in ("refused", "low rank")} == {""}
        assert analyses["table"].heads[0].relative == "position"
        assert "6×8 window" in analyses["window"].heads[0].relative
        assert analyses["table"].heads[0].line_certificate < 1e-6 < analyses["refused"].heads[0].line_certificate

    def test_tables_have_the_shape_of_their_places(self, analyses: dict[str, Analysis]) -> None:
        line, window = analyses["table"].heads[0].table, analyses["window"].heads[0].table
        assert line is not None and line.dim() == 1
        assert window is not None and window.shape == (11, 15)
        assert analyses["low rank"].heads[0].table is None

    def test_pictures_keep_a_thin_diagonal(self, analyses: dict[str, Analysis]) -> None:
        h = analyses["table"].heads[0]
        assert h.bias.shape == (24, 24), "two by two entries are one pixel"
        assert (h.bias.diagonal() == 5.0).all()

    def test_what_is_hidden_is_blank_and_counts_for_nothing(self, analyses: dict[str, Analysis]) -> None:
        h = analyses["causal"].heads[0]
        assert h.bias[0, -1].isnan() and not h.bias[-1, 0].isnan()
        assert h.error[0, -1] == 0
        assert float(h.error.max()) <= 1
        rank = h.rank_for(1e-3)
        assert rank is not None and rank <= h.report.rank + 2, "hidden entries are filled as the factors go on"

    def test_a_refusal_under_a_mask_shows_what_came_nearest(self, device: str) -> None:
        causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
        analysis = analysis_of(noise(1), device, mask=causal, max_rank=2, table=None)
        (h,) = analysis.heads
        assert analysis.refusal and h.report.form == "dense"
        assert h.error_of == f"factors of rank {h.report.rank}, which do not do"
        assert float(h.error.max()) > 1 and h.error[0, -1] == 0

    def test_a_refusal_for_its_cost_shows_what_would_do(self, device: str) -> None:
        """A dense kernel that is not to be beaten: everything keeps the tolerance, and costs more."""
        for bias, form, said in ((spiked(), "table", "the table"), (smooth(), "low rank", "factors of rank 4")):
            found = compress(bias, 1e-3, device=device)
            dear = tuple(replace(h, cost_ms=2 * h.dense_ms) for h in found.report.heads)
            analysis = analyse("", bias, NotLowRankError("too dear", replace(found.report, heads=dear)), pixels=32)
            for h in analysis.heads[:1]:
                assert (h.report.form, h.error_of) == (form, said)
                assert float(h.error.max()) <= 1
                assert verdict.advice_for_head(analysis, h).startswith("Keep the matrix: ")
            assert "a table is predicted to take 2.00" in verdict.reasons([analysis], [""])[-1] or form != "table"

    def test_a_large_matrix_has_a_part_of_its_spectrum(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        monkeypatch.setattr(figures, "FULL_SVD", 40)
        monkeypatch.setattr(figures, "LARGEST", 6)
        h = analysis_of(noise(1), device, max_rank=4).heads[0]
        assert len(h.spectrum) == len(h.centred) == h.ranks[-1] == 6
        assert h.rank_for(1e-3) is None
        assert verdict.rank_alone(h, 1e-3) == "(> 6)"

    def test_queries_and_keys_of_different_number(self, device: str) -> None:
        bias = noise(1)[:, :7, :]
        h = analysis_of(bias, device).heads[0]
        assert h.bias.shape == (4, 24)
        assert len(h.spectrum) == 7

    def test_a_bias_of_constant_rows(self, device: str) -> None:
        analysis = analysis_of(torch.arange(SIZE).float()[:, None].expand(1, SIZE, SIZE), device, table=None)
        assert analysis.heads[0].report.rank == 0
        assert "constant along each row" in verdict.advice_for_head(analysis, analysis.heads[0])
        Reader(render("x", [], [analysis], [], ""))

    def test_a_single_entry(self, device: str) -> None:
        Reader(render("x", [], [analysis_of(torch.ones(1, 1, 1), device)], [], ""))


class TestVerdict:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("low rank", r"^Use factors of ranks? .* no output moves by more than .* predicted to take 0\.\d\d of"),
            ("table", r"^Use a relative table of 5 entries, read by position\. It is exact, .*"),
            ("window", r"^Use a relative table of 165 entries, read by place in a 6×8 window\. .*"),
            ("refused", r"^Keep it dense\. No form keeps a tolerance of 0\.001 at less than the time of a dense bias"),
            ("all dense", r"^Keep it dense\. No form keeps"),
            ("mixed", r"^Use low rank for 1 head and keep 1 head dense: no output moves"),
        ],
    )
    def test_the_whole(self, analyses: dict[str, Analysis], name: str, said: str) -> None:
        assert re.match(said, verdict.advice_for_all([analyses[name]])), verdict.advice_for_all([analyses[name]])

    def test_several_layers(self, analyses: dict[str, Analysis]) -> None:
        def advice(*names: str) -> str:
            return verdict.advice_for_all([analyses[name] for name in names])

        assert advice("table", "window") == "Replace the bias of all 2 layers: table."
        assert re.fullmatch(
            r"Replace the bias of 2 of 3 layers: \S.* \(rank.*\); keep the others dense\.",
            advice("table", "low rank", "refused"),
        )
        assert advice("refused", "refused") == "Keep all 2 layers dense: none has a form that pays."

    def test_reasons_are_given_for_a_refusal_alone(self, analyses: dict[str, Analysis]) -> None:
        assert verdict.reasons([analyses["low rank"]], [""]) == []
        pays, energy, table = verdict.reasons([analyses["refused"]], [""])
        reached = r"Factors were tried up to rank 12, where the certificate of head \d is (?:1|0\.\d+)\. For"
        assert re.match(reached, pays)
        costly = replace(analyses["refused"], report=replace(analyses["refused"].report, break_even_rank=9))
        assert verdict.reasons([costly], [""])[0].startswith("Factors pay up to rank 9, where")
        none = replace(analyses["refused"], report=replace(analyses["refused"].report, break_even_rank=0))
        assert verdict.reasons([none], [""])[0].startswith("Not even one column")
        assert re.search(r"keeps 99 % of it at rank \d+, where the certificate is still", energy)
        assert table.startswith("It is no relative bias")
        named = verdict.reasons([analyses["table"], analyses["refused"]], ["a", "b"])
        assert len(named) == 3 and all(line.startswith("b: ") for line in named)

    def test_heads_that_would_pay_alone_are_counted(self, device: str) -> None:
        analysis = analysis_of(torch.cat([smooth(1), noise(1)]), device, max_rank=12)
        assert analysis.refusal
        assert verdict.reasons([analysis], [""])[-1].startswith("1 head of 2 would pay alone: allow_dense")
        assert "On its own it would pay as low rank" in verdict.advice_for_head(analysis, analysis.heads[0])
        assert verdict.advice_for_head(analysis, analysis.heads[1]).startswith("Keep the matrix: factors alone")

    def test_one_line_of_a_refusal(self, analyses: dict[str, Analysis]) -> None:
        report = analyses["refused"].report
        line = verdict.refusal_of(report)
        assert re.match(r"no form keeps tol 0\.001 at .* \(a made-up GPU\): factors fail for 2 of 2 heads, where", line)
        for form, said in (("table", "a table"), ("low rank", "factors"), ("table + low rank", "a table and factors")):
            heads = tuple(replace(h, form=form, cost_ms=2 * h.dense_ms) for h in report.heads)
            assert verdict.refusal_of(replace(report, heads=heads)).endswith(f": {said} would take 2.00 of it")

    def test_numbers(self, analyses: dict[str, Analysis]) -> None:
        head = analyses["low rank"].heads[0].report
        assert verdict.times_dense(replace(head, cost_ms=1.0, dense_ms=4.0)) == "0.25"
        assert verdict.times_dense(replace(head, dense_ms=float("inf"))) == "0"
        assert verdict.size(999) == "999 B" and verdict.size(5 * 2**30) == "5.0 GiB"


class TestPage:
    @pytest.fixture
    def whole(self, analyses: dict[str, Analysis]) -> str:
        return render("a <b> & c.npy", ["2 heads", "tol 0.001"], [analyses["table"]], ["flashbias factor x"], "made by")

    def test_it_needs_nothing_but_itself(self, analyses: dict[str, Analysis]) -> None:
        html = render("x", ["y"], [*analyses.values()], ["z"], "w")
        reader = Reader(html)
        assert reader.links
        anchors = {link[1:] for link in reader.links if link.startswith("#")}
        assert anchors == set(reader.ids) and len(reader.ids) == len(set(reader.ids)) == 14
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
        assert "script" not in reader.counts and "link" not in reader.counts
        assert not re.search(r"url\(|@import|https?://|javascript", html)

    def test_it_follows_light_and_dark(self, whole: str) -> None:
        assert "prefers-color-scheme: dark" in whole
        assert "color-scheme: light dark" in whole

    def test_it_says_what_was_found(self, whole: str) -> None:
        reader = Reader(whole)
        for said in (
            "a <b> & c.npy",
            "tol 0.001",
            "Use a relative table of 5 entries",
            "flashbias factor x",
            "exact",
            "made by",
            "Certificate against rank",
            "Singular values",
            "no entry differs",
            "The table",
            "How to read this",
        ):
            assert reader.says(said), said

    def test_every_head_can_be_opened_and_the_first_is(self, analyses: dict[str, Analysis]) -> None:
        html = render("x", [], [analyses["low rank"]], [], "")
        assert html.count("<details") == 2
        assert html.count('<details class="low-rank" open>') == 1
        several = render("x", [], [analyses["low rank"]] * 3, [], "")
        assert several.count("<details") == 9 and " open>" not in several

    def test_a_refusal_says_why(self, analyses: dict[str, Analysis]) -> None:
        reader = Reader(render("x", [], [analyses["refused"]], [], ""))
        assert reader.says("Keep it dense.") and reader.says("It is no relative bias")
        assert reader.says("which do not do")
        assert "pre" not in reader.counts

    def test_layers_have_short_names(self, analyses: dict[str, Analysis]) -> None:
        layers = [replace(analyses["table"], name=f"model.layers.{n}.attn.bias") for n in (1, 12)]
        reader = Reader(render("x", [], layers, [], ""))
        assert reader.says("layer 12")
        assert page._short_names(["a.b.1.c", "a.d.2.c"]) == ["b.1", "d.2"]
        assert page._short_names(["layer 0", "layer 1"]) == ["layer 0", "layer 1"]
        assert page._short_names(["same"]) == ["same"]

    def test_names_are_escaped(self, analyses: dict[str, Analysis]) -> None:
        layers = [replace(analyses["table"], name=f"<script>{n}</script>") for n in range(2)]
        assert "script" not in Reader(render("x", [], layers, [], "")).counts

    def test_a_page_of_many_heads_stays_small(self, analyses: dict[str, Analysis]) -> None:
        """376 heads, each picture as large as such a page allows and as hard to compress as can be."""
        side = pixels_for(376)
        assert side < 120
        hard = torch.rand(side, side, generator=torch.Generator().manual_seed(0))

        def worst(h: HeadFigures) -> HeadFigures:
            return replace(h, bias=hard, error=hard, table=None)

        analysis = replace(analyses["table"], heads=tuple(worst(h) for h in analyses["table"].heads) * 2)
        html = render("x", [], [analysis], [], "")
        assert len(html) * 376 / 4 < 20e6
