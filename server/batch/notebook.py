"""A whole batch job in one call, without a server: for a notebook's cell or a script.

`run_batch` may be called anywhere, in a cell of a notebook too (where an event loop is running already);
`run_batch_async` is for code that is asynchronous itself, and for a `Hosting` that stays open from job to job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.batch.rows import BadRow, Row

if TYPE_CHECKING:
    from server.batch.runner import Progress, Summary
    from server.config import Config
    from server.hosting import Hosting

InputRow = str | Mapping[str, Any] | Row | BadRow


@dataclass(frozen=True)
class Answers:
    """The outcome of `run_batch`. `output`: the file of OpenAI batch output lines; None if none was asked for."""

    summary: Summary
    output: Path | None

    def lines(self) -> Iterator[dict[str, Any]]:
        """The output lines in the input's order: {"id", "custom_id", "response", "error"}."""
        raise NotImplementedError

    def texts(self) -> Iterator[str | None]:
        """The text of each row's first choice; None for rows that failed."""
        raise NotImplementedError


def run_batch(
    config: Path | str | Mapping[str, Any] | Config,
    rows: Path | str | Iterable[InputRow],
    output: Path | str | None = None,
    *,
    model: str | None = None,
    seed: int = 0,
    concurrency: int | None = None,
    deadline_s: float | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Answers:
    """Answer all `rows` with the models of `config`; returns when that is done. See `run_batch_async`."""
    raise NotImplementedError


async def run_batch_async(
    config: Path | str | Mapping[str, Any] | Config | Hosting,
    rows: Path | str | Iterable[InputRow],
    output: Path | str | None = None,
    *,
    model: str | None = None,
    seed: int = 0,
    concurrency: int | None = None,
    deadline_s: float | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Answers:
    """Answer all `rows` and write the answers to `output`, in the rows' order.

    `config`: a YAML file, its value as a dict, or a `Config`; an open `Hosting` is used and left open.
    `rows`: a file of OpenAI batch lines, or an iterable of prompts: a text (asked as a chat), a body with `messages`
    or `prompt`, a batch line {"custom_id", "url", "body"}, or a `Row`. `parameters` (temperature, max_tokens, ...) and
    `model` are put into every body that does not say otherwise.
    `output`: the job is kept beside it as OUTPUT.job; the same call again goes on where the last one ended. Without an
    output nothing is kept.

    Errors of single rows are in their lines. Raises `ConfigError` for a config, an input or a job that cannot be used,
    and `EngineDeadError`.
    """
    raise NotImplementedError
