"""A model behind an OpenAI-compatible API, over httpx.

Answers are always streamed, so that leaving early costs the remote end a token and not an answer. Getting through to
the remote end is tried several times, with back-off; once it answers, nothing is tried again, because a second try
would be another answer. Leaves out the scoring of prompts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
import orjson
from pydantic import ValidationError

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    FinishReason,
    GenerationRequest,
    MemberUsage,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from ensemble_server.ensembles.errors import (
    ConfigError,
    ContextLengthError,
    DeadlineError,
    EnsembleError,
    MemberError,
    MemberTimeoutError,
    UnsupportedError,
)
from ensemble_server.server.engines.remote.body import (
    MAX_ANSWER_BYTES,
    MAX_ERROR_BYTES,
    MAX_STREAM_BYTES,
    beginning_of,
    pieces_of,
)
from ensemble_server.server.engines.remote.protocol import (
    FAILED_REASONS,
    FINISH_REASONS,
    CallPiece,
    Chunk,
    ChunkChoice,
    ChunkUsage,
    Scored,
    error_message,
    is_about_context,
    parse_error_body,
    read_whole,
    request_body,
    scoring_bodies,
)
from ensemble_server.server.engines.remote.secrets import Secrets, without_secrets
from ensemble_server.server.engines.remote.sse import EventDecoder
from ensemble_server.server.engines.remote.tool_calls import RemoteToolCalls
from ensemble_server.server.engines.shared.backoff import Backoff, is_worth_retrying, parse_retry_after

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import RemoteModel

logger = logging.getLogger(__name__)


NUM_TELLING_BYTES = 8  # no whole event is shorter; from these a stream is told from an answer in one piece
MAX_MESSAGE_CHARS = 500  # of what a remote end says of a failure

_FIELDS_OF_EVENTS = (b"data:", b"event:", b"id:", b"retry:", b":")
_TAKES_NO_REQUESTS = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


@dataclass
class _Progress:
    """One answer on its way, over all calls that are made for it. `deadline` is in the loop's time. `has_text`: choices
    that say something, in words or by calls of tools.

    `ends`: how choices ended, as far as the remote end has said; `shown`: those whose end has been passed on.
    """

    request: GenerationRequest
    deadline: float | None
    has_text: set[int] = field(default_factory=set)
    has_reasoning: set[int] = field(default_factory=set)
    ends: dict[int, tuple[FinishReason, str | int | None]] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    usages: list[ChunkUsage] = field(default_factory=list)  # one per call
    ensemble: dict[str, Any] = field(default_factory=dict)  # what a server of this kind tells of how it answered
    is_over: bool = False  # the remote end said so: [DONE], or an answer in one piece

    @property
    def unfinished(self) -> list[int]:
        return [index for index in range(self.request.n) if index not in self.ends]

    @property
    def is_incomplete(self) -> bool:
        """Whether nothing has come to its end yet, or not all that has begun."""
        return not self.ends or not (self.has_text | self.has_reasoning) <= self.ends.keys()

    @property
    def missing(self) -> list[int]:
        """Choices that were not sent at all, or blank."""
        came = self.has_text | self.has_reasoning
        return [index for index in range(self.request.n) if index not in came]

    def until(self, moment: float) -> asyncio.Timeout:
        """Until `moment` in the loop's time, and not beyond the deadline."""
        return asyncio.timeout_at(moment if self.deadline is None else min(moment, self.deadline))

    def has_time_for(self, wait_s: float) -> bool:
        # subtle: the loop may fire a timeout one clock tick before its moment
        return self.deadline is None or asyncio.get_running_loop().time() + wait_s < self.deadline - 1e-3


