"""Starting, watching and restarting, with a vLLM that dies on cue. That a real one does is seen in test_engine.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.v1.engine.exceptions", reason="needs vLLM: make test-vllm")  # whose import takes its time

from ensemble_server.ensembles.errors import EngineDeadError, EngineRestartingError, ModelLoadError
from ensemble_server.server.engines.shared.backoff import Backoff
from ensemble_server.server.engines.vllm_engine import process
from ensemble_server.server.engines.vllm_engine.process import VllmProcess

pytestmark = pytest.mark.vllm


class FragileLLM:
    """What the process asks of `AsyncLLM`."""

    def __init__(self) -> None:
        self.errored = False
        self.is_shut_down = False
        self.output_handler = None
        self.told: list[Exception] = []
        self.output_processor = SimpleNamespace(propagate_error=self.told.append)

        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=None))

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut_down = True


class Factory:
    """Makes what the list says, one after the other; the last one for good. A function is called before."""

    def __init__(self, *made: FragileLLM | Exception | Callable[[], FragileLLM]) -> None:
        self._made = list(made)
        self.num_calls = 0

    def __call__(self) -> FragileLLM:
        self.num_calls += 1
        one = self._made.pop(0) if len(self._made) > 1 else self._made[0]
        if isinstance(one, Exception):
            raise one
        return one() if callable(one) else one


async def nothing(llm: FragileLLM) -> None:
    """No need to be warmed up."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "BACKOFF", Backoff(first_s=0.02, max_s=0.1))
    monkeypatch.setattr(process, "WATCH_S", 0.01)
    yield


async def opened(factory: Factory) -> VllmProcess:
    found = VllmProcess("a, b", factory, nothing)
    await asyncio.to_thread(found.start)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_one_that_does_not_start_is_a_load_error_that_names_the_members() -> None:
    with pytest.raises(ModelLoadError, match=r"vLLM did not start for a, b \(no memory\)"):
        await opened(Factory(RuntimeError("no memory")))


async def test_one_that_cannot_be_asked_anything_is_shut_down() -> None:
    async def fails(llm: FragileLLM) -> None:
        raise RuntimeError("a kernel failed")

    llm = FragileLLM()
    with pytest.raises(ModelLoadError, match="a kernel failed"):
        await asyncio.to_thread(VllmProcess("a", Factory(llm), fails).start)
    assert llm.is_shut_down


async def test_a_dead_one_is_replaced_and_meanwhile_says_when_to_come_back(caplog: pytest.LogCaptureFixture) -> None:
    first, second = FragileLLM(), FragileLLM()
    found = await opened(Factory(first, second))
    assert found.llm is first and found.is_running
    first.errored = True
    assert not found.is_running
    with pytest.raises(EngineRestartingError, match="vLLM for a, b has died") as caught:
        _ = found.llm
    assert caught.value.retry_after_s >= 1
    await until(lambda: found.num_restarts == 1)
    assert found.llm is second and found.is_running
    assert first.is_shut_down and len(first.told) == 1
    assert "vLLM for a, b died after 0 s" in caplog.text and "runs again" in caplog.text
    await asyncio.to_thread(found.stop)
    assert second.is_shut_down


async def test_restarts_that_fail_are_tried_again_with_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    backoff = Backoff(first_s=0.01)
    monkeypatch.setattr(
        process,
        "BACKOFF",
        SimpleNamespace(delay_s=lambda failed, jitter: waits.append(failed) or backoff.delay_s(1, 0)),
    )
    first, last = FragileLLM(), FragileLLM()
    factory = Factory(first, RuntimeError("still no memory"), RuntimeError("still no memory"), last)
    found = await opened(factory)
    first.errored = True
    await until(lambda: found.num_restarts == 1)
    assert found.llm is last and factory.num_calls == 4
    assert waits == [1, 2, 3]
    last.errored = True  # soon after its start
    await until(lambda: len(waits) > 3)
    assert waits[3] == 2
    await asyncio.to_thread(found.stop)


async def test_one_that_lived_long_is_restarted_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STABLE_S", 0.0)
    failures: list[int] = []
    monkeypatch.setattr(
        process, "BACKOFF", SimpleNamespace(delay_s=lambda failed, jitter: failures.append(failed) or 0.01)
    )
    found = await opened(Factory(lambda: FragileLLM()))
    for number in (1, 2, 3):
        found.llm.errored = True
        await until(lambda number=number: found.num_restarts == number)
    assert failures == [1, 1, 1]
    await asyncio.to_thread(found.stop)


async def test_after_a_stop_nothing_runs_and_nothing_is_started() -> None:
    llm = FragileLLM()
    factory = Factory(llm)
    found = await opened(factory)
    await asyncio.to_thread(found.stop)
    with pytest.raises(EngineDeadError, match="the engine was stopped"):
        _ = found.llm
    llm.errored = True
    await asyncio.sleep(0.1)
    assert llm.is_shut_down and factory.num_calls == 1


async def test_a_stop_while_it_starts_leaves_nothing_behind() -> None:
    may_go_on, begun = threading.Event(), threading.Event()
    llm = FragileLLM()

    def slow() -> FragileLLM:
        begun.set()
        may_go_on.wait(10)
        return llm

    found = VllmProcess("a", slow, nothing)
    starting = asyncio.create_task(asyncio.to_thread(found.start))
    await until(begun.is_set)
    await asyncio.to_thread(found.stop)
    may_go_on.set()
    with pytest.raises(ModelLoadError, match="the engine was stopped"):
        await starting
    assert llm.is_shut_down


async def test_a_stop_during_the_wait_for_a_restart_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "BACKOFF", Backoff(first_s=100.0, max_s=100.0))
    first = FragileLLM()
    found = await opened(Factory(first, FragileLLM()))
    first.errored = True
    await until(lambda: first.is_shut_down)
    await asyncio.wait_for(asyncio.to_thread(found.stop), 60)  # it does not wait the 100 s
