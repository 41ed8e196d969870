"""Exchange-of-Thought: participants solve a problem, read each other's solutions, and solve it again, until they agree.

    round 0: everyone answers the request.
    round r: everyone reads its own last solution and those of the peers that it hears, from round 2 on with their
             confidence, and answers anew. All calls of a round run at the same time.

Who hears whom is the topology, see `ensembles.exchange.topologies`. When it stops, what the answer is, and whose text
is the reply are pure functions of the transcript, see `ensembles.exchange.agreement`.

When it helps: problems with one short answer that takes reasoning, for participants that differ (models, personas, or a
temperature) and that are good enough to judge a solution which they read; weak models copy each other's mistakes. Cost:
n calls if round 0 agrees, at most n (1 + max_rounds), with prompts that hold the solutions heard. Needs: any models.

Related: majority, which asks without exchange; answer_fusion, where one model reads all and writes.

Reference: Yin et al., "Exchange-of-Thought", 2023, https://arxiv.org/abs/2312.01823
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ensemble_server.ensembles.base import Choice, Delta, Done, Event, GenerationRequest, Usage
from ensemble_server.ensembles.exchange.agreement import judge, merge_alike, tokens_left
from ensemble_server.ensembles.exchange.prompts import (
    UNFINISHED,
    Peer,
    exchange_prompt,
    round_messages,
    round_text,
    with_persona,
)
from ensemble_server.ensembles.exchange.topologies import TopologyName, who_hears_whom
from ensemble_server.ensembles.exchange.transcript import (
    FinalRule,
    Participant,
    Reply,
    Round,
    Settings,
    State,
    StopRule,
    Transcript,
    minutes,
)
from ensemble_server.ensembles.fan_out import Call, Outcome, fan_out, total_usage
from ensemble_server.ensembles.text_level import EmbeddingNeed, TextLevel, TextLevelConfig, as_delta, member_request
from ensemble_server.ensembles.thoughts import without_thoughts
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind, extract
from ensemble_server.ensembles.voting.similarity import cosine_similarity
from ensemble_server.ensembles.voting.tool_calls import called

Number = TypeVar("Number", int, float)


class Role(BaseModel):
    """One entry under `participants`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="name of the model that speaks")
    persona: str | None = Field(default=None, min_length=1, description="system prompt")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="of its vote")


