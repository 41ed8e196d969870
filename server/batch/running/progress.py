"""How a run is going, on a terminal as a bar that redraws itself, elsewhere as a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

    from ensemble_server.ensembles.base import MemberUsage
    from ensemble_server.server.batch.running.runner import Progress
    from ensemble_server.server.engines.engine import Loading

LINE_INTERVAL_S = 5.0


class ProgressView:
    """Shows `runner.Progress` until its block ends. `console` writes to stderr: standard output is for answers."""

    def __init__(self, console: Console, *, is_shown: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = console
        self._clock = clock
        self._has_bar = is_shown and console.is_terminal
        self._has_lines = is_shown and not console.is_terminal
        self._last_line_s = clock()
        self._bar = Bar(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            disable=not self._has_bar,
            transient=True,
        )
        self._task = self._bar.add_task("rows", total=None, status="loading")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def loading(self, loading: Loading) -> None:
        """May be called from any thread."""
        if self._has_bar:
            self._bar.update(self._task, status=str(loading), refresh=True)  # there may be minutes to the next
        elif self._has_lines:
            self.say(str(loading))

    def update(self, progress: Progress) -> None:
        counts = progress.counts
        if self._has_bar:
            status = " · ".join(described(progress))
            self._bar.update(self._task, total=counts.total, completed=counts.ok + counts.failed, status=status)
        elif self._has_lines and self._clock() - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = self._clock()
            rows = f"{counts.ok + counts.failed}/{counts.total} rows"
            self._console.print(" · ".join([rows, *described(progress)]), highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A sentence of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def described(progress: Progress) -> list[str]:
    """Errors, rates, time left and what each member was used for: ["2 errors", "512 tokens/s", "3m20s left", ...]"""
    counts = progress.counts
    parts = [f"{counts.failed} errors"] if counts.failed else []
    tokens = progress.completion_tokens or progress.prompt_tokens
    if tokens and progress.elapsed_s > 0:
        parts.append(f"{tokens / progress.elapsed_s:,.0f} tokens/s")
    if counts.pending and progress.done:
        parts.append(f"{duration(counts.pending * progress.elapsed_s / progress.done)} left")
    return parts + spend(progress.members)


def spend(members: Mapping[str, MemberUsage]) -> list[str]:
    """Tokens that each member read and wrote, and the cost: ["base 12.3k+4.1k tokens", "gpt 800+95 tokens, 0.12"]"""
    parts = []
    for name, used in members.items():
        cost = f", {used.cost:.2g}" if used.cost else ""
        parts.append(f"{name} {_short(used.prompt_tokens)}+{_short(used.completion_tokens)} tokens{cost}")
    return parts


def duration(seconds: float) -> str:
    """45.2 -> "45s", 200 -> "3m20s", 5400 -> "1h30m" """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _short(number: int) -> str:
    """12345 -> "12.3k" """
    for unit, name in ((1_000_000, "M"), (1000, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)
