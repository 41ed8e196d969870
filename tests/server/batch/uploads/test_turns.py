from __future__ import annotations

import asyncio

from ensemble_server.server.batch.uploads.turns import Turns


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Batches:
    """Batches that hold their place until they are told to end; `began` has them in the order of their turns."""

    def __init__(self, num_places: int) -> None:
        self.began: list[str] = []
        self._turns = Turns(num_places)
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def _run(self, name: str) -> None:
        async with self._turns.place(name[0]):
            self.began.append(name)
            await self._ends[name].wait()

    async def come(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._run(name))
            await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await settled()


async def test_as_many_run_as_there_are_places_and_the_others_in_their_order() -> None:
    batches = Batches(2)
    await batches.come("a1", "a2", "a3", "a4")
    assert batches.began == ["a1", "a2"]
    await batches.end("a2")
    assert batches.began == ["a1", "a2", "a3"]


async def test_a_place_goes_to_the_owner_who_has_fewest() -> None:
    batches = Batches(2)
    await batches.come("a1", "a2", "a3", "b1", "c1")
    await batches.end("a1")
    assert batches.began[-1] == "b1"
    await batches.end("a2")
    assert batches.began[-1] == "a3"
    await batches.end("b1")
    assert batches.began[-1] == "c1"


async def test_who_leaves_the_queue_takes_no_place_with_it() -> None:
    batches = Batches(1)
    await batches.come("a1", "b1", "c1")
    batches.tasks["b1"].cancel()
    await settled()
    await batches.end("a1")
    assert batches.began == ["a1", "c1"]


async def test_who_leaves_in_the_moment_of_his_turn_gives_it_to_the_next() -> None:
    turns, began = Turns(1), []

    async def run(name: str) -> None:
        async with turns.place(name):
            began.append(name)

    async with turns.place("holder"):
        second, third = asyncio.create_task(run("second")), asyncio.create_task(run("third"))
        await settled()
    second.cancel()  # it has the place, and has not heard of it yet
    await third
    assert began == ["third"]
