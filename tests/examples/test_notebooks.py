"""Notebooks run from top to bottom, on the demo's models."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_what_it_showed(path: Path, tmp_path: Path) -> None:
    kept = nbformat.read(path, as_version=4)
    run = NotebookClient(nbformat.read(path, as_version=4), timeout=900, resources={"metadata": {"path": tmp_path}})
    run.execute()
    assert outputs(run.nb) == outputs(kept)
    assert any("display_data" in kinds for kinds in outputs(kept))


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Of each cell, the kinds of what it shows; warnings depend on what else is installed."""
    return [
        [output.output_type for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
        for cell in notebook.cells
    ]
