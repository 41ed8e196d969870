"""Who is told how far a distillation is."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    def stage(self, text: str) -> None:
        """Something new begins."""

    def progress(self, done: int, total: int) -> None:
        """So much of the stage is done. `total` may fall: time decides how many steps there are."""

    def losses(self, clm: float, kl: float | None) -> None:
        """Of the last step, nats per token; heard before its `progress`."""
