"""Items as CSV: a line for each item and arm, whole texts, for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from ensemble_server.server.compare.kept.items import ItemTable
from ensemble_server.server.disk.whole_file import write_whole

COLUMNS = ("measure", "item", "arm", "score", "answer", "reference", "error", "output", "prompt")

_FORMULA = re.compile(r"[=+@\t\r]|-(?![\d.]*$)")  # a number that begins with a sign is none


def write_csv(tables: Sequence[ItemTable], path: Path) -> int:
    """Write all items; returns the number of lines. Fields of the rows are columns named `row.FIELD`.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    fields = list(dict.fromkeys(key for table in tables for row in table.rows for key in row.fields))
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"row.{field}" for field in fields)])
    num_lines = 0
    for table in tables:
        for row in table.rows:
            for arm, cell in row.cells.items():
                texts = [cell.answer or "", row.reference, cell.error or "", cell.output, row.prompt]
                texts += [row.fields.get(field, "") for field in fields]
                score = "" if cell.score is None else repr(cell.score)
                writer.writerow([table.measure, _plain(row.id), _plain(arm), score, *map(_plain, texts)])
                num_lines += 1
    write_whole(path, file.getvalue().encode())
    return num_lines


def _plain(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text
