"""Lays out what the site is built from: `python -m docs.assemble`, then `zensical build`.

Pages stand all over the repository and link to each other, and to files, as a forge shows them. So the site's source is
the repository itself, less what no page names: each page of the nav in `zensical.toml` and each file that a page links
to, at the same place below `docs_dir`, and the pages that are made from the code. No link is rewritten.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from docs import refusals

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "zensical.toml"
GENERATED: Mapping[str, Callable[[], str]] = {"docs/refusals.md": refusals.page}


def settings() -> dict[str, Any]:
    """The table `[project]` of `zensical.toml`."""
    return tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"]


def pages(nav: Any) -> Iterator[str]:
    """The pages of a nav, or of a part of it, in its order: paths below the repository."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(part)


def links(page: Path) -> list[str]:
    """What a page links to in the repository: paths as written, with their anchors. Code links to nothing."""
    text = re.sub(r"```.*?```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def files(page: Path) -> Iterator[Path]:
    """The files that a page links to, pages left out."""
    for link in links(page):
        target = (page.parent / link.partition("#")[0]).resolve()
        if target.is_file() and target.suffix != ".md":
            yield target


def assemble(into: Path) -> None:
    """Write the site's source to `into`, which is emptied first."""
    shutil.rmtree(into, ignore_errors=True)
    for name in pages(settings()["nav"]):
        if name in GENERATED:
            (into / name).write_text(GENERATED[name](), encoding="utf-8")
            continue
        for source in (ROOT / name, *files(ROOT / name)):
            target = into / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


if __name__ == "__main__":
    assemble(ROOT / settings()["docs_dir"])