class _Call:
    """One call for the choices `places`, which it knows as 0, 1, ... Its texts are freed of secrets, and blank ones are
    held back: a choice that stays blank is asked for again."""

    def __init__(self, places: Sequence[int], secrets: Secrets) -> None:
        self.places = places
        self.usage = ChunkUsage()
        self._texts = [secrets.stream() for _ in places]
        self._tokens = [secrets.tokens() for _ in places]
        self._reasonings = [secrets.stream() for _ in places]
        self._blank: list[tuple[str, tuple[TokenLogprob, ...]]] = [("", ()) for _ in places]
        self._tool_calls = [RemoteToolCalls(secrets) for _ in places]

    def tool_calls(self, choice: int, pieces: Sequence[CallPiece], *, is_last: bool) -> tuple[ToolCallDelta, ...]:
        """What may be shown of the choice's calls. Raises `ValueError` if they make no sense."""
        deltas = [delta for piece in pieces for delta in self._tool_calls[choice].add(piece)]
        return (*deltas, *(self._tool_calls[choice].flush() if is_last else ()))

    def add(
        self, choice: int, text: str, tokens: tuple[TokenLogprob, ...], reasoning: str, *, is_last: bool
    ) -> tuple[str, tuple[TokenLogprob, ...], str]:
        """What may be shown."""
        text, reasoning = self._texts[choice].add(text), self._reasonings[choice].add(reasoning)
        tokens = self._tokens[choice].add(tokens)
        if is_last:
            text, reasoning = text + self._texts[choice].flush(), reasoning + self._reasonings[choice].flush()
            tokens += self._tokens[choice].flush()
        held_text, held_tokens = self._blank[choice]
        text, tokens = held_text + text, held_tokens + tokens
        if text.strip():
            self._blank[choice] = ("", ())
            return text, tokens, reasoning
        self._blank[choice] = (text, tokens)
        return "", (), reasoning


