"""The embedded engine as its callers see it: requests are read in every member's terms, handed to the thread that
steps through all of them (`step_loop`), and come back as events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from ensemble_server.ensembles.base import AveragedOver, Done, Event, GenerationRequest, Message, Mixture
from ensemble_server.ensembles.errors import ContextLengthError, ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.spelling.given_text import Watch
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.shared import grammar
from ensemble_server.server.engines.shared.reading import RequestReader, check_templates
from ensemble_server.server.engines.shared.token_checks import check_ids
from ensemble_server.server.engines.shared.tool_use import ToolUse
from ensemble_server.server.engines.transformers_engine.byte_generation import READ_PER_PIECE, ByteGeneration
from ensemble_server.server.engines.transformers_engine.byte_request import byte_views, check_request, check_spelled
from ensemble_server.server.engines.transformers_engine.byte_visit import ByteVisit
from ensemble_server.server.engines.transformers_engine.family import as_family, check_shared_ids
from ensemble_server.server.engines.transformers_engine.generation import Generation
from ensemble_server.server.engines.transformers_engine.given_reading import begun
from ensemble_server.server.engines.transformers_engine.kv_budget import KvBudget, default_bytes
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import PrefixCache
from ensemble_server.server.engines.transformers_engine.scheduler import Scheduler
from ensemble_server.server.engines.transformers_engine.spare_time import SpareTime
from ensemble_server.server.engines.transformers_engine.speculation import Speculation
from ensemble_server.server.engines.transformers_engine.step_loop import StepLoop
from ensemble_server.server.engines.transformers_engine.text_drafts import TextDrafts
from ensemble_server.server.engines.transformers_engine.visit import Visit, Visitor
from ensemble_server.server.weights.spelled_vocabulary import averaged_over
from ensemble_server.server.weights.thinking import are_told_apart

logger = logging.getLogger(__name__)

Drafts = Literal["off", "text", "member"]


class TransformersEngine:
    """See `ensembles.base.MixtureHost`. `max_batch`: choices that run at once; `max_queue`: requests that may wait.

    `prefix_cache_bytes`: bound of what is kept of prompts that were read, for prompts that begin alike; 0 is off.
    `kv_cache_bytes`: bound of the caches of all that runs (see `kv_budget`); by default most of what is free. Raises
    `ModelLoadError` if one member could not read a word in it.
    `drafts`: where choices take from what their members read ahead; members of different vocabularies never do.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        *,
        max_batch: int = 32,
        prefill_chunk: int = 512,
        max_queue: int = 256,
        prefix_cache_bytes: int = 512 * 2**20,
        kv_cache_bytes: int | None = None,
        num_threads: int | None = None,
        drafts: Drafts = "off",
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        self._members = members
        self._families: dict[tuple[str, ...], Sequence[Member]] = {}
        self._averaged_over: dict[tuple[tuple[str, ...], str, bool, bool], AveragedOver] = {}
        devices = frozenset(member.backbone.device for member in members.values())
        if kv_cache_bytes is None:
            kv_cache_bytes = default_bytes(map(str, devices), prefix_cache_bytes)
        self._kv_budget = KvBudget(kv_cache_bytes)
        self._kv_budget.check_members(members.values())
        self._scheduler = Scheduler(
            self._kv_budget, max_batch=max_batch, prefill_chunk=prefill_chunk, max_queue=max_queue
        )
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._drafts: Drafts = drafts
        backbones = {member.backbone: None for member in members.values()}  # a set that keeps their order
        self._loop = StepLoop(
            self._scheduler,
            self._prefixes,
            devices,
            SpareTime(backbone.halving() for backbone in backbones),
            speculation=Speculation(members_write=drafts == "member"),
            num_threads=num_threads,
            on_step=on_step,
        )
        self._reader = RequestReader(always_writes=False)

    @property
    def failure(self) -> str | None:
        return self._loop.failure

    @property
    def num_restarts(self) -> int:
        return 0

    @property
    def down(self) -> frozenset[str]:
        return frozenset() if self._loop.failure is None else frozenset(self._members)

    def start(self) -> None:
        """Also builds what structured output needs of every tokenizer: that holds up the whole process, for a second
        where vocabularies are large, so not when the first client asks for it."""
        for member in self._members.values():
            with suppress(UnsupportedError):  # a tokenizer that cannot be followed; requests are told
                grammar.prepared(member.surface.tokenizer, member.vocab_size, member.eos_ids)
        self._loop.start()

    def stop(self) -> None:
        """End all live generations with `EngineDeadError`. Returns when the running step is over."""
        self._loop.stop()

    def check(self, mixture: Mixture) -> None:
        if strangers := set(mixture.weights) - set(self._members):
            raise ModelLoadError(f"no hosted member is called {min(strangers)!r}")
        self.averages_over(mixture)

    def averages_over(self, mixture: Mixture) -> AveragedOver:
        key = (tuple(mixture.weights), mixture.vocabulary, mixture.when is not None, mixture.gate is not None)
        if key not in self._averaged_over:
            self._averaged_over[key] = averaged_over(mixture, [self._members[name] for name in mixture.weights])
            self._say_what_is_not_drafted(mixture, self._averaged_over[key])
        return self._averaged_over[key]

    def _say_what_is_not_drafted(self, mixture: Mixture, over: AveragedOver) -> None:
        names = ", ".join(mixture.weights)
        if over == "bytes" and self._drafts != "off":
            logger.info("%s are averaged over text: nothing is drafted for them", names)
        elif self._drafts == "member" and len({self._members[name].backbone for name in mixture.weights}) == 1:
            logger.info("%s have the same weights: drafts come from their text, not from a member", names)

    def ends_thoughts(self, mixture: Mixture) -> bool:
        if self.averages_over(mixture) == "tokens":
            return True
        return are_told_apart([self._members[name].surface.thinking for name in mixture.weights])

    def max_model_len(self, mixture: Mixture) -> int:
        return min(self._members[name].max_model_len for name in mixture.weights)

    def _mixed(self, mixture: Mixture) -> Sequence[Member]:
        """The members of a mixture, as they are beside each other. Raises `ModelLoadError` for two vocabularies."""
        names = tuple(mixture.weights)
        if names not in self._families:
            self._families[names] = as_family([self._members[name] for name in names])
        return self._families[names]

    def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]:
        """See `ensembles.base.MixtureHost`. Raises `OverloadedError` when the queue is full."""
        first = self._members.get(next(iter(mixture.weights)))
        tools = ToolUse.of(request, first and first.surface)
        return tools.read(self._generated(mixture, tools.request, method))

    async def _generated(self, mixture: Mixture, request: GenerationRequest, method: str) -> AsyncGenerator[Event]:
        self._loop.check_alive()
        self._scheduler.check_room(request.priority)
        job = await asyncio.to_thread(self._prepare, mixture, request, method, asyncio.get_running_loop())
        self._kv_budget.check(job)
        self._loop.enqueue(job)
        try:
            while True:
                event = await job.inbox.get()
                if isinstance(event, Exception):
                    raise event
                assert event is not None, "a generation ends with `Done`"
                yield event
                if isinstance(event, Done):
                    return
        finally:
            job.is_cancelled = True

    async def visit_logprobs(
        self, members: Sequence[str], token_ids: Sequence[int], visit: Visitor, *, priority: int = 1
    ) -> None:
        """See `ensembles.base.MixtureHost`. `visit` runs on the engine's thread: no other request gets a token
        meanwhile."""
        mixture = Mixture(dict.fromkeys(members, 1.0))
        self.check(mixture)
        asked = self._mixed(mixture)
        limit = self.max_model_len(mixture)
        if len(token_ids) > limit:
            raise ContextLengthError(
                f"the text has {len(token_ids)} tokens; the context of {', '.join(members)} holds {limit}; "
                "read it in windows"
            )
        check_ids(token_ids, asked[0].vocab_size, "token_ids")
        check_shared_ids(token_ids, asked)
        self._loop.check_alive()
        if len(token_ids) < 2:
            return
        job = Visit(asked, list(token_ids), visit, asyncio.get_running_loop(), priority=priority)
        await self._visit(job)

    async def visit_bytes(
        self,
        members: Sequence[str],
        text: str,
        visit: Visitor,
        *,
        after: Sequence[Message] | None = None,
        priority: int = 1,
        watches: Sequence[Watch] | None = None,
    ) -> None:
        """See `ensembles.base.MixtureHost`. `visit` runs on the engine's thread, and so do `watches`, one for each
        member: they are told of its own distributions."""
        self.averages_over(Mixture(dict.fromkeys(members, 1.0), vocabulary="bytes"))
        asked = [self._members[name] for name in members]
        readings = await asyncio.to_thread(self._read_bytes, asked, text, after)
        self._loop.check_alive()
        if not text:
            return
        loop = asyncio.get_running_loop()
        job = ByteVisit(asked, readings, text.encode(), visit, loop, priority=priority, watches=watches)
        await self._visit(job)

    def _read_bytes(
        self, members: Sequence[Member], text: str, after: Sequence[Message] | None
    ) -> list[tuple[list[int], list[int]]]:
        """What stands before the text and the text, in every member's own tokens.

        Raises `ContextLengthError`, and `RequestError` if a member does not read the text byte for byte.
        """
        with self._reader.tokenizing:
            if after is None:
                readings = [begun(member, member.surface.encode(text)) for member in members]
            else:
                check_templates(members)
                readings = [
                    (member.surface.render(after), member.surface.encode(text, add_special_tokens=False))
                    for member in members
                ]
        for member, (head, path) in zip(members, readings, strict=True):
            check_spelled(member, path if after is not None else [*head, *path], text.encode())
            if len(head) + len(path) > member.max_model_len:
                raise ContextLengthError(
                    f"the text has {len(head) + len(path)} tokens as {member.name!r} reads it; its context holds "
                    f"{member.max_model_len}; read it in windows"
                )
        return readings

    async def _visit(self, job: Visit | ByteVisit) -> None:
        """Until all of the text was visited. Raises what ended it sooner."""
        self._kv_budget.check(job)
        self._loop.enqueue(job)
        try:
            if isinstance(error := await job.inbox.get(), Exception):
                raise error
        finally:
            job.is_cancelled = True

    def _prepare(
        self, mixture: Mixture, request: GenerationRequest, method: str, loop: asyncio.AbstractEventLoop
    ) -> Generation:
        """Read the request in every member's terms and check that it can be served. Runs in a worker thread."""
        if self.averages_over(mixture) == "bytes":
            members = [self._members[name] for name in mixture.weights]
            return self._prepare_bytes(mixture, members, request, method, loop)
        if not mixture.heals:
            raise RequestError(
                "heal is for members that are averaged over text; these are averaged over tokens", param="ensemble.heal"
            )
        members = self._mixed(mixture)
        reading = self._reader.read(request, members, max_model_len=self.max_model_len(mixture))
        room = self._kv_budget.room(members, list(map(len, reading.prompts)))
        reading = replace(reading, max_new_tokens=min(reading.max_new_tokens, room))
        structure, first, compiled = request.sampling.grammar, members[0], None
        if structure is not None:
            eos_ids = frozenset().union(*(member.eos_ids for member in members))
            compiled = grammar.compiled(structure, first.surface.tokenizer, first.vocab_size, eos_ids)
        return Generation(
            request,
            mixture,
            members,
            reading,
            method=method,
            grammar=compiled,
            prefixes=self._prefixes,
            loop=loop,
            text_drafts=None if self._drafts == "off" else TextDrafts(reading.prompts[0]),
        )

    def _prepare_bytes(
        self,
        mixture: Mixture,
        members: Sequence[Member],
        request: GenerationRequest,
        method: str,
        loop: asyncio.AbstractEventLoop,
    ) -> ByteGeneration:
        """`_prepare` for members that are averaged over text."""
        check_request(request)
        if request.max_reasoning_tokens is not None and not self.ends_thoughts(mixture):
            raise UnsupportedError(
                "max_reasoning_tokens: where members are averaged over text, the first one's markers tell thoughts "
                f"apart, and {members[0].name!r} does not think as others do; put another first, or ask a member",
                param="max_reasoning_tokens",
            )
        views = byte_views(members, request, heals=mixture.heals, tokenizing=self._reader.tokenizing)
        room = _room(members, [view.token_ids for view in views], request)
        lengths = [len(view.token_ids) for view in views]
        room = min(room, self._kv_budget.room(members, lengths, read_per_token=READ_PER_PIECE))
        structure, wanted = request.sampling.grammar, request.sampling.max_tokens
        return ByteGeneration(
            request,
            mixture,
            members,
            views,
            method=method,
            max_new_tokens=room if wanted is None else min(wanted, room),
            grammar=None if structure is None else grammar.compiled_by_bytes(structure),
            prefixes=self._prefixes,
            loop=loop,
        )


def _room(members: Sequence[Member], prompts: Sequence[Sequence[int]], request: GenerationRequest) -> int:
    """How many tokens fit behind the prompt, whoever reads it. Raises `ContextLengthError` if none does."""
    views = zip(members, prompts, strict=True)
    member, ids = min(views, key=lambda view: view[0].max_model_len - len(view[1]))
    room, length = member.max_model_len - len(ids), len(ids)
    if room < 0 or (room == 0 and request.sampling.max_tokens != 0):
        raise ContextLengthError(
            f"the prompt has {length} tokens as {member.name!r} reads it; its context holds {member.max_model_len}, "
            "prompt and answer together",
            param="messages" if request.messages is not None else "prompt",
        )
    return room
