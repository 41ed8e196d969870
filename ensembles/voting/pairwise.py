"""Pairwise ranking by a judge: how it is asked, how its probabilities are read, and the scores that follow.

    preference_ij = 1/2 (p(A | i shown as A, j as B)  +  p(B | j shown as A, i as B))       p(A) + p(B) = 1
    score_i       = sum over j != i of preference_ij

Each pair is asked in both orders, since judges lean towards one place. Equal texts are draws and are not asked.

Reference: Jiang et al., "LLM-Blender", https://arxiv.org/abs/2306.02561 (PairRanker's role, here played by any model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ensemble_server.ensembles.base import GenerationRequest, Grammar, Message, Sampling, TokenLogprob
from ensemble_server.ensembles.thoughts import thought_spans, without_thoughts
from ensemble_server.ensembles.voting.tool_calls import calls_of

LETTERS = ("A", "B")
NUM_ALTERNATIVES = 20  # how many of the likeliest tokens are read; the most that APIs give

CRITERION = "more helpful, correct and complete"


def comparison_request(request: GenerationRequest, first: str, second: str, *, criterion: str) -> GenerationRequest:
    """Ask for one token, A or B: which of two answers to `request` is better. A chat is judged as a chat."""
    sampling = Sampling(max_tokens=1, temperature=0.0, grammar=Grammar("regex", "[AB]"))
    asked = f"Which answer is {criterion}?"
    answers = f"[Answer A]\n{first}\n\n[Answer B]\n{second}"
    if request.messages is None:
        # The bracket lets the letter follow without a space, as tokenizers have it.
        prompt = f"[Text]\n{request.prompt}\n\n{answers}\n\n{asked} It is answer ("
        return GenerationRequest(
            prompt=prompt, sampling=sampling, top_logprobs=NUM_ALTERNATIVES, priority=request.priority
        )
    conversation = "\n\n".join(f"{message['role']}: {_said(message)}" for message in request.messages)
    text = f"[Conversation]\n{conversation}\n\n{answers}\n\n{asked} Reply with A or B only."
    return GenerationRequest(
        messages=({"role": "user", "content": text},),
        sampling=sampling,
        top_logprobs=NUM_ALTERNATIVES,
        priority=request.priority,
    )


def _said(message: Message) -> str:
    content = message.get("content") or ""
    if message["role"] != "assistant" or not isinstance(content, str):
        return str(content)
    return " ".join(part for part in (without_thoughts(content), calls_of(message)) if part)


def probability_of_first(token: TokenLogprob) -> float:
    """p(A) of the token that the judge chose, with p(A) + p(B) = 1.

    A letter that is not among the alternatives is taken at the most that it can have: as likely as the least of them,
    or as the token that was preferred to it.
    """
    seen = {alternative.token_id: alternative for alternative in (token, *token.top)}.values()
    ceiling = math.exp(min(_logprob(alternative) for alternative in seen))
    masses = []
    for letter in LETTERS:
        found = [math.exp(_logprob(alternative)) for alternative in seen if alternative.text.strip() == letter]
        masses.append(sum(found) if found else ceiling)
    return masses[0] / sum(masses)


def _logprob(token: TokenLogprob) -> float:
    assert token.logprob is not None, "a token that was chosen has a log-probability"
    return token.logprob


def preferences(num_texts: int, first_wins: Mapping[tuple[int, int], float]) -> np.ndarray:
    """(n, n) float64, row preferred to column, each pair summing to 1; 1/2 where nothing was asked.

    `first_wins` maps (shown as A, shown as B) to p(A). A pair that was asked in one order only counts as it is.
    """
    matrix = np.full((num_texts, num_texts), 0.5)
    for first, second in {tuple(sorted(pair)) for pair in first_wins}:
        views = []
        if (first, second) in first_wins:
            views.append(first_wins[first, second])
        if (second, first) in first_wins:
            views.append(1 - first_wins[second, first])
        matrix[first, second] = sum(views) / len(views)
        matrix[second, first] = 1 - matrix[first, second]
    return matrix


def place_bias(first_wins: Mapping[tuple[int, int], float]) -> float:
    """How much the judge leans to the answer that it reads first: mean p(A) - 1/2, from -1/2 to 1/2."""
    return sum(first_wins.values()) / len(first_wins) - 0.5 if first_wins else 0.0


def mean_logprob(tokens: Sequence[TokenLogprob]) -> float | None:
    """Nats per token of what is no thought (`ensembles.thoughts`); None if none of these has a log-probability."""
    starts = [0, *accumulate(len(token.text) for token in tokens)]
    thoughts = thought_spans("".join(token.text for token in tokens))
    spoken = [
        token
        for token, start in zip(tokens, starts, strict=False)
        if not any(first <= start < last for first, last in thoughts)
    ]
    logprobs = [token.logprob for token in spoken if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else None
