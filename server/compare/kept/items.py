"""What every arm did with every item, ready to be looked at: the rows of `items.html` and of the CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ItemCell:
    """One arm on one item. `output`: all samples of it, whole. `answer`: what was found in it, None where nothing was.

    `score`: None where the arm has no figure on this item.
    """

    score: float | None
    output: str = ""
    answer: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ItemRow:
    """`fields`: the row's own short values, to cut slices by. `cells`: arm -> what it did."""

    id: str
    prompt: str
    reference: str
    cells: Mapping[str, ItemCell]
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemTable:
    """`measure`: "text NAME" or "task NAME". `unit`: of the scores."""

    measure: str
    unit: str
    higher_is_better: bool
    arms: Sequence[str]
    rows: Sequence[ItemRow]
