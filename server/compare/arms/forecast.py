"""What a comparison will take, told before anything is loaded: tokens by counting, hours from sizes, money from prices.

Tokens are counted with the tokenizer of the first hosted model that has one on this disk, else taken as four bytes
each. Answers are taken at their longest, so what is written is a bound. Hours follow from parameters and from what this
machine multiplies in a second: reading a token takes 2 · parameters operations, writing one at least the reading of all
weights once for each `TOGETHER` rows; a training step takes three readings. An order of magnitude, not a promise;
making merges and loading come on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.compare.arms.candidates import kind_of
from ensemble_server.server.compare.arms.footprint import leaves
from ensemble_server.server.compare.kept.results import ArmKind
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import CHOICE_METRICS, Task
from ensemble_server.server.compare.planning.blocks import Arm
from ensemble_server.server.compare.planning.plan import Plan, without_fit
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.footprint import read_weights

if TYPE_CHECKING:
    import torch

BYTES_PER_TOKEN = 4
TOGETHER = 8  # rows that are written at the same time (the concurrency of tasks)


@dataclass(frozen=True)
class Speed:
    """`operations`: multiplications and additions in a second; `bandwidth`: bytes of memory read in a second."""

    operations: float
    bandwidth: float


@dataclass(frozen=True)
class Forecast:
    """Of one arm. `num_read`, `num_written`: tokens through single models, all calls of an ensemble included; what is
    written is a bound. `hours`: None where a size is not known, or runs elsewhere. `money`: in the config's currency,
    None where a remote model has no price.
    """

    arm: str
    kind: ArmKind
    num_read: int
    num_written: int
    hours: float | None
    money: float | None


def forecasts(
    plan: Plan,
    texts: Mapping[str, Documents],
    held_out: Mapping[str, Documents],
    tasks: Mapping[str, Task],
    speed: Speed,
) -> list[Forecast]:
    """One for each arm of the plan that is to be measured, in its order; recorded answers take nothing.

    `held_out`: texts that every variant of a choice reads.
    """
    count = _token_counter(plan.config)
    text_tokens = {name: sum(count(text) for text in documents.texts) for name, documents in texts.items()}
    stride = plan.file.stride or plan.file.window - 1
    of_texts = sum(text_tokens.values()) * plan.file.window / stride * (1 + len(plan.file.replicates))
    num_read = num_written = 0.0  # of one call of a single model, over all tasks
    for task in tasks.values():
        prompts = sum(count(item.prompt) for item in task.items)
        if task.metric in CHOICE_METRICS:
            num_read += sum(
                len(item.choices) * count(item.prompt) + sum(map(count, item.choices)) for item in task.items
            )
        else:
            num_read += prompts * task.num_samples
            num_written += len(task.items) * task.num_samples * task.max_tokens
    cost = plan.file.cost
    rounds = (cost.repeats + 1) * sum(cost.concurrency)
    num_read += rounds * cost.prompt_tokens
    num_written += rounds * cost.max_tokens
    of_choice = sum(count(text) for documents in held_out.values() for text in documents.texts)
    return [
        _forecast(
            arm,
            plan,
            of_texts * (2 if arm.name == plan.file.baseline else 1) + of_choice * _num_readings(arm),
            num_read,
            num_written,
            speed,
        )
        for arm in plan.file.arms
        if not arm.is_recorded
    ]


def _num_readings(arm: Arm) -> int:
    """How often the held-out texts are read for an arm: by each variant of a choice, or once for fitted weights."""
    is_fitted = any("fitted" in (variant.ensemble or {}).values() for variant in arm.variants)
    return len(arm.variants) if len(arm.variants) > 1 else int(is_fitted)


def _forecast(arm: Arm, plan: Plan, of_texts: float, of_prompts: float, of_answers: float, speed: Speed) -> Forecast:
    config, name = _config_of(arm, plan)
    if name is None:  # a merge: one model of the size of those that it is made of
        name = next((one for one, entry in config.models.items() if isinstance(entry, HostedModel)), None)
        kind: ArmKind = "merge"
    else:
        kind = kind_of(config.models[name]) if arm.distill is None else "distilled"
    if name is None:
        return Forecast(arm.name, kind, 0, 0, None, 0.0)
    singles = sorted(leaves(config, name))
    calls = _num_calls(config, name)
    num_read, num_written = calls * of_prompts + len(singles) * of_texts, calls * of_answers
    hours: float | None = 0.0
    money: float | None = 0.0
    trained = 0.0
    if arm.distill is not None:  # the student, and its control, which reads the same without a teacher
        taught = sum(Path(path).stat().st_size for path in arm.distill.text) / BYTES_PER_TOKEN
        steps, size = arm.distill.steps, arm.distill.batch_size * arm.distill.window
        trained = 2 * (taught * arm.distill.epochs if steps is None else float(steps * size))
        num_read = 2 * num_read + trained + taught * len(leaves(config, arm.distill.ensemble))
        num_written *= 2
    for single in singles:
        entry = config.models[single]
        read, written = num_read / len(singles), num_written / len(singles)
        if isinstance(entry, RemoteModel):
            price = read * entry.prompt_price_per_million + written * entry.completion_price_per_million
            money = None if money is None or not entry.has_price else money + price / 1e6
        elif (size := _parameters(config, single)) is None or hours is None:
            hours = None
        else:
            parameters, num_bytes = size
            per_read = 2 * parameters / speed.operations
            per_written = max(per_read, num_bytes / speed.bandwidth / TOGETHER)
            backwards = 2 * trained  # the gradient takes twice what the reading took
            hours += ((read + backwards) * per_read + written * per_written) / 3600
    return Forecast(arm.name, kind, round(num_read), round(num_written), hours, money)


def _config_of(arm: Arm, plan: Plan) -> tuple[Config, str | None]:
    """The config in which the arm is a model, and its name there; None for a merge. Of several variants the first."""
    if arm.is_of_config:
        return plan.config, arm.name
    if arm.distill is not None:
        return plan.config, arm.distill.student
    variant = arm.variants[0]
    if variant.ensemble is None:
        return plan.config, None
    return plan.extended({arm.name: without_fit(variant.ensemble)}), arm.name


def _num_calls(config: Config, name: str) -> int:
    entry = config.models[name]
    if not isinstance(entry, MethodConfig):
        return 1
    return entry.num_calls({part: _num_calls(config, part) for part in entry.references()})


def _parameters(config: Config, name: str) -> tuple[int, int] | None:
    """Parameters of a hosted model, and bytes as it is loaded; None if its weights are not on this disk as tensors."""
    folder = _folder(config, name)
    if folder is None:
        return None
    entry = config.models[name]
    assert isinstance(entry, HostedModel), "it has a folder"
    root = entry if entry.base is None else config.models[entry.base]
    try:
        weights = read_weights(folder)
    except ModelLoadError:
        return None
    return weights.num_parameters, weights.bytes_as(root.dtype if isinstance(root, HostedModel) else "auto")


def _folder(config: Config, name: str) -> Path | None:
    """Where the weights of a hosted model lie, without a download or a conversion."""
    entry = config.models[name]
    if not isinstance(entry, HostedModel):
        return None
    root = entry if entry.base is None else config.models[entry.base]
    if not isinstance(root, HostedModel) or root.path is None:
        return None
    folder = config.source.absolute().parent
    try:
        return resolve_checkpoint(
            root.path, relative_to=folder, revision=root.revision, may_download=False, may_convert=False
        )
    except ModelLoadError:
        return None


def _token_counter(config: Config) -> Callable[[str], int]:
    """Tokens of a text, by the first tokenizer that lies on this disk."""
    for name in config.models:
        if (folder := _folder(config, name)) is not None and (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: -(-len(text.encode()) // BYTES_PER_TOKEN)


def this_machines_speed() -> Speed:
    """By multiplying and copying for about a tenth of a second, on the accelerator if there is one."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if accelerator is None else accelerator
    dtype = torch.float32 if accelerator is None else torch.bfloat16
    size = 1024 if accelerator is None else 8192
    matrix = torch.rand(size, size, dtype=dtype, device=device)
    seconds = min(_seconds(lambda: matrix @ matrix, device) for _ in range(4))
    block = torch.rand(16 * 2**20, dtype=torch.float32, device=device)
    copying = min(_seconds(block.clone, device) for _ in range(4))
    return Speed(2 * size**3 / seconds, 2 * block.numel() * 4 / copying)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    import torch

    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return max(time.perf_counter() - started, 1e-9)


def total_money(found: Sequence[Forecast]) -> float | None:
    """None if the price of an arm is not known."""
    money = [one.money for one in found]
    return None if None in money else sum(one for one in money if one is not None)


def total_hours(found: Sequence[Forecast]) -> float | None:
    """None if the hours of an arm are not known."""
    hours = [one.hours for one in found]
    return None if None in hours else sum(one for one in hours if one is not None)
