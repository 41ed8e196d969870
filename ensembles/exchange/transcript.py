"""The transcript of an exchange: what was agreed on beforehand, and what each participant said, round by round.

It is JSON-ready, and all that `ensembles.exchange.agreement` looks at: whoever has the transcript can work out every
stop and the answer again, without a model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ensemble_server.ensembles.base import ToolCall
from ensemble_server.ensembles.exchange.topologies import TopologyName
from ensemble_server.ensembles.voting.answer_extraction import AnswerKind
from ensemble_server.ensembles.voting.tool_calls import canonical_calls

StopRule = Literal["unanimity", "majority", "repeat"]
StopReason = Literal["unanimity", "majority", "all_left", "max_rounds", "token_budget", "time_budget"]
FinalRule = Literal["confidence", "plurality"]


class Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Participant(Value):
    """`model` speaks for it, told `persona` as its system prompt."""

    name: str = Field(min_length=1)
    model: str
    persona: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class Settings(Value):
    """What decides, besides what is said. `topology`: null for a map of the user's own; `hears` has it either way."""

    participants: tuple[Participant, ...] = Field(min_length=2)
    topology: TopologyName | None
    hears: dict[str, tuple[str, ...]]
    answer: AnswerKind
    text_threshold: float | None
    max_rounds: int = Field(ge=1)
    stop: tuple[StopRule, ...]
    final: FinalRule
    token_budget: int | None
    time_budget_s: float | None

    @model_validator(mode="after")
    def _names_fit(self) -> Settings:
        if len(set(self.names)) < len(self.names):
            raise ValueError("two participants have the same name")
        if strangers := {*self.hears, *(name for heard in self.hears.values() for name in heard)} - set(self.names):
            raise ValueError(f"hears names {min(strangers)!r}, which is no participant")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(participant.name for participant in self.participants)


class Reply(Value):
    """What a participant said in a round, and the answer in it (null: it abstains).

    Text answers that are alike enough to count as one carry the spelling of the first of them. `calls`: of tools, which
    are then the answer (`ensembles.voting.tool_calls`). `trace` is that of a participant which is an ensemble itself.
    """

    text: str
    answer: str | None
    calls: tuple[ToolCall, ...] = Field(default=(), exclude_if=lambda calls: not calls)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = "stop"
    trace: Any = None

    @property
    def said(self) -> str:
        """As others read it, thoughts and all."""
        return canonical_calls(self.calls) if self.calls else self.text


class Round(Value):
    """Round 0 holds everyone's own answer, the rounds after it are exchanges.

    `silent`: who was asked and gave no answer, with the reason. `num_tokens`: written in this round by all, the silent
    included. `elapsed_s`: since the exchange began.
    """

    replies: dict[str, Reply]
    silent: dict[str, str] = Field(default_factory=dict)
    num_tokens: int = Field(default=0, ge=0)
    elapsed_s: float = Field(default=0.0, ge=0)


class State(Value):
    """What follows from the rounds so far; `ensembles.exchange.agreement.judge` works it out.

    `confidence`: of those who have spoken. `votes`: answer -> weight, in the order of their first voters. `speaking`:
    who speaks in the next round; nobody after a stop. `answer` and `spokesperson` are what it would come to now.
    """

    confidence: dict[str, float]
    votes: dict[str, float]
    stop: StopReason | None
    speaking: tuple[str, ...]
    answer: str | None
    spokesperson: str


class Transcript(Value):
    """One exchange, whole: `states[k]` is what followed from the rounds 0 to k."""

    settings: Settings
    rounds: tuple[Round, ...] = Field(min_length=1)
    states: tuple[State, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> Transcript:
        names = set(self.settings.names)
        for index, round_ in enumerate(self.rounds):
            if strangers := {*round_.replies, *round_.silent} - names:
                raise ValueError(f"round {index} names {min(strangers)!r}, which is no participant")
        if not self.rounds[0].replies:
            raise ValueError("round 0 has no reply")
        return self


def minutes(index: int, round_: Round, state: State) -> str:
    """Round `index` for human eyes: who said what, with which answer and confidence, and whether that was the end."""
    parts = [f"## Round {index}"]
    for name, reply in round_.replies.items():
        answer = "no answer" if reply.answer is None else f"answer {reply.answer}"
        parts.append(f"**{name}** ({answer}, confidence {state.confidence[name]:.2f}): {reply.said.strip()}")
    parts += [f"**{name}** is silent: {reason}" for name, reason in round_.silent.items()]
    if state.stop:
        answer = "no answer" if state.answer is None else f"the answer {state.answer}"
        parts.append(f"Stopped by {state.stop} with {answer}, in the words of {state.spokesperson}.")
    return "\n\n".join(parts) + "\n\n"
