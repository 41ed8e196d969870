from __future__ import annotations

import threading
import time

import pytest

from ensemble_server.server.weights.threads import in_own_thread


def name_of_thread() -> str:
    return threading.current_thread().name


async def test_each_call_has_a_thread_that_ends_with_it() -> None:
    name = await in_own_thread(name_of_thread)
    assert name.startswith("name_of_thread")
    deadline = time.monotonic() + 5
    while any(thread.name == name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread outlived its work"
        time.sleep(0.01)


async def test_arguments_go_in_and_errors_come_out() -> None:
    assert await in_own_thread(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(divmod, 7, 0)
