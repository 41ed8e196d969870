"""The blocks of a comparison's YAML: keys, units, defaults, and the rules that one block can check by itself.

`server.compare.planning.plan` reads the file and checks what blocks say of each other, of the config and of the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ensemble_server.ensembles.voting.pairwise import CRITERION
from ensemble_server.server.compare.kept.results import ArmKind
from ensemble_server.server.compare.measures.cost_settings import CostSettings
from ensemble_server.server.compare.measures.task_measure import Metric
from ensemble_server.server.compare.planning.held_out import MAX_SHARE
from ensemble_server.server.config.blocks import Block
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.values import Count, LocalPath, Tokens, Unit

METRIC_ALIASES = {"numeric": "number"}
Bytes = Annotated[Count, Unit("bytes")]


def _as_map(key: str) -> BeforeValidator:
    """A bare string stands for `{key: string}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Variant(Block):
    """What an arm is: a merge, or a model entry as it could stand in the config."""

    label: str | None = Field(default=None, description="what the report calls this variant; default: its number")
    merge: LocalPath | dict[str, Any] | None = Field(
        default=None, description="a mergekit recipe: its file, or the YAML itself"
    )
    ensemble: dict[str, Any] | None = Field(
        default=None,
        description="a model entry; `weights: fitted` in a probability average has its weights fitted on `fit`",
    )

    @model_validator(mode="after")
    def _is_one_thing(self) -> Variant:
        if (self.merge is None) == (self.ensemble is None):
            raise ValueError("needs exactly one of `merge` and `ensemble`")
        return self


def _kind_of_choice(value: Any) -> str:
    return "settings" if isinstance(value, Mapping) else "auto" if isinstance(value, str) else "variants"


Choose = Annotated[
    Annotated[tuple[Variant, ...], Tag("variants")]
    | Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Tag("settings")]
    | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_kind_of_choice),
]


class AnswersSource(Block):
    """Answers that are there already: a file, or one system's part of it."""

    path: LocalPath = Field(description="the output of `ensemble batch` or `vote`, or JSONL of {id, text}")
    system: str | None = Field(
        default=None,
        description="whose answers, where a batch asked several: a model, and what else its cell says, as in "
        "`mix temperature=0.7`",
    )


class Arm(Block):
    """One arm: a model of the config by its name alone, or one that is made for the comparison."""

    name: str = Field(
        min_length=1,
        description="how the report calls it; without any of the keys below: a model",
    )
    description: str = Field(default="", description="a line for the report")
    merge: LocalPath | dict[str, Any] | None = Field(
        default=None, description="a mergekit recipe: its file, or the YAML itself"
    )
    ensemble: dict[str, Any] | None = Field(
        default=None, description="a model entry; `weights: fitted` fits them on `fit`"
    )
    distill: Distillation | None = Field(
        default=None,
        description="a model of the config taught by an ensemble, beside its control NAME-control, which reads "
        "the same text as often without a teacher",
    )
    choose: Choose = Field(
        default=(),
        description="variants, of which the best on `fit` becomes the arm; beside `merge` or `ensemble` a map of its "
        "settings to values that are tried, or `auto` for those of a merge method that usually matter",
    )
    answers: dict[str, Annotated[AnswersSource, _as_map("path")]] = Field(
        default_factory=dict, description="task -> answers that are there already, instead of a model"
    )
    kind: ArmKind | None = Field(
        default=None, description="with `answers`: what the report takes it for; default: member"
    )

    @model_validator(mode="after")
    def _is_one_thing_at_most(self) -> Arm:
        has_variants = isinstance(self.choose, tuple) and bool(self.choose)
        made = (self.merge is not None) + (self.ensemble is not None)
        if made + has_variants > 1:
            raise ValueError("takes one of `merge`, `ensemble` and `choose`")
        if self.distill is not None and (made or self.choose):
            raise ValueError("it is taught by `distill`; take `merge`, `ensemble` and `choose` out")
        if (wanted := self.distill) is not None and wanted.minutes and "minutes" in wanted.model_fields_set:
            raise ValueError("distill.minutes: in a comparison `steps` or `epochs` decide, not time; take it out")
        if wanted is not None and wanted.chat:
            raise ValueError(
                "distill.chat: a comparison teaches texts alone; teach with `ensemble distill --chat`, and compare the "
                "student as a model of the config"
            )
        if self.answers and (made or self.choose or self.distill is not None):
            raise ValueError("its `answers` are there already; take `merge`, `ensemble`, `distill` and `choose` out")
        if self.kind is not None and not self.answers:
            raise ValueError("`kind` belongs to `answers`; of all other arms it is known")
        if isinstance(self.choose, tuple):
            if "choose" in self.model_fields_set and len(self.choose) < 2:
                raise ValueError("`choose` needs at least two variants")
        elif self.merge is None and self.ensemble is None:
            raise ValueError("`choose` with settings needs the `merge` or the `ensemble` whose settings they are")
        return self

    @property
    def is_of_config(self) -> bool:
        made = self.merge is not None or self.ensemble is not None or self.distill is not None
        return not made and not self.choose and not self.answers

    @property
    def is_recorded(self) -> bool:
        return bool(self.answers)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What it can become; none if it is a model of the config or a distilled one, or its answers are there."""
        if self.choose and isinstance(self.choose, tuple):
            return self.choose
        if self.is_of_config or self.is_recorded or self.distill is not None:
            return ()
        return (Variant(label=None, merge=self.merge, ensemble=self.ensemble),)


class TextSource(Block):
    """A text to measure bits per byte on: a file or a part of it, or one that switches between others."""

    path: LocalPath | None = Field(default=None, description="a UTF-8 text file")
    tail: float | None = Field(
        default=None, gt=0, lt=1, description="only this last part of the file's characters, from a line's start on"
    )
    switching: tuple[str, ...] = Field(default=(), description="other texts (by name) whose pieces take turns")
    piece_bytes: Bytes = Field(default=380, description="length of a piece of `switching`; cut between characters")
    bytes: Bytes | None = Field(default=None, description="at most so much, from the start; default: all")
    cluster: str | None = Field(
        default=None, description="of a .jsonl text: a field whose equal values mark documents that go together"
    )

    @model_validator(mode="after")
    def _is_one_kind(self) -> TextSource:
        if (self.path is None) == (not self.switching):
            raise ValueError("needs exactly one of `path` and `switching`")
        if self.switching and (len(self.switching) < 2 or self.tail is not None):
            raise ValueError("`switching` needs at least two texts, and takes no `tail`")
        if self.cluster is not None and self.is_one_text:
            raise ValueError(
                "`cluster` names a field of the rows of a .jsonl file; of one text neighbours are looked at"
            )
        return self

    @property
    def is_one_text(self) -> bool:
        """Whether its documents are neighbours in one text; lines of a `.jsonl` have nothing to do with each other."""
        return self.path is None or not self.path.endswith(".jsonl")


Text = Annotated[TextSource, _as_map("path")]


class TaskSource(Block):
    """Questions with known answers, one JSON object a line. The Jinja templates see each row's fields."""

    name: str = Field(min_length=1)
    data: LocalPath = Field(description="JSONL, one question a line")
    metric: Annotated[Metric, BeforeValidator(lambda name: METRIC_ALIASES.get(str(name), name))] = Field(
        description="how an output is judged"
    )
    template: str = Field(min_length=1, description="Jinja: the prompt of a row")
    answer: str = Field(default="{{ answer }}", min_length=1, description="Jinja: the right answer of a row")
    chat: bool = Field(default=True, description="ask as a user's message; false: continue the prompt as raw text")
    system_prompt: str | None = Field(default=None, description="put before the prompt, for all arms alike")
    max_tokens: Tokens = Field(default=256, description="longest output")
    temperature: float = Field(default=0.0, ge=0, le=2)
    samples: Count = Field(default=1, description="outputs per question; scores are averaged within a question first")
    pass_at: tuple[Count, ...] = Field(default=(), description="also report pass@k for these k, at most `samples`")
    stop: tuple[str, ...] = Field(default=(), description="strings that end an output")
    limit: Count | None = Field(default=None, description="only the first so many rows")
    cluster: str | None = Field(
        default=None,
        description="a field whose equal values mark rows that go together, such as questions on one passage",
    )
    judge: str | None = Field(
        default=None, description="metric judge only: the model of the config that compares the arms' answers in pairs"
    )
    criterion: str = Field(default=CRITERION, min_length=1, description="metric judge only: which answer is ...?")
    dev: LocalPath | None = Field(
        default=None,
        description="other rows of the same form, for choosing the best single member; never scored as a test",
    )

    @model_validator(mode="after")
    def _samples_can_differ(self) -> TaskSource:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples need a temperature above 0, or all are the same")
        if too_many := [k for k in self.pass_at if k > self.samples]:
            raise ValueError(f"pass_at {too_many[0]} needs as many samples; there are {self.samples}")
        if (self.metric == "judge") != (self.judge is not None):
            raise ValueError("`judge` names the model that the metric judge asks; the two go together")
        if self.metric == "judge" and (self.samples > 1 or self.dev is not None):
            raise ValueError("the metric judge compares one answer of each arm: leave `samples` and `dev` out")
        if self.metric.startswith("multiple_choice") and self.samples > 1:
            raise ValueError(f"{self.metric} compares likelihoods, which do not vary: leave `samples` out")
        return self


class HarnessTasks(Block):
    """Tasks of lm-evaluation-harness, run by the harness itself."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names, as `lm_eval --tasks` takes them")
    include_path: LocalPath | None = Field(default=None, description="a folder with task files of your own")
    limit: Count | None = Field(default=None, description="only the first so many items of each task")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples in the prompt; default: the task's own")


class CostMatched(Block):
    """The best single member, with as many samples as an ensemble's cost buys, as an arm of its own."""

    ensembles: tuple[str, ...] | None = Field(default=None, description="arms to match; default: all ensembles")
    by: Literal["forward_tokens", "seconds"] = Field(
        default="forward_tokens", description="what a sample costs; seconds differ from run to run"
    )
    max_samples: Annotated[int, Field(ge=2, le=64)] = 16
    temperature: float = Field(default=0.7, gt=0, le=2, description="of the samples")


class StatisticsSettings(Block):
    seed: int = Field(default=0, ge=0)
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = Field(default=10_000, description="of the bootstrap")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="1 - the confidence of intervals")
    margin_bpb: float = Field(
        default=0.01, ge=0, description="the smallest difference in bits per byte that matters to you"
    )
    margin_score: float = Field(default=0.02, ge=0, description="the same for scores of tasks")


class Flips(Block):
    per_arm: Annotated[int, Field(ge=0, le=50)] = Field(
        default=2, description="items shown side by side, per arm and measure"
    )


class PlanFile(Block):
    """The whole file."""

    title: str = ""
    config: LocalPath = Field(description="the config with the models")
    baseline: str = Field(description="the arm that all others are compared with")
    arms: tuple[Annotated[Arm, _as_map("name")], ...] = Field(min_length=1)
    text: dict[str, Text] = Field(default_factory=dict, description="name -> file, for bits per byte")
    fit: dict[str, Text] = Field(
        default_factory=dict, description="name -> held-out text on which weights and variants are chosen"
    )
    max_overlap: float = Field(
        default=MAX_SHARE,
        ge=0,
        le=1,
        description="largest share of a test text (in sequences of 13 words) that may stand in `fit`, or of a task's "
        "questions in its `dev` rows",
    )
    tasks: tuple[TaskSource, ...] = ()
    lm_eval: HarnessTasks | None = None
    window: Tokens = Field(default=512, ge=2, description="longest context in which a token of a text is scored")
    stride: Tokens | None = Field(
        default=None, description="tokens between two windows; default: window - 1, no overlap"
    )
    document_bytes: Bytes = Field(
        default=2000, description="length of the pieces of a text that count as its items; none is shorter"
    )
    cost: CostSettings = CostSettings()
    cost_matched: CostMatched | None = Field(default=None, description="default: on where a task has `dev` data")
    statistics: StatisticsSettings = StatisticsSettings()
    replicates: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="name -> entries that replace models of the config: the texts once more with other members",
    )
    flips: Flips = Flips()
