"""What a batch job consists of: rows to answer, rows that cannot be answered, and what became of either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import MemberUsage
    from ensemble_server.server.requests.errors import ErrorObject

Url = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"]
URLS: tuple[Url, ...] = get_args(Url)


@dataclass(frozen=True)
class Row:
    """One request. `index`: its place in the output, from 0. `body`: what a client would POST to `url`, as JSON values.

    `body` is checked when the row is answered, as the HTTP API checks it; a reader of files need not.
    """

    index: int
    custom_id: str
    url: Url
    body: Mapping[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be run: it becomes an error in its own place. `line`: of the input, from 1.

    `custom_id` is None where the input gives none.
    """

    index: int
    custom_id: str | None
    line: int
    error: ErrorObject


@dataclass(frozen=True)
class RowResult:
    """What became of a row. `body`: the answer (`status_code` 200), or `{"error": {...}}` as the HTTP API words it.

    `usage`: what each single model read and wrote for it; empty for errors. `is_cut`: a time limit ended the answer
    before the model did, so `body` holds the best there was so far; kept in a job only where its deadline was the
    limit, and then the row runs again.
    """

    status_code: int
    request_id: str
    body: Mapping[str, Any]
    usage: Mapping[str, MemberUsage] = field(default_factory=dict)
    is_cut: bool = False

    @property
    def is_ok(self) -> bool:
        return self.status_code < 400
