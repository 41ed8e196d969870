"""How many requests may wait for vLLM: interactive ones and background ones have a queue of their own each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ensemble_server.ensembles.errors import OverloadedError


class Ticket:
    """One request's place, from the door to its end. `has_begun`: its prompt has been read."""

    def __init__(self, num_choices: int, *, is_background: bool) -> None:
        self.num_choices = num_choices
        self.is_background = is_background
        self.has_begun = False

    def begin(self) -> None:
        self.has_begun = True


class Queue:
    """`max_running`: sequences that vLLM runs at once; `max_waiting`: requests of one kind that may wait besides."""

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._tickets: set[Ticket] = set()

    def check_room(self, priority: int) -> None:
        """Raise `OverloadedError` if the queue is full."""
        num_running = sum(ticket.num_choices for ticket in self._tickets if ticket.has_begun)
        is_background = priority > 0
        num_waiting = sum(
            not ticket.has_begun for ticket in self._tickets if ticket.is_background == is_background
        ) - max(0, self._max_running - num_running)
        if num_waiting >= self._max_waiting:
            raise OverloadedError(f"{num_waiting} requests are waiting, the queue is full; try again later")

    @contextmanager
    def ticket(self, num_choices: int, priority: int) -> Iterator[Ticket]:
        self.check_room(priority)
        ticket = Ticket(num_choices, is_background=priority > 0)
        self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
