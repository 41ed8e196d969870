"""Many cases of one test: some run always, the others with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_fast(cases: Iterable[Any], num_fast: int = 1) -> list[Any]:
    """What `parametrize` takes: `cases`, tuples where a test has several arguments, all but the first few slow."""
    made = []
    for place, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        made.append(pytest.param(*values, marks=[] if place < num_fast else pytest.mark.slow))
    return made
