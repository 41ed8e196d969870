"""What makes a job the same job when its command is run again, and names in it that no clock has touched.

An answer's id is a hash of the row's body, and `created` is 0; a row without a seed gets one. So a job that was killed
and resumed writes the very bytes that an uninterrupted one writes, with the reservation that `server.batch.runner`
makes about ties.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.batch.rows import Row

HAS_NO_SEED = frozenset({"/v1/embeddings", "/v1/classify"})  # nothing is drawn for these


@dataclass(frozen=True)
class Identity:
    """What must be the same whenever a job is continued, each thing under the name that a user knows it by.

    `{"input": "rows.jsonl, sha256 3f2a…", "--template": "…", "--seed": "0"}`. What may change from one run to the next
    (how many rows run at once, a deadline) does not belong here. `seed` is the job's: rows without one get theirs
    from it.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def check(self, stored: Identity, where: str) -> None:
        """Raise `ConfigError` that names every difference between the job that is `stored` at `where` and this one."""
        raise NotImplementedError


def encoded_body(body: Mapping[str, Any]) -> bytes:
    """`body` as JSON in UTF-8, keys in their order (a JSON schema's order is the order of what is generated).

    Raises `ValueError` for what JSON cannot say: NaN, infinities, halves of surrogate pairs, Python objects.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except TypeError as exc:
        raise ValueError(str(exc)) from exc


def seeded(row: Row, job_seed: int) -> Row:
    """`row` with a seed, the same at every run: its own, or one from the job's seed and its `custom_id`.

    Rows at temperature 0 get one from their body instead: equal ones are then still equal.
    """
    raise NotImplementedError


def shared_digest(row: Row) -> bytes | None:
    """Equal for rows that must have equal answers (temperature 0, or a seed of their own); None for all others."""
    raise NotImplementedError
