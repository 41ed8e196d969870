"""How fast a student learns and when it stops: a warm-up, then a cosine that reaches zero in the time that there is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


def learning_rate_factor(step: int, num_steps: int, warmup_share: float = 0.1) -> float:
    """Rises linearly to 1 over the first tenth of the steps, then falls along a cosine to 0."""
    num_warmup = max(1, round(warmup_share * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def steps_in_time(step: int, num_steps: int, *, seconds: float, budget_s: float) -> int:
    """How many steps there will be: `num_steps`, or fewer if `seconds` for the first `step` say that time ends sooner.

    Called after each step it only ever falls, so that the schedule ends at zero when the time does.
    """
    if step == 0:
        return num_steps
    left = math.floor((budget_s - seconds) / (seconds / step))
    return max(step, min(num_steps, step + left))


def batches_of(num_items: int, batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Indices of the items of each step, without end: every item once per epoch, in an order that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_items, generator=generator).tolist()
        yield from (order[start : start + batch_size] for start in range(0, num_items, batch_size))