class ExchangeOfThought(TextLevel):
    reference: ClassVar[str] = "https://arxiv.org/abs/2312.01823"
    overridable = (
        "weights",
        "topology",
        "max_rounds",
        "answer",
        "text_threshold",
        "stop",
        "final",
        "token_budget",
        "time_budget_s",
        "temperature",
        "min_turnout",
    )

    class Config(TextLevelConfig):
        participants: dict[str, Role] | None = Field(
            default=None,
            description="instead of members: a map from names to {model, persona, weight}; models may repeat",
        )
        topology: TopologyName | dict[str, tuple[str, ...]] = Field(
            default="memory", description="memory | report | relay | debate, or a map from names to the names they hear"
        )
        max_rounds: int = Field(default=5, ge=1, le=20, description="exchanges after everyone's own answer")
        answer: AnswerKind = Field(default="text", description="what is compared: number | choice | yes_no | text")
        text_threshold: float | None = Field(
            default=None,
            gt=0,
            le=1,
            description="cosine from which two text answers are the same; null: if they are equal but for spelling",
        )
        stop: tuple[StopRule, ...] = Field(
            ("unanimity",), description="unanimity | majority | repeat, several of them, or never"
        )
        final: FinalRule = Field(
            default="confidence", description="votes are weighted by confidence, or count alike: plurality"
        )
        token_budget: int | None = Field(
            default=None, ge=1, description="tokens that all may write together; null: no limit"
        )
        time_budget_s: float | None = Field(
            default=None, gt=0, allow_inf_nan=False, description="seconds for all rounds; null: no limit"
        )
        temperature: float | None = Field(
            default=None, ge=0, le=2, description="of the participants' sampling; null takes the request's"
        )

        @model_validator(mode="before")
        @classmethod
        def _members_are_the_participants_models(cls, data: Any) -> Any:
            if not isinstance(data, dict) or not isinstance(data.get("participants"), dict):
                return data
            roles = data["participants"].values()
            models = [role.get("model") for role in roles if isinstance(role, dict)]
            members = dict.fromkeys((model for model in models if isinstance(model, str)), 1.0)
            if data.get("members") not in (None, members):
                raise ValueError("give either `members` or `participants`; weights of participants are theirs")
            return {**data, "members": members or data.get("members")}

        @field_validator("members")
        @classmethod
        def _weights_can_be_votes(cls, members: dict[str, float]) -> dict[str, float]:
            for name, weight in members.items():
                if weight < 0:
                    raise ValueError(f"an exchange takes no negative weight; {name!r} has {weight:g}")
            return members

        @field_validator("stop", mode="before")
        @classmethod
        def _one_rule_or_never(cls, stop: Any) -> Any:
            """ "majority" -> ["majority"]; "never" -> []"""
            if stop == "never":
                return ()
            return (stop,) if isinstance(stop, str) else stop

        @model_validator(mode="after")
        def _turnout_can_be_met(self) -> ExchangeOfThought.Config:
            if self.min_turnout > len(self.cast()):
                raise ValueError(f"min_turnout is {self.min_turnout}, but there are {len(self.cast())} participants")
            return self

        @model_validator(mode="after")
        def _fits_together(self) -> ExchangeOfThought.Config:
            if len(self.cast()) < 2:
                raise ValueError(f"an exchange needs at least two participants, got {len(self.cast())}")
            if self.text_threshold is not None and self.answer != "text":
                raise ValueError(f"text_threshold compares text answers, but answer is {self.answer!r}")
            if self.token_budget is not None and self.token_budget < len(self.cast()):
                raise ValueError(f"token_budget is {self.token_budget}, which is not one token for each participant")
            who_hears_whom(self.topology, [participant.name for participant in self.cast()])
            return self

        def cast(self) -> tuple[Participant, ...]:
            """Everyone who takes part. Members of weight zero do not."""
            if self.participants is None:
                weights = self.members.items()
                return tuple(Participant(name=name, model=name, weight=weight) for name, weight in weights if weight)
            return tuple(Participant(name=name, **role.model_dump()) for name, role in self.participants.items())

        def num_calls(self, calls: Mapping[str, int]) -> int:
            return (1 + self.max_rounds) * sum(calls[participant.model] for participant in self.cast())

        def embedding_need(self) -> EmbeddingNeed | None:
            if self.text_threshold is None:
                return None
            return EmbeddingNeed("text_threshold", "text_threshold", "leave text_threshold out")

        def settings(self, request: GenerationRequest) -> Settings:
            """What the exchange on `request` goes by."""
            cast = self.cast()
            names = [participant.name for participant in cast]
            hears = who_hears_whom(self.topology, names)
            limits = [limit for limit in (self.time_budget_s, request.deadline_s) if limit is not None]
            return Settings(
                participants=cast,
                topology=self.topology if isinstance(self.topology, str) else None,
                hears={name: tuple(names[other] for other in heard) for name, heard in zip(names, hears, strict=True)},
                answer=self.answer,
                text_threshold=self.text_threshold,
                max_rounds=self.max_rounds,
                stop=self.stop,
                final=self.final,
                token_budget=self.token_budget,
                time_budget_s=min(limits, default=None),
            )

    config: Config

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        exchange = _Exchange(config.settings(request))
        usages: list[Usage] = []
        while not exchange.is_over:
            outcomes = await fan_out(
                self._calls(exchange, config, request),
                ensemble=self.name,
                min_turnout=0 if exchange.rounds else config.min_turnout,
                deadline_s=exchange.deadline_s(config.member_timeout_s),
            )
            usages += [outcome.usage for outcome in outcomes]
            exchange.take(await self._round(exchange, outcomes))
            yield Delta(0, reasoning=minutes(len(exchange.rounds) - 1, exchange.rounds[-1], exchange.states[-1]))
        reply = exchange.latest(exchange.states[-1].spokesperson)
        assert reply is not None, "the spokesperson has spoken"
        yield as_delta(Choice(0, reply.text, finish_reason=reply.finish_reason, calls=list(reply.calls)))
        yield Done(
            total_usage(usages),
            config.method,
            exchange.settings.names,
            turnout=len(exchange.states[-1].confidence),
            trace=exchange.transcript().model_dump(mode="json") if request.explain else None,
        )

    def _calls(self, exchange: _Exchange, config: Config, request: GenerationRequest) -> list[Call]:
        """The calls of the next round, one for each participant that still speaks."""
        number = len(exchange.rounds)
        tokens = tokens_left(exchange.settings, exchange.rounds)
        calls = []
        for participant in exchange.settings.participants:
            if participant.name not in exchange.speaking:
                continue
            asked = member_request(request, participant.name, number, temperature=config.temperature)
            if tokens is not None:
                share = tokens // len(exchange.speaking)
                asked = replace(
                    asked, sampling=replace(asked.sampling, max_tokens=_least(share, asked.sampling.max_tokens))
                )
            asked = _told(asked, participant, exchange)
            calls.append(Call(participant.name, self.models[participant.model], asked, number))
        return calls

    async def _round(self, exchange: _Exchange, outcomes: list[Outcome]) -> Round:
        """What was said, with the answers found in it."""
        choices = {outcome.call.member: outcome.answer.choices[0] for outcome in outcomes if outcome.answer is not None}
        answers = {
            name: extract(choice.text, exchange.settings.answer) for name, choice in choices.items() if not choice.calls
        }
        if (threshold := exchange.settings.text_threshold) is not None:
            answers = await self._merged(exchange, answers, threshold)
        answers |= {name: called(choice) for name, choice in choices.items() if choice.calls}
        return Round(
            replies={
                outcome.call.member: Reply(
                    text=outcome.answer.text,
                    answer=answers[outcome.call.member],
                    calls=tuple(outcome.answer.choices[0].calls),
                    finish_reason=outcome.answer.choices[0].finish_reason,
                    trace=outcome.answer.done.trace,
                )
                for outcome in outcomes
                if outcome.answer is not None
            },
            silent={outcome.call.member: outcome.reason for outcome in outcomes if outcome.reason is not None},
            num_tokens=sum(outcome.usage.completion_tokens for outcome in outcomes),
            elapsed_s=exchange.elapsed_s,
        )

    async def _merged(
        self, exchange: _Exchange, answers: Mapping[str, str | None], threshold: float
    ) -> dict[str, str | None]:
        """The answers, each in the spelling of the first one said in this exchange that is alike."""
        known = [reply.answer for round_ in exchange.rounds for reply in round_.replies.values() if not reply.calls]
        texts = list(dict.fromkeys(answer for answer in (*known, *answers.values()) if answer is not None))
        if not texts:
            return dict(answers)
        similarity = cosine_similarity(texts, await self.embedder.embed(texts))
        spelling = dict(zip(texts, merge_alike(texts, similarity, threshold), strict=True))
        return {name: None if answer is None else spelling[answer] for name, answer in answers.items()}


