"""A row's body, answered in process by the same functions that answer it over HTTP: same checks, same errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.batch.rows import Row, RowResult

if TYPE_CHECKING:
    from server.hosting import Hosting
    from server.metrics import Metrics


async def answer(
    hosting: Hosting,
    row: Row,
    *,
    priority: int = 1,
    deadline_s: float | None = None,
    metrics: Metrics | None = None,
) -> RowResult:
    """The answer to `row`, or the error that a client would have got for it, as a result like any other.

    `deadline_s`: seconds from now after which the model answers with what it has; a shorter limit of the server's
    config wins. Raises only what is not the row's own fault: `OverloadedError` (try again) and `EngineDeadError`.
    Ids follow from the row's body, so that the same row gives the same bytes; give it a seed first (`seeded`).
    """
    raise NotImplementedError
