"""A model behind an OpenAI-compatible API, over httpx.

Answers are always streamed, so that leaving early costs the remote end a token and not an answer. Getting through to
the remote end is tried several times, with back-off; once it answers, nothing is tried again, because a second try
would be another answer. Leaves out tools (a `Delta` has no place for their calls) and the scoring of prompts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import orjson
from pydantic import ValidationError

from ensemble_server.ensembles.base import Delta, Done, Event, FinishReason, GenerationRequest, MemberUsage, Usage
from ensemble_server.ensembles.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineError,
    EnsembleError,
    MemberError,
    UnsupportedError,
)
from ensemble_server.server.engines.remote.protocol import (
    FAILED_REASONS,
    FINISH_REASONS,
    Chunk,
    ChunkChoice,
    ChunkUsage,
    error_message,
    is_about_context,
    parse_error_body,
    request_body,
)
from ensemble_server.server.engines.remote.sse import EventDecoder
from ensemble_server.server.engines.shared.backoff import Backoff, is_worth_retrying, parse_retry_after

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import RemoteModel

logger = logging.getLogger(__name__)


@dataclass
class _Progress:
    """One answer on its way. `deadline` is in the loop's time."""

    request: GenerationRequest
    deadline: float | None
    has_text: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    usage: ChunkUsage = field(default_factory=ChunkUsage)
    is_over: bool = False  # the remote end said so: [DONE], or an answer in one piece

    @property
    def unfinished(self) -> list[int]:
        return [index for index in range(self.request.n) if index not in self.finished]

    def until(self, moment: float) -> asyncio.Timeout:
        """Until `moment` in the loop's time, and not beyond the deadline."""
        return asyncio.timeout_at(moment if self.deadline is None else min(moment, self.deadline))

    def has_time_for(self, wait_s: float) -> bool:
        # subtle: the loop may fire a timeout one clock tick before its moment
        return self.deadline is None or asyncio.get_running_loop().time() + wait_s < self.deadline - 1e-3


