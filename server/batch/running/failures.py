"""Why rows fail, said as soon as it is known, and when so many fail that it is better to stop.

Reasons are told apart by their words: numbers, and names in quotes, are what differs from row to row, so that
"line 3: there is no column 'a'" and "line 4: there is no column 'b'" are one reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_HOPELESS = 20  # rows that fail, and none that is answered, before a run gives up
MAX_REASONS = 10  # that are said one by one; a reason that no two rows share would be said for every row
MAX_CHARS = 300

_VARIES = re.compile(r"'[^']*'|\"[^\"]*\"|\d+(?:\.\d+)?")


@dataclass
class Reasons:
    """Rows that have failed, by reason: how many, and the words of the first."""

    _found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, message: str) -> bool:
        """Whether this reason is a new one."""
        key = _VARIES.sub("…", message)
        num_rows, first = self._found.get(key, (0, message))
        self._found[key] = (num_rows + 1, first)
        return num_rows == 0

    def __len__(self) -> int:
        return len(self._found)

    def sentences(self) -> Iterator[str]:
        """ "700 rows: member 'x': cannot reach it": the most frequent first, and at most `MAX_REASONS`."""
        ordered = sorted(self._found.values(), key=lambda found: -found[0])
        for num_rows, first in ordered[:MAX_REASONS]:
            yield f"{_rows(num_rows)}: {_shortened(first)}"
        if rest := ordered[MAX_REASONS:]:
            yield f"{_rows(sum(num_rows for num_rows, _ in rest))}: {len(rest)} other reasons"

    @classmethod
    def of(cls, messages: Iterable[str]) -> Reasons:
        reasons = cls()
        for message in messages:
            reasons.add(message)
        return reasons


class FailureWatch:
    """Sees every row of one run as it ends. `say` is told the first failure of each reason.

    `max_errors`: failures after which the run stops, whatever else was answered; 0 for never. By default it stops
    after `MAX_HOPELESS` if no row has been answered.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None, max_errors: int | None = None) -> None:
        self.num_failed = 0
        self.num_ok = 0
        self._say = say
        self._max_errors = max_errors
        self._reasons = Reasons()

    def answered(self) -> None:
        self.num_ok += 1

    def failed(self, name: str, body: Mapping[str, Any]) -> None:
        """`name`: the row's. `body`: with its error object."""
        self.num_failed += 1
        message = body["error"]["message"]
        if self._reasons.add(message) and len(self._reasons) <= MAX_REASONS:
            self._say(f"row {name!r} failed: {_shortened(message)}")

    @property
    def is_hopeless(self) -> bool:
        """Whether to stop: nothing was answered, and that often."""
        return self._max_errors is None and self.num_ok == 0 and self.num_failed >= MAX_HOPELESS

    @property
    def has_met_its_limit(self) -> bool:
        """Whether to stop: as many have failed as `max_errors` allows."""
        return bool(self._max_errors) and self.num_failed >= self._max_errors

    @property
    def is_over(self) -> bool:
        """Whether to stop, for one reason or the other."""
        return self.is_hopeless or self.has_met_its_limit


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 1]}…"
