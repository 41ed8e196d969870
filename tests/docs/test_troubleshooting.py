"""The page of troubles names every code, class and exit code that there is, and the generated one every message."""

from __future__ import annotations

import re

import pytest

from docs import refusals
from ensemble_server.ensembles import errors
from ensemble_server.server.api.errors import STATUS_KINDS
from ensemble_server.server.requests.errors import KINDS
from tests.docs.snippets import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", PAGE, re.MULTILINE))


def codes_in_the_code() -> set[str]:
    """Every value that the code gives as `code=…` or in a table of codes."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "server").rglob("*.py")]
    named = {code for source in sources for code in re.findall(r'\bcode="(\w+)"', source)}
    table = {kind.code for kind in (*KINDS.values(), *STATUS_KINDS.values()) if kind.code}
    return named | table | {"missing_required_parameter", "unknown_parameter"}


@pytest.mark.parametrize("code", sorted(codes_in_the_code()))
def test_every_code_has_its_row(code: str) -> None:
    assert code in ROWS, f"docs/troubleshooting.md says nothing of {code!r}"


@pytest.mark.parametrize(("cls", "kind"), KINDS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_every_class_stands_beside_its_code_and_status(cls: type[errors.EnsembleError], kind) -> None:
    status, classes, *_ = (cell.strip() for cell in ROWS[kind.code].split("|"))
    assert status == str(kind.status)
    assert f"`{cls.__name__}`" in classes


def test_every_exit_code_is_explained() -> None:
    codes = {"0", "1", "2"}
    for path in (ROOT / "server" / "cli").glob("*.py"):
        for names, values in re.findall(r"^([A-Z_, ]+) = ([\d, ]+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            named = dict(zip(names.split(", "), values.split(", "), strict=True))
            codes |= {value for name, value in named.items() if name.endswith(("_FAILED", "INTERRUPTED"))}
    assert codes >= {"3", "130"}
    assert [code for code in sorted(codes) if f"| {code} |" not in PAGE] == []


def test_the_page_of_refusals_is_made_from_the_code() -> None:
    page = refusals.page()
    assert all(f"\n## {title}\n" in page for title in refusals.SECTIONS.values())
    for message in (
        "gives text, not next-token distributions",  # a load that would never work
        "stream_options is only allowed with stream: true",  # a request
        "there is no file",  # noted by a function that looks for problems
        "no server answers at",  # the command line
    ):
        assert message in page
    classes = {cls.__name__ for cls in KINDS}
    assert classes == set(refusals.OURS)
    assert len(set(refusals.refusals())) > 400


def test_what_your_own_models_says_of_refusals_is_what_they_say() -> None:
    page = (ROOT / "docs" / "your-own-models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|", page.partition("| it says |")[2], re.MULTILINE)
    phrases = [phrase for phrase in rows if set(phrase) - set("-|")]
    assert len(phrases) > 10
    said = [refusal.message for refusal in refusals.refusals()] + template_problems()
    patterns = {phrase: ".*".join(map(re.escape, phrase.split("…"))) for phrase in phrases}
    assert [phrase for phrase, pattern in patterns.items() if not any(re.search(pattern, text) for text in said)] == []


def template_problems() -> list[str]:
    """What is found wrong with a chat template, which becomes a part of other refusals."""
    source = (ROOT / "server" / "weights" / "view.py").read_text(encoding="utf-8")
    return re.findall(r'return f?"(cannot render [^"]+)"', source)
