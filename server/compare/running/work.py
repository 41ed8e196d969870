"""What is to be measured, and what of it is known already: every figure has the hash of all that it depends on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ensemble_server.ensembles.errors import EnsembleError
from ensemble_server.server.compare.arms.candidates import ArmModel, Distiller
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.kept.provenance import COMPUTING, versions
from ensemble_server.server.compare.kept.records import ArmRecord, Failure, Records, inputs_hash
from ensemble_server.server.compare.listener import Listener
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import Task
from ensemble_server.server.compare.planning.plan import Plan
from ensemble_server.server.compare.planning.sources import sha256_of
from ensemble_server.server.config.blocks import Config

logger = logging.getLogger(__name__)

NULL_SEED_STEP = 1_000_003  # the null check's seed is the plan's and this


@dataclass(frozen=True)
class Work:
    """What is measured. `task_seed`: of sampled answers. `is_speed_measured`: off for replicates."""

    plan: Plan
    texts: Mapping[str, Documents]
    tasks: Mapping[str, Task]
    records: Records
    listener: Listener
    is_speed_measured: bool = True
    with_harness: bool = True
    distiller: Distiller | None = None
    versions: Mapping[str, str | None] = field(default_factory=lambda: versions(COMPUTING))

    @property
    def seed(self) -> int:
        return self.plan.file.statistics.seed

    @property
    def null_seed(self) -> int:
        return self.seed + NULL_SEED_STEP

    def record(self, arm: ArmModel) -> ArmRecord:
        return self.records.get(arm.arm, arm.replicate)

    def fail(self, arms: Sequence[ArmModel], stage: str, exc: BaseException) -> None:
        message = described(exc)
        for arm in arms:
            record = self.record(arm)
            record.failure = Failure(stage=stage, message=message)
            self.records.save(record)
            self.listener.stage(f"{arm.arm}: failed ({stage}): {message}")

    # --- what each figure depends on -----------------------------------------------------------------------------

    def text_inputs(self, arm: ArmModel, name: str) -> str:
        items = sha256_of(self.texts[name])
        return self._inputs(arm, text=items, window=[self.plan.file.window, self.plan.file.stride])

    @property
    def null_shift(self) -> int:
        """Tokens by which the null check's windows begin later: half of the way to the next one."""
        return (self.plan.file.stride or self.plan.file.window - 1) // 2

    def null_text_inputs(self, arm: ArmModel, name: str) -> str:
        return inputs_hash({"text": self.text_inputs(arm, name), "shift": self.null_shift})

    def task_inputs(self, arm: ArmModel, name: str, *, seed: int) -> str:
        return self._inputs(arm, task=task_sha256(self.tasks[name]), seed=seed)

    def harness_inputs(self, arm: ArmModel) -> str:
        spec = self.plan.file.lm_eval
        assert spec is not None, "only asked where there are such tasks"
        return self._inputs(arm, harness=spec.model_dump(mode="json"), seed=self.seed)

    def cost_inputs(self, arm: ArmModel) -> str:
        return self._inputs(arm, cost=self.plan.file.cost.model_dump(mode="json"))

    def _inputs(self, arm: ArmModel, **parts: Any) -> str:
        return inputs_hash({"model": self.record(arm).identity, "versions": dict(self.versions), **parts})

    # --- what is still to do -------------------------------------------------------------------------------------

    def pending_texts(self, arm: ArmModel) -> list[str]:
        known = self.record(arm).text
        return [name for name in self.texts if name not in known or known[name].inputs != self.text_inputs(arm, name)]

    def pending_tasks(self, arm: ArmModel) -> list[str]:
        known = self.record(arm).tasks
        return [
            name
            for name in self.tasks
            if name not in known or known[name].inputs != self.task_inputs(arm, name, seed=self.seed)
        ]

    def pending_null_tasks(self, arm: ArmModel) -> list[str]:
        """Sampled tasks that the baseline does once more with another seed."""
        if arm.arm != self.plan.file.baseline or arm.replicate is not None:
            return []
        known = self.record(arm).null_tasks
        return [
            name
            for name, task in self.tasks.items()
            if task.temperature > 0
            and task.metric != "judge"
            and (name not in known or known[name].inputs != self.task_inputs(arm, name, seed=self.null_seed))
        ]

    def pending_null_texts(self, arm: ArmModel) -> list[str]:
        """Texts that the baseline reads once more, its windows beginning elsewhere, if it is loaded anyway: another
        baseline stays a matter of subtraction."""
        if arm.arm != self.plan.file.baseline or arm.replicate is not None:
            return []
        known = self.record(arm).null_text
        return [
            name
            for name, documents in self.texts.items()
            if documents.is_continuous  # one that stands alone is mostly shorter than a window
            and (name not in known or known[name].inputs != self.null_text_inputs(arm, name))
        ]

    def is_harness_pending(self, arm: ArmModel) -> bool:
        if not self.with_harness or self.plan.file.lm_eval is None:
            return False
        known = self.record(arm).tasks
        inputs = self.harness_inputs(arm)
        return any(name not in known or known[name].inputs != inputs for name in self.plan.file.lm_eval.tasks)

    def is_cost_pending(self, arm: ArmModel) -> bool:
        if not self.is_speed_measured or not self.plan.file.cost.concurrency:
            return False
        cost = self.record(arm).cost
        return cost is None or cost.inputs != self.cost_inputs(arm)

    def is_pending(self, arm: ArmModel) -> bool:
        return bool(
            self.pending_texts(arm)
            or self.pending_tasks(arm)
            or self.pending_null_tasks(arm)
            or self.is_harness_pending(arm)
            or self.is_cost_pending(arm)
        )


def described(exc: BaseException) -> str:
    """One line for the arm's row; what is no error of ours is logged with its traceback, too."""
    if isinstance(exc, EnsembleError):
        return str(exc)
    logger.error("an arm failed", exc_info=exc)
    return f"{type(exc).__name__}: {exc}"


def task_sha256(task: Task) -> str:
    """Of every item and of all that decides how it is asked and judged."""
    settings = {key: value for key, value in vars(task).items() if key not in {"items", "name"}}
    return inputs_hash({"items": [vars(item) for item in task.items], "settings": settings})


def introduce(work: Work, config: Config, arms: Sequence[ArmModel]) -> list[ArmModel]:
    """Note who the arms are; those whose files are not there fail. Returns the others."""
    sound = []
    for arm in arms:
        record = work.record(arm)
        record.kind, record.model, record.members = arm.kind, arm.model, list(arm.members)
        record.description = arm.description
        try:
            record.identity = identity(config, arm.model)
        except EnsembleError as exc:
            work.fail([arm], "load", exc)
            continue
        record.failure = None
        _forget_stale(work, arm)
        work.records.save(record)
        sound.append(arm)
    return sound


def _forget_stale(work: Work, arm: ArmModel) -> None:
    """Figures that no longer belong to what the plan says, so that none is shown if measuring it again fails."""
    record = work.record(arm)
    for name in work.pending_texts(arm):
        record.text.pop(name, None)
    for name in work.pending_tasks(arm):
        record.tasks.pop(name, None)
    for name in work.pending_null_texts(arm):
        record.null_text.pop(name, None)
    for name in work.pending_null_tasks(arm):
        record.null_tasks.pop(name, None)
    if work.is_cost_pending(arm):
        record.cost = None
