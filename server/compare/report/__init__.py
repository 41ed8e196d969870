"""What a comparison found, for readers: `report.md` and a self-contained `report.html`, made of `Results` alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from ensemble_server.server.compare.kept.results import Results
from ensemble_server.server.compare.report.contents import contents
from ensemble_server.server.compare.report.documents import as_html, as_markdown
from ensemble_server.server.compare.report.figures import draw_figures
from ensemble_server.server.disk.whole_file import write_whole

FIGURE_FOLDER = "figures"


def write_report(results: Results, folder: Path) -> None:
    """Write `report.html`, `report.md` and the latter's `figures/` into `folder`. Same results, same bytes.

    Without matplotlib the report says how to install it in the place of figures.
    """
    figures = draw_figures(results)
    shutil.rmtree(folder / FIGURE_FOLDER, ignore_errors=True)  # figures of measures that are gone
    for figure in figures:
        write_whole(folder / FIGURE_FOLDER / f"{figure.name}.svg", figure.svg.encode())
    report = contents(results)
    write_whole(folder / "report.md", as_markdown(report, figures, FIGURE_FOLDER).encode())
    write_whole(folder / "report.html", as_html(report, figures).encode())
