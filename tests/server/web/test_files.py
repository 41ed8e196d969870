"""What the page is made of: files of ours that ask nobody else, and libraries as they were published."""

from __future__ import annotations

import hashlib
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from ensemble_server.server.web import FOLDER

MODULES = sorted(FOLDER.glob("*.js"))
OURS = [*MODULES, FOLDER / "docs" / "start.js"]
PAGES = [FOLDER / "index.html", FOLDER / "docs" / "index.html"]


def test_the_libraries_are_those_that_were_published():
    rows = re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", (FOLDER / "SOURCES.md").read_text(), flags=re.M)
    assert len(rows) == 5
    for file, digest in rows:
        assert hashlib.sha256((FOLDER / file).read_bytes()).hexdigest() == digest, file
    listed = {file for file, _ in rows}
    code = {
        *FOLDER.glob("vendor/*.js"),
        *FOLDER.glob("vendor/*.css"),
        *FOLDER.glob("docs/*.js"),
        *FOLDER.glob("docs/*.css"),
    }
    assert {str(path.relative_to(FOLDER)) for path in code} - listed == {"docs/start.js"}


def test_every_file_is_in_the_wheel():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["ensemble_server.server.web"]
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.suffix not in {".py", ".pyc"}:
            assert any(fnmatch(str(path.relative_to(FOLDER)), pattern) for pattern in patterns), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_import_what_is_there(path):
    for name in re.findall(r'^import .* from "([^"]+)";$', path.read_text(encoding="utf-8"), flags=re.M):
        assert name.startswith("./") and (FOLDER / name).is_file(), name


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_turns_text_into_markup_or_code(path):
    text = path.read_text(encoding="utf-8")
    dangerous = "innerHTML outerHTML insertAdjacentHTML dangerouslySetInnerHTML document.write eval( Function( srcdoc"
    for word in dangerous.split():
        assert word not in text


@pytest.mark.parametrize("path", [*OURS, *PAGES, FOLDER / "style.css"], ids=lambda path: path.name)
def test_no_other_host_is_named(path):
    hosts = set(re.findall(r"https?://([\w.-]+)", path.read_text(encoding="utf-8")))
    assert hosts <= {"www.w3.org"}  # the name of a namespace


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_pages_have_no_inline_script_or_style(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
