"""Several runs of every row in one job: each combination of the models, temperatures and seeds that were asked for.

Row after row, and for each row cell after cell, so that the answers of one `custom_id` stand together in the output and
cells share the reading of a prompt. Samples are no axis: they are the `n` choices of one answer.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

MAX_CELLS = 10_000
MAX_SEED = 2**63 - 1

_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Grid:
    """`axes`: key of a body -> the values it takes, in order; the first varies slowest."""

    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.axes.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: a value stands there twice: {', '.join(map(str, values))}")
        num_cells = math.prod(map(len, self.axes.values()))
        if num_cells > MAX_CELLS:
            raise ValueError(f"a grid may have {MAX_CELLS} cells, this one has {num_cells}")

    @cached_property
    def cells(self) -> tuple[Mapping[str, Any], ...]:
        """Grid({"model": ("a", "b"), "seed": (0, 1)}).cells[1] -> {"model": "a", "seed": 1}; no axes: one cell"""
        return tuple(dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values()))

    def cell_of(self, index: int) -> Mapping[str, Any]:
        """The cell of the output row at `index`."""
        return self.cells[index % len(self.cells)]


def parse_words(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b"). Raises `ValueError`, as all of these do."""
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise ValueError(f"must be names with commas between them, got {text!r}")
    return words


def parse_numbers(text: str, *, least: float, most: float) -> tuple[float, ...]:
    """ "0.2,0.7" -> (0.2, 0.7)"""
    values = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            raise ValueError(f"must be numbers with commas between them, got {text!r}") from None
        if not least <= value <= most:  # also false for NaN
            raise ValueError(f"must be {least:g} to {most:g}, got {word.strip()}")
        values.append(value)
    return tuple(values)


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0-3,7" -> (0, 1, 2, 3, 7)"""
    seeds: list[int] = []
    for word in map(str.strip, text.split(",")):
        if span := _RANGE.fullmatch(word):
            first, last = int(span[1]), int(span[2])
            if not first <= last <= MAX_SEED or last - first >= MAX_CELLS:
                raise ValueError(f"a range of seeds goes up and holds at most {MAX_CELLS}, got {word!r}")
            seeds += range(first, last + 1)
        elif word.isascii() and word.isdecimal() and int(word) <= MAX_SEED:
            seeds.append(int(word))
        else:
            raise ValueError(f"must be whole numbers or ranges such as 0-3, with commas between them, got {text!r}")
    return tuple(seeds)
