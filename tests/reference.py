"""The independent reference: each member alone through plain transformers, pooled by a few lines of NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ensemble_server.ensembles.base import Choice


@lru_cache(maxsize=32)
def plain_model(folder: Path, adapter: Path | None = None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def member_logprobs(folder: Path, adapter: Path | None, token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """(T, V): the distribution after each token of the text. Not to be written to."""
    return _member_logprobs(folder, adapter, tuple(token_ids), vocab_size)


@lru_cache(maxsize=1024)  # tests of several mixtures, rules and seeds read the same texts
def _member_logprobs(folder: Path, adapter: Path | None, token_ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    with torch.no_grad():
        logits = plain_model(folder, adapter)(torch.tensor([token_ids])).logits[0, :, :vocab_size]
    logits = logits.double().numpy()
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def pooled(
    pool: str, logprobs: np.ndarray, weights: Sequence[float], token_ids: Sequence[int], share: float | str = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """logprobs: (K, T, V), after each of `token_ids` (T). -> pooled (T, V), weights (K, T) used after each token.

    The posterior's evidence is every token but the first.
    """
    weights = np.asarray(weights, dtype=float)
    if pool == "geometric":
        scaled = weights if (weights < 0).any() else weights / weights.sum()
        mixed = np.einsum("k,ktv->tv", scaled, logprobs)
        mixed -= np.log(np.exp(mixed - mixed.max(-1, keepdims=True)).sum(-1, keepdims=True)) + mixed.max(
            -1, keepdims=True
        )
        return mixed, np.repeat(scaled[:, None], len(token_ids), axis=1)
    prior = weights / weights.sum()
    if share == "auto":
        by_token = _with_learnt_share(logprobs, prior, token_ids)
        return np.log(np.einsum("kt,ktv->tv", by_token, np.exp(logprobs))), by_token
    path = [prior]
    for t in range(1, len(token_ids)):
        current = path[-1]
        if pool == "posterior":
            likelihood = np.exp(logprobs[:, t - 1, token_ids[t]])
            current = current * likelihood / (current * likelihood).sum()
            current = (1 - share) * current + share * prior
        path.append(current)
    by_token = np.stack(path, axis=1)
    return np.log(np.einsum("kt,ktv->tv", by_token, np.exp(logprobs))), by_token


def _with_learnt_share(logprobs: np.ndarray, prior: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """Weights (K, T) of the mixture over six shares: each share's pool on its own, and what it has earned so far."""
    shares = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
    pools = [pooled("posterior", logprobs, prior, token_ids, share) for share in shares]
    earned, path = np.full(6, 1 / 6), []
    for t, _ in enumerate(token_ids):
        if t:
            earned = earned * np.exp([mixed[t - 1, token_ids[t]] for mixed, _ in pools])
            earned = 0.9999 * earned / earned.sum() + 0.0001 / 6
        path.append(sum(part * by_token[:, t] for part, (_, by_token) in zip(earned, pools, strict=True)))
    return np.stack(path, axis=1)


def differences(choice: Choice, after: np.ndarray) -> list[float]:
    """Nats between what a choice reports, of tokens and alternatives, and the expected `after` (T, V)."""
    seen = [(step, entry) for step, token in enumerate(choice.tokens) for entry in (token, *token.top)]
    return [abs(entry.logprob - after[step, entry.token_id]) for step, entry in seen]


class Reference:
    """A mixture as the reference sees it. `members`: name -> (model folder, adapter folder or None)."""

    def __init__(self, members: Mapping[str, tuple[Path, Path | None]], vocab_size: int) -> None:
        self.members = members
        self.vocab_size = vocab_size

    def __call__(
        self, pool: str, weights: Mapping[str, float], token_ids: Sequence[int], share: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        logprobs = np.stack([member_logprobs(*self.members[name], token_ids, self.vocab_size) for name in weights])
        return pooled(pool, logprobs, list(weights.values()), token_ids, share)
