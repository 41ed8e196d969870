"""The site: every page is in its nav, it builds without a warning, and everything that it links to is in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs import assemble
from tests.docs.snippets import PAGES, ROOT

ORDER = [
    *("Start", "Your own models", "Which method?", "Methods", "Chat and API", "Batches", "Compare", "Fuse", "Scale"),
    *("Operate", "Extend", "Results"),
]

LOADED = re.compile(r'(?:<(?:script|img|iframe)[^>]+src|<link[^>]+stylesheet[^>]+href)="(https?://[^"]+)')


def test_every_page_is_in_the_nav_once() -> None:
    named = list(assemble.pages(assemble.settings()["nav"]))
    assert len(named) == len(set(named))
    pages = {str(page.relative_to(ROOT)) for page in PAGES} | {"CHANGELOG.md"}
    assert set(named) - assemble.GENERATED.keys() == pages


def test_the_nav_has_the_order_that_readers_know() -> None:
    assert [next(iter(part)) for part in assemble.settings()["nav"]] == ORDER


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_other_hosts(tmp_path: Path) -> None:
    shutil.copy(ROOT / "zensical.toml", tmp_path)  # which says where the pages are, beside itself
    (tmp_path / "src").symlink_to(ROOT / "src")
    assemble.assemble(tmp_path / assemble.settings()["docs_dir"])
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--config-file", "zensical.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / assemble.settings()["site_dir"]
    html = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    missing = [f"{page.relative_to(site)}: {link}" for page, text in html.items() for link in dead_links(page, text)]
    assert missing == []
    assert {url for text in html.values() for url in LOADED.findall(text)} == set()


def dead_links(page: Path, text: str) -> list[str]:
    """What a page of the site names beside it that is not there."""
    named = set(re.findall(r'<(?:a|img|script|link)\b[^>]*?\b(?:href|src)="?([^"\s>]+)', text))
    paths = {unquote(re.split("[#?]", link)[0]) for link in named if "://" not in link and "mailto:" not in link}
    return [path for path in paths if path and not (page.parent / path).exists()]
