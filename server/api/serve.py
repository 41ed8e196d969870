"""The server process: listen, load, answer, and stop in an orderly way.

The port answers from the first second on: /live says yes, everything else 503, until the models are loaded. At the
first SIGINT or SIGTERM nobody new is let in (503), batches are paused, and live requests may finish, for
`shutdown_timeout_s` at most; at the second they end at once. While the models are being loaded the first signal gives
that up. Loading and what it imports run in threads, or no signal would be heard meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.api.admission import RETRY_SOON, Admission
from ensemble_server.server.api.arrival import TimelyProtocol
from ensemble_server.server.api.errors import error_response
from ensemble_server.server.api.json_response import JSONResponse
from ensemble_server.server.api.local_only import local_only
from ensemble_server.server.api.logs import configure_logging
from ensemble_server.server.limits.keys import keys_of
from ensemble_server.server.metrics import Metrics
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ensemble_server.server.config.blocks import Config, ServerConfig
    from ensemble_server.server.hosting import Hosting

logger = logging.getLogger(__name__)

MAX_DESCRIPTORS = 65_536
KEEP_ALIVE_S = 75  # an idle connection stays open longer than clients keep theirs, so that none is cut in use


async def serve(config: Config, *, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve `config` until a signal stops it. `on_ready` is told the port once requests are answered.

    Raises `ConfigError` if the models cannot be loaded or the address cannot be listened on.
    """
    configure_logging(config.server.log_format, config.server.log_level)
    raise_descriptor_limit()
    entrance = Entrance()
    stop = StopSignals()
    with stop.caught():
        async with listening(entrance, config.server) as port:

            def ready() -> None:
                if on_ready is not None:
                    on_ready(port)

            serving = asyncio.create_task(_load_and_answer(config, entrance, stop, ready))
            stopping = asyncio.create_task(stop.first.wait())
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if entrance.app is None:
                stop.let_next_end_all()
                serving.cancel()  # still loading: nobody is being answered
            with suppress(asyncio.CancelledError):
                await serving


def raise_descriptor_limit() -> None:
    """As many open connections and files as the system lets this process have; many shells give 256 or 1024."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _imported() -> tuple[Callable[..., FastAPI], type[Hosting]]:
    """What answers, and what loads: takes seconds to import."""
    from ensemble_server.server.api.app import create_app
    from ensemble_server.server.hosting import Hosting

    return create_app, Hosting


async def _load_and_answer(config: Config, entrance: Entrance, stop: StopSignals, ready: Callable[[], None]) -> None:
    keys_of(config.server)  # what is wrong with them is said before models are loaded
    create_app, hosting_class = await in_own_thread(_imported)
    metrics = Metrics()
    async with hosting_class.open(config, on_step=metrics.observe_step) as hosting:
        app = create_app(hosting, metrics=metrics)
        async with app.state.batches.running():
            # What is loaded stays: a full collection over it would hold everybody up for a good part of a second.
            gc.collect()
            gc.freeze()
            entrance.app = app
            ready()
            await stop.first.wait()
            app.state.batches.pause()
            timeout_s = config.server.shutdown_timeout_s
            logger.info("stopping: live requests have %g s to finish; a second signal ends them", timeout_s)
            await _drain(app.state.admission, timeout_s, stop)


async def _drain(admission: Admission, timeout_s: float, stop: StopSignals) -> None:
    drained = asyncio.create_task(admission.drain(timeout_s))
    forced = asyncio.create_task(stop.second.wait())
    await asyncio.wait({drained, forced}, return_when=asyncio.FIRST_COMPLETED)
    forced.cancel()
    if not drained.done():
        admission.cancel_all()
    await drained


class Entrance:
    """The ASGI application that uvicorn runs: `app` once there is one, until then a friendly refusal."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            if scope["path"] == "/live":
                answer = JSONResponse({"status": "loading"})
            else:
                answer = error_response(
                    HTTPException(503, "the models are still loading", headers=RETRY_SOON), scope["path"]
                )
            await answer(scope, receive, send)


class StopSignals:
    """SIGINT and SIGTERM as events. One more after the second ends the process, whatever it is doing."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._next_ends_all = False

    def let_next_end_all(self) -> None:
        """There is nothing more to do in an orderly way: the next signal ends the process."""
        self._next_ends_all = True

    @contextmanager
    def caught(self) -> Iterator[None]:
        """While the block runs the two signals do nothing but set the events."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._receive, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _receive(self, number: signal.Signals) -> None:
        if self._next_ends_all:
            for child in multiprocessing.active_children():  # engines: nobody else would end them
                child.kill()
            os._exit(128 + number)
        if self.first.is_set():
            self.second.set()
            self.let_next_end_all()
        self.first.set()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: it is told when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: ASGIApp, config: ServerConfig) -> AsyncIterator[int]:
    """Answer HTTP with `app` while the block runs; gives the port. Raises `ConfigError` if it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as exc:
        raise ConfigError(
            f"server: cannot listen on {config.host}:{config.port} ({exc.strerror or exc}); choose another host or port"
        ) from exc
    settings = uvicorn.Config(
        local_only(app, listener.getsockname()[0], config),
        lifespan="off",
        access_log=False,
        log_config=None,
        http=TimelyProtocol,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,  # requests have been drained or cancelled before
    )
    server = _Server(settings)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running
