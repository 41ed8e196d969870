"""What text that was held out costs: a student's bits per byte and its distance from the ensemble, and the latter's
bits per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.compare.measures.text_measure import mixture_logprobs, scored_part
from ensemble_server.server.compare.measures.windows import Window
from ensemble_server.server.distill.card import Figures
from ensemble_server.server.distill.lessons import Lessons
from ensemble_server.server.distill.loss import token_losses
from ensemble_server.server.distill.records import Records


@torch.inference_mode()
def score(
    model: torch.nn.Module,
    lessons: Lessons,
    *,
    vocab_size: int,
    device: torch.device,
    batch_size: int,
    on_window: Callable[[int, int], None],
) -> Figures:
    """`on_window` hears how many are read, and how many there are."""
    model.eval()
    nats, distance, num_tokens = 0.0, 0.0, 0
    for start in range(0, len(lessons), batch_size):
        indices = range(start, min(start + batch_size, len(lessons)))
        batch = lessons.batch(indices).to(device)
        logits = model(input_ids=batch.inputs, use_cache=False).logits[:, :-1, :vocab_size]
        clm, kl = token_losses(logits, batch)
        nats += float(clm.double().sum())
        distance += 0.0 if kl is None else float(kl.double().sum())
        num_tokens += len(clm)
        on_window(indices[-1] + 1, len(lessons))
    num_bytes = sum(int(window.num_bytes.sum()) for window in lessons.windows)
    return Figures(
        bits_per_byte=nats / np.log(2) / num_bytes, kl=None if lessons.records is None else distance / num_tokens
    )


def ensemble_bits_per_byte(mixture: Mixture, windows: Sequence[Window], records: Records) -> float:
    """Of the ensemble as it serves, on the tokens that are scored in `windows`."""
    nats = 0.0
    for window, record in zip(windows, records, strict=True):
        of_members = record.of_tokens.astype(np.float64)
        pooled = of_members[-1] if mixture.pool == "geometric" else mixture_logprobs(mixture, of_members)
        nats -= float(scored_part(window, pooled).sum())
    return nats / np.log(2) / sum(int(window.num_bytes.sum()) for window in windows)
