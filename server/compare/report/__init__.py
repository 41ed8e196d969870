"""What a comparison found, for readers: `report.md` and a self-contained `report.html`, made of `Results` alone, and
`items.html` with what every arm made of every item."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ensemble_server.server.compare.kept.items import ItemTable
from ensemble_server.server.compare.kept.pairs import Pairs
from ensemble_server.server.compare.kept.results import Results
from ensemble_server.server.compare.report.contents import contents, quality_tables
from ensemble_server.server.compare.report.documents import as_html, as_markdown
from ensemble_server.server.compare.report.figures import draw_figures
from ensemble_server.server.compare.report.items_page import items_html
from ensemble_server.server.compare.report.rebased import by_baseline
from ensemble_server.server.disk.whole_file import write_whole

FIGURE_FOLDER = "figures"
ITEMS_FILE = "items.html"


def write_report(
    results: Results, folder: Path, *, pairs: Pairs | None = None, items: Sequence[ItemTable] = ()
) -> None:
    """Write `report.html`, `report.md` and the latter's `figures/` into `folder`. Same results, same bytes.

    With `pairs` a reader may choose another baseline in the page; with `items` there is an `items.html`, too.
    Without matplotlib the report says how to install it in the place of figures.
    """
    figures = draw_figures(results)
    shutil.rmtree(folder / FIGURE_FOLDER, ignore_errors=True)  # figures of measures that are gone
    for figure in figures:
        write_whole(folder / FIGURE_FOLDER / f"{figure.name}.svg", figure.svg.encode())
    report = contents(results)
    quality = {name: quality_tables(one) for name, one in by_baseline(results, pairs).items()}
    page = as_html(report, figures, quality=quality, items_page=ITEMS_FILE if items else None)
    write_whole(folder / "report.md", as_markdown(report, figures, FIGURE_FOLDER).encode())
    write_whole(folder / "report.html", page.encode())
    if items:
        shown = items_html(items, title=report.title, baseline=results.baseline)
        write_whole(folder / ITEMS_FILE, shown.encode())
    else:
        (folder / ITEMS_FILE).unlink(missing_ok=True)