class _Exchange:
    """One exchange on its way: the transcript as it grows, and the clock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rounds: list[Round] = []
        self.states: list[State] = []
        self._clock = asyncio.get_running_loop().time
        self._start = self._clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    @property
    def speaking(self) -> tuple[str, ...]:
        """Who speaks in the next round."""
        return self.states[-1].speaking if self.states else self.settings.names

    @property
    def is_over(self) -> bool:
        return bool(self.states) and self.states[-1].stop is not None

    def deadline_s(self, member_timeout_s: float | None) -> float | None:
        """Seconds for the next round: what is left of all, at most `member_timeout_s`."""
        if self.settings.time_budget_s is None:
            return member_timeout_s
        return _least(max(self.settings.time_budget_s - self.elapsed_s, 1e-3), member_timeout_s)

    def take(self, round_: Round) -> None:
        self.rounds.append(round_)
        self.states.append(judge(self.settings, self.rounds))

    def latest(self, name: str) -> Reply | None:
        """What `name` said last."""
        return next((round_.replies[name] for round_ in reversed(self.rounds) if name in round_.replies), None)

    def transcript(self) -> Transcript:
        return Transcript(settings=self.settings, rounds=tuple(self.rounds), states=tuple(self.states))


def _told(request: GenerationRequest, participant: Participant, exchange: _Exchange) -> GenerationRequest:
    """`request` with the participant's persona and, after round 0, what it reads."""
    messages, prompt = request.messages, request.prompt
    if exchange.rounds:
        confidence = exchange.states[-1].confidence if len(exchange.rounds) > 1 else {}
        peers = [
            Peer(name, solution, confidence.get(name))
            for name in exchange.settings.hears[participant.name]
            if (reply := exchange.latest(name)) is not None and (solution := without_thoughts(reply.said)).strip()
        ]
        read = exchange_prompt(peers, exchange.settings.answer)
        last = exchange.latest(participant.name)
        assert last is not None, "whoever fell silent is not asked again"
        own = without_thoughts(last.said) or UNFINISHED
        if messages is not None:
            messages = round_messages(messages, own, read)
        else:
            assert isinstance(prompt, str), "methods of texts take no token ids"
            prompt = round_text(prompt, own, read)
    if messages is not None:
        return replace(request, messages=with_persona(messages, participant.persona))
    return replace(request, prompt=prompt if participant.persona is None else f"{participant.persona}\n\n{prompt}")


def _least(limit: Number, other: Number | None) -> Number:
    return limit if other is None else min(limit, other)
