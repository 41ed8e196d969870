"""`items.html`: every item and what every arm made of it, to filter, sort, slice and read side by side.

One file that asks for nothing from elsewhere. Its one script is named by its hash in the page's own policy, and shows
what models wrote as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ensemble_server.server.compare.kept.items import ItemTable
from ensemble_server.server.compare.report.documents import environment

MAX_TEXT_CHARS = 24_000_000  # of all texts in the page together; beyond, each is cut
MIN_SHOWN_CHARS = 500


def items_html(tables: Sequence[ItemTable], *, title: str, baseline: str) -> str:
    """`baseline`: the arm that others are first held against; the page can choose another one."""
    limit = _limit(tables)
    data = {
        "title": title,
        "baseline": baseline,
        "limit": limit,
        "tables": [_table(table, limit) for table in tables],
    }
    script = environment(is_html=False).get_template("items.js.j2").render()
    return (
        environment(is_html=True)
        .get_template("items.html.j2")
        .render(
            title=title,
            data=_embedded(data),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _limit(tables: Sequence[ItemTable]) -> int | None:
    """Characters that one text may have; None if all of them fit."""
    lengths = [
        length
        for table in tables
        for row in table.rows
        for length in (len(row.prompt), *(len(cell.output) for cell in row.cells.values()))
    ]
    if sum(lengths) <= MAX_TEXT_CHARS:
        return None
    return max(MIN_SHOWN_CHARS, MAX_TEXT_CHARS // len(lengths))


def _table(table: ItemTable, limit: int | None) -> dict[str, Any]:
    def shown(text: str) -> str:
        return text if limit is None or len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"

    return {
        "measure": table.measure,
        "unit": table.unit,
        "higher": table.higher_is_better,
        "arms": list(table.arms),
        "rows": [
            {
                "id": row.id,
                "prompt": shown(row.prompt),
                "reference": row.reference,
                "fields": dict(row.fields),
                "cells": [
                    None
                    if (cell := row.cells.get(arm)) is None
                    else [cell.score, cell.answer, shown(cell.output), cell.error]
                    for arm in table.arms
                ],
            }
            for row in table.rows
        ],
    }


def _embedded(data: Any) -> str:
    """JSON that can stand inside a `script` element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
