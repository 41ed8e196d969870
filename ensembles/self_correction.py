"""Self-correction: one model answers, checks its own answer, and answers anew if the check finds it wrong.

    answer  ->  check  ->  right: that is the reply;  wrong: a new answer, having read the check  ->  check  -> ...

When it helps: where checking is easier than answering. Often it is not: models without a way to look things up tend to
find mistakes in right answers, and to keep wrong ones (Huang et al., 2024). It is here as a baseline: an exchange
between members has to beat one of them with itself at equal tokens (`token_budget` bounds both). Cost: 2 calls if the
first answer is found right, at most 1 + 2 max_rounds, one after the other. Needs: one model of any kind. The reply
streams as one piece, at the end; what was checked and written before it comes as reasoning.

Related: exchange_of_thought, where members check each other; majority, which spends the calls on independent answers.

References: Madaan et al., "Self-Refine", 2023, https://arxiv.org/abs/2303.17651; Han et al., "Small language model can
self-correct", 2024, https://arxiv.org/abs/2401.07301; Huang et al., "Large language models cannot self-correct
reasoning yet", 2024, https://arxiv.org/abs/2310.01798.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ensemble_server.ensembles.base import Answer, Delta, Done, Event, GenerationRequest, Usage
from ensemble_server.ensembles.exchange.prompts import round_messages, round_text
from ensemble_server.ensembles.exchange.verification import CHECK, REWRITE, verdict
from ensemble_server.ensembles.fan_out import Call, fan_out, total_usage
from ensemble_server.ensembles.text_level import TextLevel, TextLevelConfig, as_delta, member_request
from ensemble_server.ensembles.thoughts import without_thoughts
from ensemble_server.ensembles.voting.tool_calls import called, said

StopReason = Literal["found_right", "no_verdict", "silent", "max_rounds", "token_budget", "time"]


@dataclass
class _Course:
    """What was said so far: the answers and checks in turn, with their cost."""

    ends: float | None  # on the loop's clock
    answers: list[Answer] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)  # JSON-ready
    usages: list[Usage] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer that stands, without its thoughts; its tool calls as `voting.tool_calls` writes them."""
        return said(self.answers[-1].choices[0])

    def left_s(self) -> float | None:
        return None if self.ends is None else self.ends - asyncio.get_running_loop().time()

    def tokens_left(self, budget: int | None) -> int | None:
        return None if budget is None else budget - sum(usage.completion_tokens for usage in self.usages)