class RemoteChat:
    """A remote model; see `ensembles.base.Model`. `aclose` it when no more requests come.

    `sleep` and `rng` (which draws the jitter) make the waits between tries testable. `explains_tokens`: whether it does
    (a model on a server of this kind, which also takes what a request may change of an ensemble), else None.
    """

    fan_out = 1

    def __init__(
        self,
        name: str,
        config: RemoteModel,
        *,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
        explains_tokens: bool | None = None,
    ) -> None:
        self.name = name
        self.explains_tokens = bool(explains_tokens)  # any other end may have no log-probabilities to give
        self._is_of_ours = explains_tokens is not None
        self.members = (name,)
        self.max_model_len: int | None = config.max_model_len
        self._config = config
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._rng = rng or random.Random()
        self.max_concurrency = config.max_concurrency  # requests at once; more wait
        self.is_out_of_reach = False  # whether the last try found nobody who takes requests
        self._scored_by = 0  # the first way of scoring a text that is worth a try
        self._slots = asyncio.Semaphore(config.max_concurrency)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        key = _api_key(name, config.api_key_env) if config.api_key_env else None
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        url = httpx.URL(config.url)
        self._secrets = Secrets.of(url, key)
        self._address = without_secrets(url)
        self._client = httpx.AsyncClient(
            base_url=f"{self._address.rstrip('/')}/",
            params=url.params,
            auth=(url.username, url.password) if url.userinfo else None,
            headers=headers,
            # Reading is timed below, by events: a server that sends nothing but comments has stalled as well.
            timeout=httpx.Timeout(None, connect=config.connect_timeout_s),
            limits=httpx.Limits(max_connections=config.max_concurrency),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """Choices that the remote end leaves out, or gives without a word, are asked for again as long as others come:
        many ends take no notice of `n`."""
        start = asyncio.get_running_loop().time()
        progress = _Progress(request, None if request.deadline_s is None else start + request.deadline_s)
        self._body(request)  # or it cannot be asked at all
        try:
            async with asyncio.timeout_at(progress.deadline):
                await self._slots.acquire()
        except TimeoutError as exc:
            raise self._too_late(progress) from exc
        try:
            places = list(range(request.n))
            while places:
                num_missing = len(progress.missing)
                try:
                    async with aclosing(self._called(places, progress)) as deltas:
                        async for delta in deltas:
                            yield delta
                except EnsembleError as exc:
                    if len(progress.usages) < 2:
                        raise
                    logger.warning("member %r: asked again for what was missing, in vain: %s", self.name, exc)
                    break
                places = progress.missing
                if len(places) == num_missing or not progress.has_text or not progress.has_time_for(0):
                    break
        finally:
            self._slots.release()
        if not progress.has_text:
            if not progress.is_over and progress.unfinished:
                raise self._too_late(progress)
            raise MemberError(self.name, f"the answer is empty (choice 0 of {request.n})")
        for index in range(request.n):
            if index not in progress.shown:  # all of it came, or all that came in time
                reason, stop = progress.ends.get(index, ("stop" if progress.is_over else "length", None))
                yield Delta(index, finish_reason=reason, stop_reason=stop)
        missing = progress.missing
        if missing:
            logger.warning("member %r: choices %s of %d stayed empty", self.name, missing, request.n)
        told = progress.ensemble.get("trace")
        trace: dict[str, Any] = told if isinstance(told, dict) else {}
        if missing and request.explain:
            trace = trace | {"empty_choices": missing}
        yield Done(self._usage(progress.usages), method="remote", members=self.members, turnout=1, trace=trace or None)

    def _body(self, request: GenerationRequest) -> tuple[str, dict[str, Any]]:
        return request_body(self.name, self._config.model or self.name, request, takes_ensemble=self._is_of_ours)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Nats of every token of a text but the first, as the remote end scores them.

        Raises `UnsupportedError` where it gives no log-probabilities of a text that is given, or of other tokens.
        """
        refusal = "its answers have no log-probabilities of their prompts"
        async with self._slots:
            for body in scoring_bodies(self._config.model or self.name, token_ids)[self._scored_by :]:
                progress = _Progress(GenerationRequest(prompt=tuple(token_ids)), None)
                try:
                    response = await self._connect("completions", body, progress)
                except MemberError as exc:
                    refusal = str(exc)
                    if not isinstance(exc, MemberTimeoutError) and not self.is_out_of_reach:
                        self._scored_by = 1  # the other way is tried from now on
                        continue
                    raise
                scored = await self._scored(response)
                if (found := scored.choices[0].of_prompt(token_ids)) is not None:
                    return found
                self._scored_by = 1
        raise UnsupportedError(
            f"model {self.name!r}: its remote end does not score these tokens ({refusal}); is `tokenizer` its own?"
        )

    async def _scored(self, response: httpx.Response) -> Scored:
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._config.timeout_s),
                aclosing(pieces_of(response, MAX_STREAM_BYTES)) as pieces,
            ):
                async for piece in pieces:
                    body += piece
            return read_whole(Scored, body.decode("utf-8-sig"))
        except TimeoutError as exc:
            reason = f"no whole answer within timeout_s = {self._config.timeout_s:g} s"
            raise MemberTimeoutError(self.name, reason) from exc
        except httpx.RequestError as exc:
            raise self._failed(f"the connection broke off: {_words(exc)}") from exc
        except ValueError as exc:
            raise self._failed(f"malformed answer: {exc}") from exc
        finally:
            await response.aclose()

    def _too_late(self, progress: _Progress) -> DeadlineError:
        return DeadlineError(f"member {self.name!r}: no answer within {progress.request.deadline_s:g} s")

    def _failed(self, reason: str) -> MemberError:
        return MemberError(self.name, self._shown(reason))

    def _shown(self, said: str) -> str:
        """What a remote end says, without secrets, and then no more than people read: a secret that is cut is one."""
        said = self._secrets.blank(said)
        return said if len(said) <= MAX_MESSAGE_CHARS else f"{said[: MAX_MESSAGE_CHARS - 1]}…"

    def _usage(self, usages: Sequence[ChunkUsage]) -> Usage:
        num_read = sum(usage.prompt_tokens or 0 for usage in usages)
        num_written = sum(usage.completion_tokens or 0 for usage in usages)
        num_reasoning = sum(usage.reasoning_tokens for usage in usages)
        cost = (
            num_read * self._config.prompt_price_per_million + num_written * self._config.completion_price_per_million
        ) / 1e6
        used = MemberUsage(num_read, num_written, cost, num_reasoning)
        return Usage(num_read, num_written, {self.name: used}, num_reasoning)

    async def _called(self, places: Sequence[int], progress: _Progress) -> AsyncGenerator[Delta]:
        """What one call for the choices `places` gives."""
        request, num_before = progress.request, len(progress.usages)
        seed = request.sampling.seed
        if num_before and seed is not None:  # the same seed would give the same again
            seed = (seed + num_before) % 2**31
        asked = replace(request, n=len(places), sampling=replace(request.sampling, seed=seed))
        path, body = self._body(asked)
        call, progress.is_over = _Call(places, self._secrets), False
        progress.usages.append(call.usage)
        response = await self._connect(path, body, progress)
        try:
            async with aclosing(self._deltas(response, call, progress)) as deltas:
                async for delta in deltas:
                    yield delta
            for delta in self._held_back(call, progress):
                yield delta
        finally:
            progress.usages[num_before] = call.usage
            await response.aclose()

    # --- getting through ------------------------------------------------------------------------------------------

    async def _connect(self, path: str, body: dict[str, Any], progress: _Progress) -> httpx.Response:
        """An open response of status 200, after as many tries as the config and the deadline allow."""
        content = orjson.dumps(body)
        for num_tries in range(1, self._config.max_retries + 2):
            asked_wait_s = None
            cause: Exception | None = None
            try:
                response, body_of_error = await self._send(path, content, progress)
            except httpx.TransportError as exc:
                cause = exc
                failure = f"cannot be reached ({type(exc).__name__})"
                self.is_out_of_reach = True
                detail = self._secrets.blank(_words(exc))
                logger.warning("member %r: cannot reach %s: %s", self.name, self._address, detail)
            else:
                self.is_out_of_reach = response.status_code in _TAKES_NO_REQUESTS
                if response.status_code == HTTPStatus.OK:
                    return response
                failure = self._refusal(response, body_of_error)
                asked_wait_s = parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
            wait_s = self._backoff.delay_s(num_tries, self._rng.random(), asked_wait_s)
            is_last = num_tries > self._config.max_retries or wait_s > self._config.timeout_s
            if is_last or not progress.has_time_for(wait_s):
                tries = "1 try" if num_tries == 1 else f"{num_tries} tries"
                raise self._failed(f"{failure} (after {tries})") from cause
            logger.info("member %r: try %d failed: %s; again in %.2f s", self.name, num_tries, failure, wait_s)
            await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _send(self, path: str, content: bytes, progress: _Progress) -> tuple[httpx.Response, bytes]:
        """One try. A response of status 200 comes back open, any other one closed and with its body's beginning."""
        try:
            async with progress.until(asyncio.get_running_loop().time() + self._config.timeout_s):
                request = self._client.build_request("POST", path, content=content)
                response = await self._client.send(request, stream=True)
                if response.status_code == HTTPStatus.OK:
                    return response, b""
                try:
                    return response, await beginning_of(response, MAX_ERROR_BYTES)
                finally:
                    await response.aclose()
        except TimeoutError as exc:
            if not progress.has_time_for(0):
                raise self._too_late(progress) from exc
            self.is_out_of_reach = True
            raise MemberTimeoutError(self.name, f"no response within timeout_s = {self._config.timeout_s:g} s") from exc

    def _refusal(self, response: httpx.Response, body: bytes) -> str:
        """What the remote end says, if it is worth another try; raised if it is not."""
        status = response.status_code
        message, code = parse_error_body(body)
        message = self._shown(message)
        if status == HTTPStatus.BAD_REQUEST and is_about_context(message, code):
            raise ContextLengthError(f"member {self.name!r}: the remote end refused: {message}", param="messages")
        failure = f"the remote end answered {status}: {message}"
        if not is_worth_retrying(status):
            raise MemberError(self.name, failure)
        return failure

    # --- reading --------------------------------------------------------------------------------------------------

    async def _deltas(self, response: httpx.Response, call: _Call, progress: _Progress) -> AsyncGenerator[Delta]:
        """The answer up to its end or to the deadline. Raises `MemberError` if it breaks off or makes no sense."""
        try:
            async with aclosing(self._chunks(response, progress)) as chunks:
                async for chunk in chunks:
                    if chunk.error is not None:
                        raise self._failed(f"the remote end failed: {error_message(chunk.error)[0]}")
                    call.usage = chunk.usage or call.usage
                    if self._is_of_ours and isinstance(chunk.ensemble, dict):
                        progress.ensemble = chunk.ensemble
                    for choice in chunk.choices or ():
                        if (delta := self._delta(choice, call, progress)) is not None:
                            yield delta
        except TimeoutError as exc:
            if progress.has_time_for(0) and progress.is_incomplete:
                reason = f"stalled: nothing came for timeout_s = {self._config.timeout_s:g} s"
                raise MemberTimeoutError(self.name, reason) from exc
            return  # the deadline, or a remote end that does not close its streams
        except httpx.RequestError as exc:
            raise self._failed(f"the connection broke off: {_words(exc)}") from exc
        except ValidationError as exc:
            finding = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in finding["loc"])
            raise self._failed(f"malformed answer: {where + ': ' if where else ''}{finding['msg']}") from exc
        except EnsembleError:
            raise
        except ValueError as exc:  # no UTF-8, too long, packed wrongly, logprobs that do not fit their tokens
            raise self._failed(f"malformed answer: {exc}") from exc
        if progress.is_incomplete and not progress.is_over:
            raise MemberError(self.name, "the stream ended before the answer did")

    def _delta(self, choice: ChunkChoice, call: _Call, progress: _Progress) -> Delta | None:
        if choice.index >= len(call.places):
            raise MemberError(self.name, f"malformed answer: choice {choice.index} was not asked for")
        index, text, tokens = call.places[choice.index], choice.said.content or "", ()
        if index in progress.shown:
            return None
        if progress.request.top_logprobs is not None:
            tokens = choice.logprobs.read() if choice.logprobs is not None else ()
            if text and not tokens and not progress.has_text:
                raise UnsupportedError(f"model {self.name!r}: its remote end gives no logprobs", param="logprobs")
        if choice.finish_reason is not None:
            if choice.finish_reason in FAILED_REASONS:
                raise self._failed(f"the remote end stopped with finish_reason {choice.finish_reason!r}")
            stop_reason = choice.stop_reason
            stop_reason = self._secrets.blank(stop_reason) if isinstance(stop_reason, str) else stop_reason
            progress.ends[index] = FINISH_REASONS.get(choice.finish_reason, "stop"), stop_reason
        is_last = index in progress.ends
        reasoning = choice.said.reasoning_content or choice.said.reasoning or ""
        text, tokens, reasoning = call.add(choice.index, text, tokens, reasoning, is_last=is_last)
        calls = call.tool_calls(choice.index, choice.said.tool_calls or (), is_last=is_last)
        if text or calls:
            progress.has_text.add(index)
        if reasoning:
            progress.has_reasoning.add(index)
        if is_last and index in progress.has_text:
            progress.shown.add(index)
            reason, stop = progress.ends[index]
            shown = Delta(index, text, tokens=tokens, reasoning=reasoning, calls=calls)
            return replace(shown, finish_reason=reason, stop_reason=stop)
        if not (text or tokens or reasoning or calls):
            return None
        return Delta(index, text, tokens=tokens, reasoning=reasoning, calls=calls)

    def _held_back(self, call: _Call, progress: _Progress) -> Iterator[Delta]:
        """What was held back of choices of which the remote end has not said that they ended."""
        for choice, index in enumerate(call.places):
            if index in progress.ends:
                continue
            text, tokens, reasoning = call.add(choice, "", (), "", is_last=True)
            calls = call.tool_calls(choice, (), is_last=True)
            if text or calls:
                progress.has_text.add(index)
            if text or tokens or reasoning or calls:
                yield Delta(index, text, tokens=tokens, reasoning=reasoning, calls=calls)

    async def _chunks(self, response: httpx.Response, progress: _Progress) -> AsyncGenerator[Chunk]:
        """The events of the stream. Raises `TimeoutError` at the deadline, or if none comes for `timeout_s`."""
        loop = asyncio.get_running_loop()
        kind = response.headers.get("Content-Type", "")
        is_stream: bool | None = None  # until enough is there to tell
        decoder, whole = EventDecoder(), bytearray()
        stalls_at = loop.time() + self._config.timeout_s
        async with aclosing(pieces_of(response, MAX_STREAM_BYTES)) as pieces:
            while True:
                async with progress.until(stalls_at):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                if not is_stream:
                    whole += piece
                    if len(whole) > MAX_ANSWER_BYTES and is_stream is False:
                        raise ValueError(f"it is longer than {MAX_ANSWER_BYTES} bytes")
                    if is_stream is None and len(whole) >= NUM_TELLING_BYTES:
                        is_stream = _is_stream(kind, bytes(whole[:NUM_TELLING_BYTES]))
                    if not is_stream:
                        continue
                    piece = bytes(whole)
                for data in decoder.feed(piece):
                    stalls_at = loop.time() + self._config.timeout_s
                    if data.strip() == "[DONE]":
                        progress.is_over = True
                        return
                    yield read_whole(Chunk, data)
        if is_stream is None:
            is_stream = _is_stream(kind, bytes(whole))
        if not is_stream:  # the remote end does not stream: the whole answer is one chunk
            progress.is_over = True
            yield read_whole(Chunk, whole.decode("utf-8-sig"))


def _is_stream(content_type: str, beginning: bytes) -> bool:
    """Whether a body that begins so is a stream of events: as it looks, or else as it is called."""
    beginning = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if beginning.startswith(b"{"):
        return False
    return beginning.startswith(_FIELDS_OF_EVENTS) or content_type.lower().startswith("text/event-stream")


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