class RemoteChat:
    """A remote model; see `ensembles.base.Model`. `aclose` it when no more requests come.

    `sleep` and `rng` (which draws the jitter) make the waits between tries testable.
    """

    explains_tokens = False  # a remote end may have no log-probabilities to give
    fan_out = 1

    def __init__(
        self,
        name: str,
        config: RemoteModel,
        *,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.name = name
        self.members = (name,)
        self.max_model_len: int | None = config.max_model_len
        self._config = config
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._rng = rng or random.Random()
        self.max_concurrency = config.max_concurrency  # requests at once; more wait
        self._slots = asyncio.Semaphore(config.max_concurrency)
        headers = {"Content-Type": "application/json"}
        if config.api_key_env:
            headers["Authorization"] = f"Bearer {_api_key(name, config.api_key_env)}"
        self._client = httpx.AsyncClient(
            base_url=f"{config.url.rstrip('/')}/",
            headers=headers,
            # Reading is timed below, by events: a server that sends nothing but comments has stalled as well.
            timeout=httpx.Timeout(None, connect=config.connect_timeout_s),
            limits=httpx.Limits(max_connections=config.max_concurrency),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        path, body = request_body(self.name, self._config.model or self.name, request)
        start = asyncio.get_running_loop().time()
        progress = _Progress(request, None if request.deadline_s is None else start + request.deadline_s)
        try:
            async with asyncio.timeout_at(progress.deadline):
                await self._slots.acquire()
        except TimeoutError as exc:
            raise self._too_late(progress) from exc
        response: httpx.Response | None = None
        try:
            response = await self._connect(path, body, progress)
            async with aclosing(self._deltas(response, progress)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            if response is not None:
                await response.aclose()
            self._slots.release()
        if not progress.is_over and not progress.has_text and progress.unfinished:
            raise self._too_late(progress)
        for index in range(request.n):
            if index not in progress.has_text:
                raise MemberError(self.name, f"the answer is empty (choice {index} of {request.n})")
        for index in progress.unfinished:  # all of it came, or all that came in time
            yield Delta(index, finish_reason="stop" if progress.is_over else "length")
        yield Done(self._usage(progress.usage), method="remote", members=self.members, turnout=1)

    def _too_late(self, progress: _Progress) -> DeadlineError:
        return DeadlineError(f"member {self.name!r}: no answer within {progress.request.deadline_s:g} s")

    def _usage(self, usage: ChunkUsage) -> Usage:
        num_read, num_written = usage.prompt_tokens or 0, usage.completion_tokens or 0
        cost = (
            num_read * self._config.prompt_price_per_million + num_written * self._config.completion_price_per_million
        ) / 1e6
        return Usage(num_read, num_written, {self.name: MemberUsage(num_read, num_written, cost)})

    # --- getting through ------------------------------------------------------------------------------------------

    async def _connect(self, path: str, body: dict[str, Any], progress: _Progress) -> httpx.Response:
        """An open response of status 200, after as many tries as the config and the deadline allow."""
        content = orjson.dumps(body)
        for num_tries in range(1, self._config.max_retries + 2):
            asked_wait_s = None
            cause: Exception | None = None
            try:
                response = await self._send(path, content, progress)
            except httpx.TransportError as exc:
                cause = exc
                failure = f"cannot reach {self._client.base_url}: {_words(exc)}"
            else:
                if response.status_code == HTTPStatus.OK:
                    return response
                failure = self._refusal(response)
                asked_wait_s = parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
            wait_s = self._backoff.delay_s(num_tries, self._rng.random(), asked_wait_s)
            is_last = num_tries > self._config.max_retries or wait_s > self._config.timeout_s
            if is_last or not progress.has_time_for(wait_s):
                tries = "1 try" if num_tries == 1 else f"{num_tries} tries"
                raise MemberError(self.name, f"{failure} (after {tries})") from cause
            logger.info("member %r: try %d failed: %s; again in %.2f s", self.name, num_tries, failure, wait_s)
            await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _send(self, path: str, content: bytes, progress: _Progress) -> httpx.Response:
        """One try. A response of status 200 comes back open, any other one read."""
        try:
            async with progress.until(asyncio.get_running_loop().time() + self._config.timeout_s):
                request = self._client.build_request("POST", path, content=content)
                response = await self._client.send(request, stream=True)
                if response.status_code != HTTPStatus.OK:
                    try:
                        await response.aread()
                    finally:
                        await response.aclose()
                return response
        except TimeoutError as exc:
            if not progress.has_time_for(0):
                raise self._too_late(progress) from exc
            raise MemberError(self.name, f"no response within timeout_s = {self._config.timeout_s:g} s") from exc

    def _refusal(self, response: httpx.Response) -> str:
        """What the remote end says, if it is worth another try; raised if it is not."""
        status = response.status_code
        message, code = parse_error_body(response.content)
        if status == HTTPStatus.BAD_REQUEST and is_about_context(message, code):
            raise ContextLengthError(f"member {self.name!r}: the remote end refused: {message}", param="messages")
        failure = f"the remote end answered {status}: {message}"
        if not is_worth_retrying(status):
            raise MemberError(self.name, failure)
        return failure

    # --- reading --------------------------------------------------------------------------------------------------

    async def _deltas(self, response: httpx.Response, progress: _Progress) -> AsyncIterator[Delta]:
        """The answer up to its end or to the deadline. Raises `MemberError` if it breaks off or makes no sense."""
        try:
            async with aclosing(self._chunks(response, progress)) as chunks:
                async for chunk in chunks:
                    if chunk.error is not None:
                        raise MemberError(self.name, f"the remote end failed: {error_message(chunk.error)[0]}")
                    progress.usage = chunk.usage or progress.usage
                    for choice in chunk.choices or ():
                        yield self._delta(choice, progress)
        except TimeoutError as exc:
            if progress.has_time_for(0) and progress.unfinished:
                reason = f"stalled: nothing came for timeout_s = {self._config.timeout_s:g} s"
                raise MemberError(self.name, reason) from exc
            return  # the deadline, or a remote end that does not close its streams
        except httpx.RequestError as exc:
            raise MemberError(self.name, f"the connection broke off: {_words(exc)}") from exc
        except ValidationError as exc:
            finding = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in finding["loc"])
            raise MemberError(self.name, f"malformed answer: {where + ': ' if where else ''}{finding['msg']}") from exc
        except EnsembleError:
            raise
        except ValueError as exc:  # no UTF-8, an event without end, logprobs that do not fit their tokens
            raise MemberError(self.name, f"malformed answer: {exc}") from exc
        if progress.unfinished and not progress.is_over:
            raise MemberError(self.name, "the stream ended before the answer did")

    def _delta(self, choice: ChunkChoice, progress: _Progress) -> Delta:
        if choice.index >= progress.request.n:
            raise MemberError(self.name, f"malformed answer: choice {choice.index} was not asked for")
        text = choice.said.content or ""
        tokens = ()
        if progress.request.top_logprobs is not None:
            tokens = choice.logprobs.read() if choice.logprobs is not None else ()
            if text and not tokens and not progress.has_text:
                raise UnsupportedError(f"model {self.name!r}: its remote end gives no logprobs", param="logprobs")
        if text.strip():
            progress.has_text.add(choice.index)
        finish_reason: FinishReason | None = None
        if choice.finish_reason is not None:
            if choice.finish_reason in FAILED_REASONS:
                raise MemberError(self.name, f"the remote end stopped with finish_reason {choice.finish_reason!r}")
            finish_reason = FINISH_REASONS.get(choice.finish_reason, "stop")
            progress.finished.add(choice.index)
        reasoning = choice.said.reasoning_content or choice.said.reasoning or ""
        return Delta(
            choice.index,
            text,
            tokens=tokens,
            reasoning=reasoning,
            finish_reason=finish_reason,
            stop_reason=choice.stop_reason,
        )

    async def _chunks(self, response: httpx.Response, progress: _Progress) -> AsyncIterator[Chunk]:
        """The events of the stream. Raises `TimeoutError` at the deadline, or if none comes for `timeout_s`."""
        loop = asyncio.get_running_loop()
        is_stream = response.headers.get("Content-Type", "").startswith("text/event-stream")
        decoder, whole = EventDecoder(), b""
        stalls_at = loop.time() + self._config.timeout_s
        async with aclosing(response.aiter_bytes()) as pieces:
            while True:
                async with progress.until(stalls_at):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                if not is_stream:
                    whole += piece
                    continue
                for data in decoder.feed(piece):
                    stalls_at = loop.time() + self._config.timeout_s
                    if data.strip() == "[DONE]":
                        progress.is_over = True
                        return
                    yield Chunk.model_validate_json(data)
        if not is_stream:  # the remote end does not stream: the whole answer is one chunk
            progress.is_over = True
            yield Chunk.model_validate_json(whole)


def _words(exc: Exception) -> str:
    """httpx leaves some messages empty; then the class says what happened."""
    return str(exc) or type(exc).__name__


def _api_key(name: str, variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"model {name!r}: api_key_env names the environment variable {variable}, which is not set; "
            f"export {variable}=..., or leave api_key_env out if the remote end needs no key"
        )
    return key
