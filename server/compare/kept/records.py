"""What was measured, arm by arm, item by item: `DIR/arms/NAME.json`, written after every measure.

A figure is kept with the hash of everything it depends on (`inputs`: the arm's weights and settings, the items, the
versions of what computes). So a comparison that was killed goes on with the next measure, one whose plan changed runs
again only what changed, and statistics and report are made without any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ensemble_server.server.compare.kept.results import ArmKind, Choice, TokenView
from ensemble_server.server.disk.whole_file import write_whole

FACTS_FILE = "facts.json"


class Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextRecord(Stored):
    """All lists have one number per document; empty if the text was `skipped` for the reason given."""

    inputs: str
    items_sha256: str
    nats: list[float] = Field(default_factory=list)
    num_bytes: list[float] = Field(default_factory=list)
    num_tokens: list[float] = Field(default_factory=list)
    skipped: str | None = None


class ItemRecord(Stored):
    """See `server.compare.measures.task_measure.ItemScore`. `preferences`: other arm -> how much a judge preferred this
    one, 1/2 for a draw."""

    id: str
    score: float
    outputs: list[str] = Field(default_factory=list)
    answers: list[str | None] = Field(default_factory=list)
    sample_scores: list[float] = Field(default_factory=list)
    reference: str = ""
    prompt_sha256: str = ""
    completion_tokens: int = 0
    error: str | None = None
    preferences: dict[str, float] = Field(default_factory=dict)


class TaskRecord(Stored):
    """`judged`: what a judge's scores of it depend on; empty where none was asked."""

    inputs: str
    items_sha256: str
    metric: str
    higher_is_better: bool = True
    items: list[ItemRecord] = Field(default_factory=list)
    skipped: str | None = None
    judged: str = ""


class CostRecord(Stored):
    """Raw figures, one per round; `server.compare.kept.results.Cost` summarises them."""

    inputs: str
    tokens_per_s: dict[str, list[float]] = Field(default_factory=dict)
    ttft_s: list[float] = Field(default_factory=list)
    seconds_per_answer_token: float | None = None
    forward_tokens_per_answer_token: float | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    spend: float | None = 0.0
    skipped: str | None = None


class Preparation(Stored):
    """How an arm came to be: fitted weights and what the held-out split chose. `variant`: its place in
    the plan."""

    inputs: str
    variant: int = 0
    weights: dict[str, float] | None = None
    share: float | None = None
    chosen: Choice | None = None


class View(Stored):
    """Tokens of one item as the members saw them. `key`: measure and item."""

    inputs: str
    tokens: list[TokenView]


class Failure(Stored):
    """`stage`: build, load, text NAME, task NAME, cost."""

    stage: str
    message: str


class ArmRecord(Stored):
    """Everything that is known of one arm (in one replicate)."""

    name: str
    replicate: str | None = None
    kind: ArmKind = "ensemble"
    model: str = ""
    members: list[str] = Field(default_factory=list)
    description: str = ""
    identity: str = ""
    preparation: Preparation | None = None
    text: dict[str, TextRecord] = Field(default_factory=dict)
    tasks: dict[str, TaskRecord] = Field(default_factory=dict)
    null_text: dict[str, TextRecord] = Field(default_factory=dict)
    null_tasks: dict[str, TaskRecord] = Field(default_factory=dict)
    cost: CostRecord | None = None
    views: dict[str, View] = Field(default_factory=dict)
    failure: Failure | None = None


class Facts(Stored):
    """What results need besides the records of the plan's arms: arms that were added, and how all can be repeated."""

    added_arms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_whole(folder / FACTS_FILE, self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Facts:
        """Empty if a comparison in `folder` has not come to its end yet."""
        try:
            return cls.model_validate_json((folder / FACTS_FILE).read_bytes())
        except (OSError, ValidationError):
            return cls()


class Records:
    """The records of one output folder. Every change is on disk when the call returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "arms"
        self._records: dict[tuple[str, str | None], ArmRecord] = {}

    def path(self, name: str, replicate: str | None = None) -> Path:
        of_replicate = "" if replicate is None else f"@{quote(replicate, safe=' ')}"
        return self._folder / f"{quote(name, safe=' +')}{of_replicate}.json"

    def get(self, name: str, replicate: str | None = None) -> ArmRecord:
        """The record, empty if there is none or it was written by another version of this program."""
        key = (name, replicate)
        if key not in self._records:
            try:
                record = ArmRecord.model_validate_json(self.path(name, replicate).read_bytes())
            except (OSError, ValidationError):
                record = ArmRecord(name=name, replicate=replicate)
            self._records[key] = record
        return self._records[key]

    def save(self, record: ArmRecord) -> None:
        write_whole(self.path(record.name, record.replicate), record.model_dump_json().encode() + b"\n")


def inputs_hash(parts: Mapping[str, Any]) -> str:
    """Of everything that a figure depends on."""
    from ensemble_server.server.compare.kept.content_cache import digest

    return digest(dict(parts))[:32]
