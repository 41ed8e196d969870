"""From contents to files: Jinja templates, with everything that a model or a config wrote escaped."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ensemble_server.server.compare.kept.results import Flip, TokenView
from ensemble_server.server.compare.report import words
from ensemble_server.server.compare.report.contents import Report, Table
from ensemble_server.server.compare.report.figures import Figure

if TYPE_CHECKING:
    from jinja2 import Environment

NO_FIGURES = "No figures: they need matplotlib; run: pip install 'ensemble-server[compare]' and report again."


def as_html(
    report: Report,
    figures: Sequence[Figure],
    *,
    quality: Mapping[str, Sequence[Table]] | None = None,
    items_page: str | None = None,
) -> str:
    """One page that needs nothing else: no script, no font, no address but that of `items_page` beside it.

    `quality`: the tables of results for each baseline that a reader may choose, the report's own first.
    """
    chosen = {report.baseline: report.quality} if quality is None else quality
    values = _values(report, figures) | {"quality": chosen, "items_page": items_page}
    return environment(is_html=True).get_template("report.html.j2").render(values)


def as_markdown(report: Report, figures: Sequence[Figure], figure_folder: str) -> str:
    """GitHub's Markdown. Figures are the SVG files in `figure_folder`."""
    values = _values(report, figures) | {"figure_folder": figure_folder}
    return environment(is_html=False).get_template("report.md.j2").render(values)


def _values(report: Report, figures: Sequence[Figure]) -> dict[str, Any]:
    return {"report": report, "figures": figures, "no_figures": NO_FIGURES}


@lru_cache(maxsize=2)
def environment(*, is_html: bool) -> Environment:
    """The templates beside this file, and how figures and tokens are shown in them. `is_html`: escape what is shown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ensemble_server.server.compare.report", "templates"),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": words.number,
        "cell": markdown_cell,
        "line": markdown_line,
        "fenced": fenced,
        "percent": percent,
        "shade": shade,
        "visible": visible,
        "members_of": members_of,
    }
    environment.globals["most_certain"] = most_certain
    environment.globals["hue"] = hue
    return environment


# --- tokens ------------------------------------------------------------------------------------------------------


def members_of(flip: Flip) -> list[str]:
    """In the order in which the tokens name them."""
    return list(dict.fromkeys(member for token in flip.tokens for member in token.members))


def most_certain(token: TokenView) -> str | None:
    """The member that gave this token the highest probability; the first of equals."""
    return max(token.members, key=token.members.__getitem__, default=None)


def percent(logprob: float | None) -> str:
    """ln(0.25) -> "25%" """
    if logprob is None:
        return words.NOTHING
    share = 100 * math.exp(min(logprob, 0))
    return f"{share:.0f}%" if share >= 1 else f"{share:.1g}%" if share >= 0.01 else "<0.01%"


def shade(token: TokenView) -> float:
    """How strongly a token is coloured, 0 to 1: the probability that its most certain member gave it."""
    member = most_certain(token)
    return 0.0 if member is None else round(math.exp(min(token.members[member], 0)), 2)


def hue(place: int, count: int) -> str:
    """A colour for one of `count` members, as CSS numbers "r, g, b"."""
    return ", ".join(f"{255 * part:.0f}" for part in colorsys.hls_to_rgb(0.58 + place / max(count, 1), 0.55, 0.65))


def visible(text: str) -> str:
    """A token whose spaces and line ends can be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"


# --- Markdown ----------------------------------------------------------------------------------------------------


def markdown_line(text: str) -> str:
    """Text that stays text, and on its line, in Markdown and in the HTML that it may hold."""
    text = re.sub(r"\s+", " ", text).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#!~$])", r"\\\1", text)


def markdown_cell(text: str) -> str:
    return "; ".join(map(markdown_line, text.split("\n"))).replace("|", "\\|") or " "


def fenced(text: str) -> str:
    """A code block around `text`, with more backticks than any run in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
