"""The body of /v1/classify: a prompt, its labels, and how their probabilities are compared."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ensemble_server.ensembles.label_probabilities import Normalisation
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.requests.messages import Conversation, Part
from ensemble_server.server.requests.protocol import TokenId

MAX_LABELS = 128
MAX_PROMPT_TOKENS = 1_000_000


def _distinct(labels: list[str]) -> list[str]:
    if len(set(labels)) < len(labels):
        raise ValueError("holds a label twice")
    if blank := [label for label in labels if not label.strip()]:
        raise ValueError(f"a label must not be blank, got {blank[0]!r}")
    return labels


Labels = Annotated[list[str], Field(min_length=2, max_length=MAX_LABELS), AfterValidator(_distinct)]
RawPrompt = str | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]


class Prompted(Part):
    """Exactly one of a chat and a raw prompt; `input` is another name for `prompt`."""

    messages: Conversation | None = None
    prompt: RawPrompt | None = None
    input: RawPrompt | None = None

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Prompted:
        given = [name for name in ("messages", "prompt", "input") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of messages, prompt and input, got {' and '.join(given) or 'none'}")
        return self


class ClassifyBody(Prompted):
    """`separator` stands between prompt and label; by default a space after raw text that does not end in white space
    and before a label that does not begin with one, and nothing after a chat. `content_free`: the same prompt with
    nothing to judge in it, whose probabilities are divided out."""

    model: str | None = None
    labels: Labels
    separator: str | None = None
    normalise: Normalisation = "sum"
    content_free: Prompted | None = None
    ensemble: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("content_free")
    @classmethod
    def _is_all_known(cls, given: Prompted | None) -> Prompted | None:
        """A misspelt prompt must not pass for an extra: the answer would be calibrated by something else."""
        for key in (given.model_extra or {}) if given is not None else ():
            name = f"content_free.{key[:60]}"
            near = nearest(key, list(Prompted.model_fields))
            raise PydanticCustomError(
                "unknown_parameter", "unknown parameter '{name}'{near}", {"name": name, "near": near}
            )
        return given
