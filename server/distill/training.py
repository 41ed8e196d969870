"""The training loop: AdamW, a warm-up and a cosine that ends in time, and a checkpoint now and then.

A run that was killed goes on with its last checkpoint, and ends with the same weights as one that was not, if time did
not decide how many steps there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.disk.whole_file import whole_file
from ensemble_server.server.distill.lessons import Lessons
from ensemble_server.server.distill.loss import loss_of, token_losses
from ensemble_server.server.distill.schedule import batches_of, learning_rate_factor, steps_in_time
from ensemble_server.server.distill.student import Student

CHECKPOINT_FILE = "checkpoint.pt"
SECONDS_BETWEEN_CHECKPOINTS = 60.0
MOST_TIME_FOR_CHECKPOINTS = 0.05  # of all, where weights are large


@dataclass(frozen=True)
class StepLosses:
    """Nats per token. `kl` is None where the student learns from the text alone."""

    step: int
    clm: float
    kl: float | None


@dataclass
class Progress:
    """How far a training is. `seconds`: from the first step on, over all runs of it."""

    num_steps: int
    step: int = 0
    seconds: float = 0.0
    losses: list[StepLosses] = field(default_factory=list)


def train(
    student: Student,
    lessons: Lessons,
    wanted: Distillation,
    *,
    vocab_size: int,
    folder: Path,
    on_step: Callable[[Progress], None],
) -> Progress:
    """Train the student in place, from the checkpoint in `folder` if there is one. `on_step` hears of every step.

    Raises `StorageError` if a checkpoint cannot be written, `ConfigError` if the loss is no number any more.
    """
    weights = student.trained
    optimizer = torch.optim.AdamW(weights.values(), lr=wanted.peak_learning_rate, weight_decay=0.0)
    per_epoch = -(-len(lessons) // wanted.batch_size)
    progress = Progress(num_steps=wanted.steps or wanted.epochs * per_epoch)
    checkpoint = folder / CHECKPOINT_FILE
    if checkpoint.exists():
        progress = _restore(checkpoint, weights, optimizer)
    order = islice(batches_of(len(lessons), wanted.batch_size, seed=wanted.seed), progress.step, None)
    saved_at, saving_s = time.monotonic(), 0.0
    student.model.train()
    last = time.monotonic()
    while progress.step < progress.num_steps:
        factor = learning_rate_factor(progress.step, progress.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = wanted.peak_learning_rate * factor
        clm, kl = _step(student, lessons, next(order), optimizer, wanted.clm, vocab_size)
        progress.step += 1
        progress.losses.append(StepLosses(progress.step, clm, kl))
        progress.seconds, last = progress.seconds + time.monotonic() - last, time.monotonic()
        if wanted.steps is None and wanted.minutes is not None:
            progress.num_steps = steps_in_time(
                progress.step, progress.num_steps, seconds=progress.seconds, budget_s=60 * wanted.minutes
            )
        on_step(progress)
        waited = time.monotonic() - saved_at
        if waited >= max(SECONDS_BETWEEN_CHECKPOINTS, saving_s / MOST_TIME_FOR_CHECKPOINTS):
            begun = time.monotonic()
            _save(checkpoint, progress, weights, optimizer)
            saved_at = time.monotonic()
            saving_s = saved_at - begun
    return progress


def _step(
    student: Student,
    lessons: Lessons,
    indices: list[int],
    optimizer: torch.optim.Optimizer,
    clm_share: float,
    vocab_size: int,
) -> tuple[float, float | None]:
    batch = lessons.batch(indices).to(student.device)
    logits = student.model(input_ids=batch.inputs, use_cache=False).logits[:, :-1, :vocab_size]
    clm, kl = token_losses(logits, batch)
    loss = loss_of(clm, kl, clm_share)
    if not loss.isfinite():
        raise ConfigError(
            f"the loss is {float(loss.detach())}: the student is lost; delete the run, and give a smaller learning rate"
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.trained.values(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(clm.detach().mean()), None if kl is None else float(kl.detach().mean())


def _save(
    path: Path, progress: Progress, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    state: dict[str, Any] = {
        "num_steps": progress.num_steps,
        "step": progress.step,
        "seconds": progress.seconds,
        "losses": [vars(one) for one in progress.losses],
        "weights": {name: weight.detach() for name, weight in weights.items()},
        "optimizer": optimizer.state_dict(),
    }
    with whole_file(path) as file:
        torch.save(state, file)


def _restore(path: Path, weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    losses = [StepLosses(**one) for one in state["losses"]]
    return Progress(state["num_steps"], state["step"], state["seconds"], losses)
