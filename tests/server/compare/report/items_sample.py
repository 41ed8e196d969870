"""Items of a small comparison, one of them written by somebody who means harm."""

from __future__ import annotations

from ensemble_server.server.compare.kept.items import ItemCell, ItemRow, ItemTable
from tests.server.compare.report.sample import HOSTILE

ARMS = ("base", "mix", "linear")
RIGHT = {"q1": (0, 1, 1), "q2": (1, 1, 1), "q3": (1, 0, 1), "q10": (0, 1, 0)}
LEVELS = {"q1": "easy", "q2": "easy", "q3": "hard", "q10": "hard"}


def tables() -> list[ItemTable]:
    rows = [
        ItemRow(
            item,
            f"What is the answer to {item}?",
            "42",
            {
                arm: ItemCell(float(score), f"{arm} says {'42' if score else 'no'}", "42" if score else None)
                for arm, score in zip(ARMS, scores, strict=True)
            },
            {"level": LEVELS[item]},
        )
        for item, scores in RIGHT.items()
    ]
    hostile = {
        "base": ItemCell(0.0, HOSTILE, "=1+1"),
        "mix": ItemCell(0.0, "", None, "it broke"),
        "linear": ItemCell(0.5),
    }
    rows.append(ItemRow("q4", HOSTILE, "-3", hostile, {"level": "hard"}))
    documents = [
        ItemRow(f"document {n}", f"Text number {n}.", "", {"base": ItemCell(1.0 + n), "mix": ItemCell(0.9 + n)})
        for n in range(3)
    ]
    return [
        ItemTable("task sums", "number", True, ARMS, rows),
        ItemTable("text verse", "bits per byte", False, ARMS[:2], documents),
    ]
