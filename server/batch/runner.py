"""Runs the rows of a job through the models, many at once, and keeps each answer as soon as it is there.

Rows go straight to `hosting.models`: the engine's continuous batching sees them all. Interactive requests go first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from server.batch.answering import answer as answer_row
from server.batch.rows import RowResult

if TYPE_CHECKING:
    from ensembles.base import MemberUsage
    from server.batch.store import Counts, JobStore
    from server.hosting import Hosting


@dataclass(frozen=True)
class Progress:
    """Where a run is. `running`: rows in flight. `done`, the tokens and `elapsed_s` are of this run, for rates and ETA;
    `counts` and `members` (tokens and cost of each single model) are of the job over all its runs."""

    counts: Counts
    running: int
    done: int
    prompt_tokens: int
    completion_tokens: int
    members: Mapping[str, MemberUsage]
    elapsed_s: float


@dataclass(frozen=True)
class Summary:
    """How a run ended. `ended`: every row has a result, or the deadline passed, or it was asked to stop."""

    ended: Literal["finished", "deadline", "stopped"]
    counts: Counts
    prompt_tokens: int
    completion_tokens: int
    members: Mapping[str, MemberUsage]
    elapsed_s: float


class RowBudget(Protocol):
    """Shares out time among the rows of a run."""

    def allowance_s(self, num_left: int) -> float | None:
        """Seconds that the row which begins now may take; None for no limit. `num_left`: rows to begin, it included."""

    def ended(self, allowed_s: float | None, used_s: float) -> None:
        """A row is done that was allowed `allowed_s` and took `used_s`."""


Answer = Callable[..., Awaitable[RowResult]]  # (hosting, row, *, priority, deadline_s), as `answering.answer`


async def run(
    store: JobStore,
    hosting: Hosting,
    *,
    concurrency: int | None = None,
    deadline_s: float | None = None,
    priority: int = 1,
    budget: RowBudget | None = None,
    stop: asyncio.Event | None = None,
    answer: Answer = answer_row,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Answer every pending row of `store` and record the answers. Errors of a row are results; the run goes on.

    `concurrency`: rows in flight; by default enough to keep the engine full. `deadline_s`: seconds from now at which
    the run stops: rows in flight then end with the text they have and are kept as `cut`, rows that have none stay
    pending; both run again when the job is continued. `stop`: set it to stop soon; rows in flight stay pending.
    Cancelling the task does the same and raises `CancelledError`. `on_progress` is called after each group of results.

    Raises `EngineDeadError` if the engine died, and `ConfigError` if results cannot be written. In both cases what was
    recorded is kept, and the job can be continued.
    """
    raise NotImplementedError
