"""What `ensemble distill` is told, on its command line or in an arm of a comparison: keys, defaults, and the rules that
they can be held to without looking at a config or a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from ensemble_server.server.config.blocks import Block
from ensemble_server.server.config.values import Count, LocalPath, Tokens, Unit, absolute

Target = Literal["mixture", "min_ce", "avg_ce"]
Level = Literal["token", "window", "document"]
Align = Literal["exact", "mined", "em"]

LORA_LEARNING_RATE = 1e-3
FULL_LEARNING_RATE = 2e-5


def _is_path(init: str) -> bool:
    """A recipe or a folder, told from a model's name by how it is written."""
    return "/" in init or init.endswith((".yml", ".yaml"))


def _absolute_if_path(init: str, info: ValidationInfo) -> str:
    return absolute(init, info) if _is_path(init) else init


class Distillation(Block):
    """One model is taught what an ensemble says of texts, or answers to prompts."""

    ensemble: str = Field(
        min_length=1,
        description="the teacher: a probability_average of the config; with chat, and without text, any model",
    )
    student: str = Field(min_length=1, description="the hosted model of the config that learns")
    text: tuple[LocalPath, ...] = Field(
        default=(), description="what both read: plain text, or .jsonl with {text} in each line"
    )
    chat: tuple[LocalPath, ...] = Field(
        default=(),
        description="prompts that the ensemble answers first, and whose answers are taught: .jsonl with {messages} or "
        "{prompt} in each line",
    )
    answer_tokens: Tokens = Field(default=256, description="chat: longest answer")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="chat: at which answers are drawn; default: 0 of a probability_average, of others as always",
    )
    target: Target = Field(
        default="mixture",
        description="mixture (the ensemble as it serves) | min_ce (its best member) | avg_ce (members by exp of minus "
        "their cross entropy)",
    )
    level: Level = Field(
        default="window", description="min_ce, avg_ce: over what cross entropies are taken: token | window | document"
    )
    align: Align = Field(
        default="exact",
        description="members of other vocabularies than the student's: exact (their ways to spell the text are summed "
        "out) | mined (tokens to the nearest by edit distance, as FuseLLM) | em (to equal ones alone)",
    )
    clm: float = Field(default=0.5, ge=0, le=1, description="part of the loss that is the text itself; 1: no teacher")
    init: Annotated[str, AfterValidator(_absolute_if_path)] = Field(
        default="zero",
        min_length=1,
        description="where the student starts: zero (as it is) | merge (the linear merge of the ensemble's members) | "
        "a model's name | a merge: mergekit's recipe (.yml), or the folder of one that was made (with a slash in it)",
    )
    rank: Count = Field(default=12, description="of the LoRA adapter that is trained")
    full: bool = Field(default=False, description="train all weights instead of an adapter")
    top_k: Annotated[Count, Unit("tokens")] = Field(
        default=64, description="likeliest next tokens of each member that are kept per position"
    )
    tail: bool = Field(default=True, description="keep the rest of the vocabulary as one bucket; false: cut it off")
    window: Tokens = Field(default=256, ge=8, description="of a text, read in one go; a chat is read whole")
    batch_size: Annotated[Count, Unit("windows")] = Field(default=4, description="of one step")
    epochs: Count = Field(default=1, description="how often the texts are read, if time allows")
    steps: Count | None = Field(default=None, description="exactly so many steps, whatever the time; default: epochs")
    minutes: float | None = Field(
        default=20,
        gt=0,
        allow_inf_nan=False,
        description="longest training, when the cosine ends; null, as in comparisons: steps and epochs alone decide",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=f"highest; default {LORA_LEARNING_RATE:g} for an adapter, {FULL_LEARNING_RATE:g} for all weights",
    )
    held_out: float = Field(default=0.05, gt=0, lt=0.5, description="last part of every text that is not trained on")
    seed: int = Field(default=0, ge=0, description="of the adapter's start and of the order of windows")

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> Distillation:
        given = self.model_fields_set
        if not self.text and not self.chat:
            raise ValueError("give at least one file to learn from: `text`, or prompts as `chat`")
        if not self.chat and (of_chats := given & {"answer_tokens", "temperature"}):
            raise ValueError(f"`{min(of_chats)}` belongs to `chat`; a text is read as it is")
        if "level" in given and self.target == "mixture":
            raise ValueError("`level` belongs to the targets min_ce and avg_ce; a mixture has weights at each token")
        if "rank" in given and self.full:
            raise ValueError("`rank` belongs to an adapter; `full` trains all weights")
        return self

    @property
    def init_path(self) -> Path | None:
        """The recipe or the folder of the merge that the student starts from, if it starts from one."""
        return Path(self.init) if _is_path(self.init) else None

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or (FULL_LEARNING_RATE if self.full else LORA_LEARNING_RATE)
