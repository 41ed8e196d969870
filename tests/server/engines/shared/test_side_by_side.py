"""Streams side by side: everything comes, errors and deadlines end all, and nothing stays open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import pytest

from ensemble_server.server.engines.shared.side_by_side import MAX_AHEAD, side_by_side


class Streams:
    """Streams of numbers that say which of them were opened and closed; `gates` hold a stream after its first item."""

    def __init__(self, num_streams: int, length: int = 3) -> None:
        self.openers = [partial(self._stream, place) for place in range(num_streams)]
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.num_produced = 0
        self.gates: dict[int, asyncio.Event] = {}
        self.errors: dict[int, BaseException] = {}
        self._length = length

    async def _stream(self, place: int) -> AsyncGenerator[int, None]:
        self.opened.append(place)
        try:
            for number in range(self._length):
                self.num_produced += 1
                yield number
                await asyncio.sleep(0)
                if place in self.gates:
                    await self.gates[place].wait()
                if place in self.errors:
                    raise self.errors[place]
        finally:
            self.closed.append(place)


@pytest.mark.parametrize("num_streams", [1, 2, 5])
async def test_all_items_come_each_streams_in_its_order(num_streams: int) -> None:
    streams = Streams(num_streams)
    items = [item async for item in side_by_side(streams.openers)]
    for place in range(num_streams):
        assert [number for where, number in items if where == place] == [0, 1, 2]
    assert sorted(streams.closed) == list(range(num_streams))


async def test_no_streams_are_no_items() -> None:
    assert [item async for item in side_by_side([])] == []


async def test_a_stream_that_waits_holds_up_no_other() -> None:
    streams = Streams(2)
    streams.gates[0] = asyncio.Event()
    items = []
    async for item in side_by_side(streams.openers):
        items.append(item)
        if item == (1, 2):
            streams.gates[0].set()
    assert items.index((1, 2)) < items.index((0, 1))


async def test_streams_beyond_those_at_once_are_opened_when_others_end() -> None:
    streams = Streams(4)
    async for place, number in side_by_side(streams.openers, at_once=1):
        if number == 0:
            assert streams.closed == list(range(place))
    assert streams.opened == [0, 1, 2, 3]


@pytest.mark.parametrize("num_streams", [1, 3])
async def test_the_first_error_ends_all(num_streams: int) -> None:
    streams = Streams(num_streams, length=10_000)
    streams.errors[0] = ValueError("lost")
    with pytest.raises(ValueError, match="lost"):
        async for _ in side_by_side(streams.openers):
            pass
    assert sorted(streams.closed) == list(range(num_streams))


async def test_a_stream_that_was_cancelled_from_within_is_over() -> None:
    streams = Streams(2)
    streams.errors[0] = asyncio.CancelledError()
    items = [item async for item in side_by_side(streams.openers)]
    assert (1, 2) in items


@pytest.mark.parametrize("num_streams", [1, 3])
async def test_leaving_early_closes_every_stream(num_streams: int) -> None:
    streams = Streams(num_streams, length=10_000)
    async with aclosing(side_by_side(streams.openers)) as items:
        await anext(items)
    assert sorted(streams.closed) == sorted(streams.opened)


@pytest.mark.parametrize("num_streams", [1, 3])
async def test_a_deadline_ends_all_after_what_came_in_time(num_streams: int) -> None:
    streams = Streams(num_streams)
    streams.gates = {place: asyncio.Event() for place in range(num_streams)}
    came = []
    with pytest.raises(TimeoutError):
        async for item in side_by_side(streams.openers, deadline=asyncio.get_running_loop().time() + 0.02):
            came.append(item)
    assert sorted(came) == [(place, 0) for place in range(num_streams)]
    assert sorted(streams.closed) == list(range(num_streams))


async def test_streams_wait_for_a_slow_reader() -> None:
    streams = Streams(2, length=10_000)
    async with aclosing(side_by_side(streams.openers)) as items:
        await anext(items)
        for _ in range(5 * MAX_AHEAD):
            await asyncio.sleep(0)
        assert streams.num_produced <= MAX_AHEAD + 4
