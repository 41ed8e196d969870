"""The whole report of a small comparison: what it says, that nothing in it can act, that it repeats to the byte."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ensemble_server.server.compare.kept.results import ArmResult, Results, StatisticsUsed
from ensemble_server.server.compare.report import figures, write_report
from ensemble_server.server.compare.report.documents import fenced, markdown_cell
from tests.server.compare.report.sample import HOSTILE, sample

GOLDEN = Path(__file__).parent / "golden.md"


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(sample(), folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_markdown_is_the_one_that_was_read_and_approved(folder: Path) -> None:
    """After a wanted change: copy the report.md of `sample()` over golden.md, and read the difference."""
    assert (folder / "report.md").read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_report(sample(), tmp_path)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_a_report_from_the_file_is_the_report_from_memory(folder: Path, tmp_path: Path) -> None:
    sample().save(tmp_path / "results.json")
    write_report(Results.load(tmp_path / "results.json"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_what_a_model_wrote_is_text_and_nothing_else(page: Page) -> None:
    assert HOSTILE in page.text
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("i")
    assert not page.all("b")
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]


def test_the_page_needs_nothing_from_elsewhere(folder: Path, page: Page) -> None:
    addresses = [
        value for _, attributes in page.elements for key, value in attributes.items() if key in {"src", "href"}
    ]
    assert all(address and address.startswith("#") for address in addresses)
    assert not page.all("link")
    assert "url(http" not in (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in (page.all("meta")[2]["content"] or "")


def test_every_id_is_there_once_and_every_reference_leads_to_one(folder: Path, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text(encoding="utf-8")
    wanted = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"|aria-labelledby="([^"]+)"', text))
    assert {name for names in wanted for name in names if name} <= set(ids)


def test_tables_and_figures_can_be_read_aloud(page: Page) -> None:
    assert all(attributes.get("scope") in {"col", "row"} for attributes in page.all("th"))
    assert len(page.all("caption")) >= 9
    pictures = page.all("svg")
    assert len(pictures) == 6
    assert all(picture["role"] == "img" and picture["aria-labelledby"] for picture in pictures)
    assert page.all("html") == [{"lang": "en"}]
    assert "On the Pareto front (no other arm is both better and cheaper): linear and adaptive." in page.text


def test_figures_follow_the_page_and_files_stand_alone(folder: Path) -> None:
    assert figures.INK not in (folder / "report.html").read_text(encoding="utf-8").partition("</style>")[2]
    standing = (folder / "figures" / "text-quality-cost.svg").read_text(encoding="utf-8")
    assert figures.INK in standing
    assert "$bad_{name}$ &lt;i&gt;" in standing


def test_members_probabilities_are_in_the_page(page: Page) -> None:
    assert "Every member's probability of every token" in page.text
    assert "⏎" in page.text
    assert "(weight 0.30)" in page.text


def test_without_matplotlib_the_report_is_written_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    write_report(sample(), tmp_path)
    for name in ("report.md", "report.html"):
        text = (
            (tmp_path / name).read_text(encoding="utf-8").replace("&#39;", "'").replace("\\[", "[").replace("\\]", "]")
        )
        assert "pip install 'ensemble-server[compare]'" in text
    assert not (tmp_path / "figures").exists()


def test_a_comparison_in_which_everything_failed_has_a_report(tmp_path: Path) -> None:
    results = Results(
        baseline="base",
        arms={"base": ArmResult(kind="member", model="base", error="load: no such file")},
        texts=sample().texts,
        statistics=StatisticsUsed(seed=0, num_resamples=100, alpha=0.05, margin_bpb=0.01, margin_score=0.02),
    )
    write_report(results, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "base failed: load: no such file" in page.text
    assert "no arm has a figure" in page.text


def test_the_best_ensemble_against_the_best_merge_is_the_first_thing_said(folder: Path, page: Page) -> None:
    text = re.sub(r"\s+", " ", page.text)
    first = (
        "Texts: best ensemble adaptive against best merge linear: gain +0.023 bits per byte (+0.012 to +0.034), "
        "better; price: 2.4 times the time per answer token, the same weights."
    )
    assert text.index(first) < text.index("quality against cost") < text.index("Texts: adaptive has the best mean")
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert markdown.index(first) < markdown.index("![") < markdown.index("| place |")


def test_the_report_says_what_its_mean_leaves_out_and_why(tmp_path: Path) -> None:
    left_out = {
        "text shakespeare": "crowd and 1 more has no figure: model 'crowd' gives text, not probabilities",
        "task essays": "is better low, the others high",
    }
    results = sample().model_copy(
        update={"mean_over": {"text": ("code", "jargon"), "task": ("sums",)}, "left_out": left_out}
    )
    write_report(results, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    assert f"The mean leaves out shakespeare: {left_out['text shakespeare']}." in text
    assert "The mean leaves out essays: is better low, the others high." in text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "The mean leaves out shakespeare: crowd and 1 more has no figure" in markdown
    assert "no arm has a figure" not in markdown


def test_a_fence_is_longer_than_any_in_its_text() -> None:
    assert fenced("a ```` b").startswith("`````text\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", "a\\|b"),
        ("a\nb", "a; b"),
        ("<b>", "&lt;b&gt;"),
        ("[x](y)", "\\[x\\](y)"),
        ("", " "),
        ("a\\|", "a\\\\\\|"),
    ],
)
def test_a_cell_stays_in_its_cell(text: str, expected: str) -> None:
    assert markdown_cell(text) == expected
