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
    """Of the ensemble as it serves, on the tokens that are scored in `windows`; where its members have different
    vocabularies, on those of their bytes that all members expect."""
    nats, num_bytes = 0.0, 0
    for window, record in zip(windows, records, strict=True):
        if record.is_over_bytes:
            num_scored = int(record.num_bytes[len(record.num_bytes) - len(window.documents) :].sum())
            of_bytes = record.of_bytes.astype(np.float64)
            pooled = mixture_logprobs(mixture, np.nan_to_num(of_bytes))
            scored = (~np.isnan(of_bytes[0]))[of_bytes.shape[1] - num_scored :]
            nats -= float(pooled[of_bytes.shape[1] - num_scored :][scored].sum())
            num_bytes += int(scored.sum())
            continue
        of_members = record.of_tokens.astype(np.float64)
        pooled = of_members[-1] if mixture.pool == "geometric" else mixture_logprobs(mixture, of_members)
        nats -= float(scored_part(window, pooled).sum())
        num_bytes += int(window.num_bytes.sum())
    return nats / np.log(2) / num_bytes
