"""How many requests may wait: those that vLLM runs do not count, and each kind has a queue of its own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from ensemble_server.ensembles.errors import OverloadedError
from ensemble_server.server.engines.vllm_engine.queue import Queue


@pytest.fixture
def queue() -> Queue:
    return Queue(max_running=2, max_waiting=3)


def test_as_many_are_taken_as_run_and_wait_and_no_more(queue: Queue) -> None:
    with ExitStack() as inside:
        for _ in range(5):
            inside.enter_context(queue.ticket(1, 0))
        with pytest.raises(OverloadedError, match="3 requests are waiting"):
            queue.check_room(0)
    queue.check_room(0)


def test_choices_take_places_once_their_request_has_begun(queue: Queue) -> None:
    with ExitStack() as inside:
        inside.enter_context(queue.ticket(2, 0)).begin()  # both places
        for _ in range(3):
            inside.enter_context(queue.ticket(1, 0))
        with pytest.raises(OverloadedError):
            inside.enter_context(queue.ticket(1, 0))


def test_background_work_does_not_fill_the_queue_of_interactive_requests(queue: Queue) -> None:
    with ExitStack() as inside:
        for _ in range(5):
            inside.enter_context(queue.ticket(1, 1))
        with pytest.raises(OverloadedError):
            queue.check_room(1)
        queue.check_room(0)


def test_a_request_that_fails_gives_its_place_back(queue: Queue) -> None:
    for _ in range(10):
        with pytest.raises(RuntimeError), queue.ticket(1, 0):
            raise RuntimeError("lost")
    queue.check_room(0)
