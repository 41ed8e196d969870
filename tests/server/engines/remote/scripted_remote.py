"""A remote end that is told how to behave, over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Connection:
    """One request as it came, and the way back."""

    path: str
    headers: dict[str, str]
    body: Any
    writer: asyncio.StreamWriter
    gone: asyncio.Event  # set once the client hung up

    async def send(self, data: str | bytes) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)
        await self.writer.drain()

    async def start_stream(self) -> None:
        await self.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")

    async def event(self, data: Any) -> None:
        await self.send(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n")

    async def respond(self, status: int, body: Any, **headers: str) -> None:
        content = body if isinstance(body, str) else json.dumps(body)
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(content.encode())}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "Connection: close", "", content]))

    async def say(self, *pieces: str, finish_reason: str = "stop", usage: tuple[int, int] | None = (7, 3)) -> None:
        """A well-behaved chat answer."""
        await self.start_stream()
        for piece in pieces:
            await self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        await self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]})
        if usage:
            await self.event({"choices": [], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}})
        await self.event("[DONE]")


Behaviour = Callable[[Connection], Awaitable[None]]


@dataclass
class ScriptedRemote:
    """A real HTTP server on a free local port, told by each test how to behave, down to the bytes.

    It meets the first request with the first behaviour, and so on; the last one stays.
    """

    behaviours: list[Behaviour]
    connections: list[Connection] = field(default_factory=list)
    num_live: int = 0
    max_live: int = 0

    async def __aenter__(self) -> ScriptedRemote:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        connection = Connection(head[0].split()[1], headers, body, writer, asyncio.Event())
        self.connections.append(connection)
        behaviour = self.behaviours[min(len(self.connections), len(self.behaviours)) - 1]
        self.num_live += 1
        self.max_live = max(self.max_live, self.num_live)
        watching = asyncio.create_task(self._watch(reader, connection.gone))
        try:
            await behaviour(connection)
        except ConnectionError:
            connection.gone.set()
        finally:
            self.num_live -= 1
            watching.cancel()
            writer.close()

    @staticmethod
    async def _watch(reader: asyncio.StreamReader, gone: asyncio.Event) -> None:
        while await reader.read(1024):
            pass
        gone.set()