class SelfCorrection(TextLevel):
    reference: ClassVar[str] = "https://arxiv.org/abs/2303.17651"
    overridable = ("max_rounds", "temperature", "token_budget", "check", "rewrite")

    class Config(TextLevelConfig):
        max_rounds: int = Field(
            default=1, ge=1, le=10, description="times that the answer may be checked and written anew"
        )
        temperature: float | None = Field(
            default=None, ge=0, le=2, description="of answers and checks; null takes the request's"
        )
        token_budget: int | None = Field(
            default=None, ge=1, description="tokens that answers and checks may have together; null: no limit"
        )
        check: str = Field(default=CHECK, min_length=1, description="what the model is told to check its answer")
        rewrite: str = Field(
            default=REWRITE, min_length=1, description="what it is told where the check finds a mistake"
        )

        @model_validator(mode="after")
        def _has_one_member(self) -> SelfCorrection.Config:
            if len(self.members) != 1:
                raise ValueError(
                    f"self_correction is one model with itself, got {len(self.members)} members; "
                    "take exchange_of_thought for several"
                )
            if next(iter(self.members.values())) <= 0:
                raise ValueError("the only member must have a weight above zero")
            return self

        def num_calls(self, calls: Mapping[str, int]) -> int:
            return (1 + 2 * self.max_rounds) * super().num_calls(calls)

    config: Config

    async def reply(self, request: GenerationRequest, config: Config) -> AsyncGenerator[Event, None]:
        clock = asyncio.get_running_loop().time
        course = _Course(None if request.deadline_s is None else clock() + request.deadline_s)
        first = await self._asked(request, config, course, "answer", 0, must_answer=True)
        assert first is not None, "without an answer the fan-out raises"
        course.answers.append(first)
        yield Delta(0, reasoning=f"## Answer\n\n{_shown(course.answers[-1])}\n\n")
        stop: StopReason | None = None
        for number in range(1, config.max_rounds + 1):
            if (stop := self._limit(config, course)) is not None:
                break
            check = await self._asked(_checking(request, course.text, config.check), config, course, "check", number)
            if check is None:
                stop = "silent"
                break
            course.steps[-1]["verdict"] = is_right = verdict(without_thoughts(check.text))
            yield Delta(0, reasoning=f"## Check {number}\n\n{check.text.strip()}\n\n")
            if is_right is not False:
                stop = "found_right" if is_right else "no_verdict"
                break
            if (stop := self._limit(config, course)) is not None:
                break
            asked = _rewriting(request, course.text, without_thoughts(check.text), config)
            answer = await self._asked(asked, config, course, "answer", number)
            if answer is None:
                stop = "silent"
                break
            course.answers.append(answer)
            yield Delta(0, reasoning=f"## Answer {number + 1}\n\n{_shown(answer)}\n\n")
        choice = course.answers[-1].choices[0]
        yield replace(as_delta(choice), reasoning="")
        trace = {"steps": course.steps, "num_answers": len(course.answers), "stop": stop or "max_rounds"}
        yield Done(
            total_usage(course.usages),
            config.method,
            self.members,
            turnout=1,
            trace=trace if request.explain else None,
        )

    def _limit(self, config: Config, course: _Course) -> StopReason | None:
        """What forbids another call."""
        tokens, seconds = course.tokens_left(config.token_budget), course.left_s()
        if tokens is not None and tokens < 1:
            return "token_budget"
        return "time" if seconds is not None and seconds <= 0 else None

    async def _asked(
        self,
        request: GenerationRequest,
        config: Config,
        course: _Course,
        step: Literal["answer", "check"],
        number: int,
        *,
        must_answer: bool = False,
    ) -> Answer | None:
        """The member's answer to `request`, noted in `course`; None if it stays silent, which `must_answer` forbids."""
        (member,) = config.members
        asked = member_request(request, member, 2 * number - (step == "check"), temperature=config.temperature)
        left = course.tokens_left(config.token_budget)
        if left is not None:
            limit = asked.sampling.max_tokens
            asked = replace(
                asked, sampling=replace(asked.sampling, max_tokens=left if limit is None else min(limit, left))
            )
        limits = [limit for limit in (config.member_timeout_s, course.left_s()) if limit is not None]
        outcomes = await fan_out(
            [Call(member, self.models[member], asked)],
            ensemble=self.name,
            min_turnout=1 if must_answer else 0,
            deadline_s=min(limits, default=None),
        )
        course.usages.append(outcomes[0].usage)
        answer = outcomes[0].answer
        told = {"silent": outcomes[0].reason} if answer is None else {"text": called(answer.choices[0]) or answer.text}
        course.steps.append({"step": step, "round": number, **told})
        if answer is not None and answer.done.trace is not None:
            course.steps[-1]["trace"] = answer.done.trace
        return answer


def _shown(answer: Answer) -> str:
    return called(answer.choices[0]) or answer.text.strip()


def _checking(request: GenerationRequest, answer: str, check: str) -> GenerationRequest:
    """`request` with its answer and the order to check it. What the reply's form must be does not bind the check."""
    free = replace(request, tools=(), sampling=replace(request.sampling, grammar=None, stop=(), min_tokens=0))
    return _followed(free, answer, check)


def _rewriting(request: GenerationRequest, answer: str, check: str, config: SelfCorrection.Config) -> GenerationRequest:
    """`request` with its answer, the check of it and the order to answer anew."""
    if request.messages is None:
        return _followed(request, f"{answer}\n\n{config.check}\n\n{check}", config.rewrite)
    checked = _followed(request, answer, config.check)
    return _followed(checked, check, config.rewrite)


def _followed(request: GenerationRequest, reply: str, order: str) -> GenerationRequest:
    """`request`, what was replied to it, and what is to be done next."""
    if request.messages is not None:
        return replace(request, messages=round_messages(request.messages, reply, order))
    assert isinstance(request.prompt, str), "methods of texts take no token ids"
    return replace(request, prompt=round_text(request.prompt, reply, order))
