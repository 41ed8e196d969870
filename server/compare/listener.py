"""Who is told how far a comparison is."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    def stage(self, text: str) -> None:
        """Something new begins."""

    def progress(self, done: int, total: int) -> None:
        """So much of the stage is done."""


class Silent:
    """Nobody."""

    def stage(self, text: str) -> None:
        return

    def progress(self, done: int, total: int) -> None:
        return
