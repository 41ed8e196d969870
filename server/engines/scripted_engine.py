"""A model that says what it was told to, when it was told to, and fails where it was told to.

For tests of what cannot be summoned from real models: answers that stall, die at token 7, come late or out of order, or
are empty. It computes nothing: every token of a script has the same log-probability, and stop strings and grammars are
not looked at. It ships with the package, as httpx's mock transport does, so that methods written elsewhere can be
tested with it too.

    ScriptedModel("slow", Script(("Hel", "lo"), delay_s=0.1))
    ScriptedModel("dies", Script(("a", "b", "c"), fails_at=2))
    ScriptedModel("echo", lambda request, index: Script((request.messages[-1]["content"],)))
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    FinishReason,
    GenerationRequest,
    MemberToken,
    MemberUsage,
    PromptScored,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.engines.shared.tool_use import ToolUse

if TYPE_CHECKING:
    from ensemble_server.server.weights.view import Surface

LOGPROB = math.log(0.5)  # of every scripted token; alternative k has 0.5 ** (k + 1)


@dataclass(frozen=True)
class Script:
    """What one choice says. Each piece counts as one token; places in it count from 0. Pieces of calls are what a model
    says that has its calls apart; calls in texts are read as the surface's template has them.

    `delay_s`: before each piece. `start_delay_s`: before the first, on top. `fails_at`: `error` is raised (a
    `MemberError` if it is None) in place of this piece. `stalls_at`: nothing comes any more from this piece on, until
    the reader leaves.
    """

    pieces: tuple[str | ToolCallDelta, ...] = ()
    delay_s: float = 0.0
    start_delay_s: float = 0.0
    fails_at: int | None = None
    error: Exception | None = None
    stalls_at: int | None = None
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True)
class _Step:
    """At `due_s` seconds: a delta, an error, or (neither) silence for ever."""

    due_s: float
    delta: Delta | None = None
    error: Exception | None = None


ScriptOf = Callable[[GenerationRequest, int], Script]  # (request, index of the choice) -> its script


class ScriptedModel:
    """An `ensembles.base.Model`. `script`: the same for every choice, or a function that writes one for each.

    With a `surface` prompts are read, and pieces have its token ids; without one ids count up from 0.
    `requests` holds all that was asked, `num_live` the generations that have not ended: 0 once a reader that left has
    been noticed.
    """

    explains_tokens = True
    fan_out = 1

    def __init__(
        self,
        name: str,
        script: Script | ScriptOf,
        *,
        surface: Surface | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self.name = name
        self.members = (name,)
        self.max_model_len = max_model_len
        self.requests: list[GenerationRequest] = []
        self.num_live = 0
        self._script_of = (lambda request, index: script) if isinstance(script, Script) else script
        self._surface = surface

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        tools = ToolUse.of(request, self._surface)
        return tools.read(self._generated(tools.request))

    async def _generated(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.requests.append(request)
        self.num_live += 1
        try:
            prompt = self._read(request)
            if prompt is not None:
                yield prompt
            start_s = asyncio.get_running_loop().time()
            num_tokens = 0
            for step in self._steps(request):
                await asyncio.sleep(start_s + step.due_s - asyncio.get_running_loop().time())
                if step.error is not None:
                    raise step.error
                if step.delta is None:
                    await asyncio.Event().wait()
                assert step.delta is not None, "silence has no end"
                num_tokens += len(step.delta.token_ids)
                yield step.delta
            used = MemberUsage(len(prompt.token_ids) if prompt is not None else 0, num_tokens)
            usage = Usage(used.prompt_tokens, used.completion_tokens, {self.name: used})
            yield Done(usage, method="scripted", members=self.members, turnout=1)
        finally:
            self.num_live -= 1

    def _steps(self, request: GenerationRequest) -> list[_Step]:
        """All that happens to a request's choices, in the order in which it does."""
        steps = [
            step
            for index in range(request.n)
            for step in self._steps_of_choice(request, index, self._script_of(request, index))
        ]
        return sorted(steps, key=lambda step: step.due_s)

    def _steps_of_choice(self, request: GenerationRequest, index: int, script: Script) -> Iterator[_Step]:
        pieces = script.pieces[: request.sampling.max_tokens]
        finish_reason = script.finish_reason if len(pieces) == len(script.pieces) else "length"
        ends = [place for place in (script.fails_at, script.stalls_at) if place is not None and place <= len(pieces)]
        last = min(ends) if ends else len(pieces) - 1  # the last step: an end, or the last piece

        def due_s(place: int) -> float:
            return script.start_delay_s + (place + 1) * script.delay_s

        for place, piece in enumerate(pieces[:last] if ends else pieces):
            text, calls = (piece, ()) if isinstance(piece, str) else ("", (piece,))
            token_id = self._token_id(text, place)
            tokens = (self._token(token_id, text, request, request.top_logprobs),)
            tokens = tokens if request.top_logprobs is not None else ()
            reason = finish_reason if place == last else None
            yield _Step(due_s(place), Delta(index, text, (token_id,), tokens, finish_reason=reason, calls=calls))
        if not ends and not pieces:
            yield _Step(due_s(0), Delta(index, finish_reason=finish_reason))
        elif ends:
            fails = last == script.fails_at
            error = script.error or MemberError(self.name, f"scripted to fail at token {last}")
            yield _Step(due_s(last), error=error if fails else None)

    def _token(self, token_id: int, text: str, request: GenerationRequest, num_top: int | None) -> TokenLogprob:
        top = tuple(
            TokenLogprob(token_id + rank, f"{text}{rank or ''}", f"{text}{rank or ''}".encode(), (rank + 1) * LOGPROB)
            for rank in range(num_top or 0)
        )
        explained = {"members": {self.name: MemberToken(LOGPROB, 1.0)}, "entropy": math.log(2), "disagreement": 0.0}
        return TokenLogprob(token_id, text, text.encode(), LOGPROB, top, **(explained if request.explain else {}))

    def _token_id(self, piece: str, place: int) -> int:
        if self._surface is None:
            return place
        return next(iter(self._surface.encode(piece, add_special_tokens=False)), 0)

    def _read(self, request: GenerationRequest) -> PromptScored | None:
        if self._surface is None:
            return None
        if request.messages is not None:
            token_ids = self._surface.render(
                request.messages, tools=request.tools, template_kwargs=request.told_template
            )
        elif isinstance(request.prompt, str):
            token_ids = self._surface.encode(request.prompt)
        else:
            token_ids = list(request.prompt or ())
        scored = token_ids if request.prompt_logprobs is not None else []
        return PromptScored(tuple(token_ids), tuple(self._prompt_token(request, *item) for item in enumerate(scored)))

    def _prompt_token(self, request: GenerationRequest, place: int, token_id: int) -> TokenLogprob:
        assert self._surface is not None, "only a surface reads prompts"
        text = self._surface.decode([token_id])
        if place:
            return self._token(token_id, text, request, request.prompt_logprobs)
        return TokenLogprob(token_id, text, self._surface.bytes_of(token_id), None)
