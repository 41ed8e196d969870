"""The texts in a batch output, by custom_id: samples of one answer, cells of a grid, answers of several jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ensemble_server.ensembles.base import TokenLogprob
from ensemble_server.ensembles.voting.pairwise import mean_logprob


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Message(_Strict):
    content: str | None = None


class _Token(_Strict):
    token: str
    logprob: float | None


class _Logprobs(_Strict):
    """Of a chat (`content`) or of a completion (`tokens` and `token_logprobs`)."""

    content: list[_Token] | None = None
    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)

    def said(self) -> list[TokenLogprob]:
        pairs = [(token.token, token.logprob) for token in self.content or ()]
        pairs = pairs or list(zip(self.tokens, self.token_logprobs, strict=False))
        return [TokenLogprob(0, text, b"", logprob) for text, logprob in pairs]


class _Choice(_Strict):
    """A choice of a chat, which has a message, or of a completion, which has a text."""

    message: _Message | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None

    @property
    def content(self) -> str:
        return (self.text if self.message is None else self.message.content) or ""


class _Failure(_Strict):
    message: str = "failed"


class _Body(_Strict):
    model: str | None = None
    choices: list[_Choice] = Field(default_factory=list)
    error: _Failure | None = None


class _Response(_Strict):
    body: _Body


class BatchLine(_Strict):
    """What a vote needs of a line of a batch output; all else in it is not looked at."""

    custom_id: str | None
    response: _Response | None = None
    error: _Failure | None = None
    cell: dict[str, Any] = Field(default_factory=dict)

    @staticmethod
    def is_one(value: Any) -> bool:
        return isinstance(value, Mapping) and "custom_id" in value and ("response" in value or "error" in value)

    @property
    def failure(self) -> str | None:
        error = self.error or (self.response.body.error if self.response is not None else None)
        return None if error is None else error.message

    @property
    def texts(self) -> list[str]:
        """Of all choices; none if the row failed. A choice without text is blank, and a vote leaves it out."""
        if self.response is None or self.failure is not None:
            return []
        return [choice.content for choice in self.response.body.choices]

    @property
    def logprobs(self) -> list[float | None]:
        """Nats per token of each text; None where the answer came without log-probabilities."""
        if self.response is None or self.failure is not None:
            return []
        return [
            None if choice.logprobs is None else mean_logprob(choice.logprobs.said())
            for choice in self.response.body.choices
        ]

    @property
    def system(self) -> str | None:
        """Who answered, or failed to: the model, and what else its cell says: "mix temperature=0.7" """
        model = (self.response.body.model if self.response is not None else None) or self.cell.get("model")
        rest = [f"{key}={value}" for key, value in self.cell.items() if key != "model"]
        return " ".join(filter(None, [model, *rest])) or None


@dataclass
class Candidates:
    """All texts under one custom_id, each with its system and its nats per token.

    `line`: where it stood first. `failure`: its first one.
    """

    custom_id: str | int
    line: int
    texts: list[str] = field(default_factory=list)
    systems: list[str | None] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    failure: str | None = None


def grouped(lines: Iterable[tuple[int, BatchLine]]) -> list[Candidates]:
    """(number, line) of a batch output -> its ids in order of appearance. All texts are held: an id may come back late.

    A line without an id is a group of its own, named by its number.
    """
    groups: dict[str | int, Candidates] = {}
    for number, line in lines:
        custom_id = number if line.custom_id is None else line.custom_id
        group = groups.setdefault(custom_id, Candidates(custom_id, number))
        group.texts += line.texts
        group.logprobs += line.logprobs
        group.systems += [line.system] * len(line.texts)
        group.failure = group.failure or line.failure
    return list(groups.values())
