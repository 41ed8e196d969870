"""From a distribution to a token: penalties, bias, temperature, truncation, one draw. Pure functions on one row.

Everything works on the mixture's log-probabilities, which serve as logits (they differ from any logits of the same
distribution by a constant). Order as in vLLM: penalties, bias and grammar, temperature, min_p, top_k, top_p, draw.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ensemble_server.ensembles.base import Sampling

GREEDY_BELOW = 1e-5  # lower temperatures mean "the most likely token", and would overflow float32 (vLLM's limit)
CANDIDATES = 1024  # top_p looks here first: sorting a whole vocabulary of 49k takes 20 times as long on CPU


def penalise(
    logits: torch.Tensor, sampling: Sampling, prompt_ids: torch.Tensor, counts: Mapping[int, int]
) -> torch.Tensor:
    """`logits` (V,) less the penalties and plus the bias, as a new tensor; the same tensor if there are none.

    `counts`: how often each token was generated so far. Presence and frequency penalties look at generated tokens,
    the repetition penalty at the prompt's too. Log-probabilities are never positive, so repetition multiplies them.
    """
    if sampling.repetition_penalty == 1 and not (
        sampling.logit_bias or (counts and (sampling.presence_penalty or sampling.frequency_penalty))
    ):
        return logits
    logits = logits.clone()
    generated = torch.tensor(list(counts), dtype=torch.long, device=logits.device)
    if sampling.repetition_penalty != 1:
        seen = torch.unique(torch.cat([prompt_ids.to(logits.device), generated]))
        logits[seen] *= sampling.repetition_penalty
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[generated] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long, device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    return logits


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token id. Temperature 0 takes the most likely (the lowest id among equals) and draws nothing.

    logits: (V,), -inf for forbidden tokens. Draws one uniform number per call, whatever the distribution, so that
    a seed gives the same stream of numbers in every batch.
    """
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
    ids, probs = truncate(torch.log_softmax(logits / sampling.temperature, -1), sampling)
    cumulative = probs.double().cumsum(0)
    position = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return int(ids[min(int(position), len(ids) - 1)])


def truncate(logprobs: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """What min_p, top_k and top_p leave of `logprobs` (V,): token ids and probabilities (not rescaled).

    The most likely token always stays. top_p keeps the smallest set of most likely tokens whose mass, relative to
    what min_p and top_k left, reaches top_p.
    """
    probs = logprobs.exp()
    if sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0:
        ids = torch.nonzero(probs).flatten()
        return ids, probs[ids]
    kept, ids = probs.topk(min(sampling.top_k or CANDIDATES, len(probs)))
    complete = bool(sampling.top_k) or len(ids) == len(probs)
    if not complete and not _reaches(kept, probs, sampling):
        kept, ids = probs.sort(descending=True)
    inside = (kept > 0) & (kept >= sampling.min_p * kept[0])
    inside[0] = True
    kept, ids = kept[inside], ids[inside]
    if sampling.top_p < 1:
        total = kept.double().sum() if sampling.top_k or sampling.min_p else probs.double().sum()
        before = kept.double().cumsum(0) - kept  # mass of all more likely tokens
        inside = before < sampling.top_p * total
        inside[0] = True
        kept, ids = kept[inside], ids[inside]
    return ids, kept


def _reaches(kept: torch.Tensor, probs: torch.Tensor, sampling: Sampling) -> bool:
    """Whether the leading candidates already hold everything that truncation can leave."""
    if sampling.min_p and kept[-1] < sampling.min_p * kept[0]:
        return True
    return not sampling.min_p and bool(kept.double().sum() >= sampling.top_p * probs.double().sum())
