"""Plurality among answers, and when it is decided.

A vote is an answer's canonical text, or None for a voter who abstains. The answer with the largest sum of weights wins;
of equal sums the one that was given first.

Reference: Wang et al., "Self-consistency improves chain of thought reasoning", https://arxiv.org/abs/2203.11171
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

TOLERANCE = 1e-9  # sums of weights closer than this are equal


class _Pending:
    def __repr__(self) -> str:
        return "PENDING"


PENDING: Final = _Pending()  # the vote of one who has not yet answered

Vote = str | None | _Pending


def tally(votes: Sequence[Vote], weights: Sequence[float]) -> dict[str, float]:
    """The sum of weights of each answer, in order of first appearance: ["a", None, "a"] -> {"a": 2.0}"""
    sums: dict[str, float] = {}
    for vote, weight in zip(votes, weights, strict=True):
        if isinstance(vote, str):
            sums[vote] = sums.get(vote, 0.0) + weight
    return sums


def plurality(votes: Sequence[Vote], weights: Sequence[float]) -> str | None:
    """The winning answer; None if all abstain."""
    sums = tally(votes, weights)
    best = max(sums.values(), default=0.0)
    return next((answer for answer, total in sums.items() if total >= best - TOLERANCE), None)


def is_decided(votes: Sequence[Vote], weights: Sequence[float]) -> bool:
    """Whether those PENDING cannot change the winner, whatever they answer. Weights must not be negative.

    The worst that can happen to a leader is that all of them agree on one rival, known or new.
    """
    leader = plurality(votes, weights)
    if leader is None:
        return PENDING not in votes
    new_answer = "".join(tally(votes, weights)) + "?"
    return all(
        plurality([rival if vote is PENDING else vote for vote in votes], weights) == leader
        for rival in (*tally(votes, weights), new_answer)
    )


def num_to_decide(votes: Sequence[Vote], weights: Sequence[float]) -> int:
    """How many of those PENDING, in their order, would decide the vote if all of them agreed with its leader.

    ["a", PENDING, PENDING, PENDING] -> 1: after ["a", "a"] the other two could at most draw level, and "a" was first.
    Fewer than that never decide it, so a vote that is asked for in such steps costs no answer too many.
    """
    pending = [place for place, vote in enumerate(votes) if vote is PENDING]
    leader = plurality(votes, weights) or "".join(tally(votes, weights)) + "?"
    supposed = list(votes)
    for number, place in enumerate(pending):
        if is_decided(supposed, weights):
            return number
        supposed[place] = leader
    return len(pending)


def agreement(sums: Mapping[str, float]) -> float:
    """The winner's share of all votes cast, 0 to 1; 0 if none was."""
    return max(sums.values()) / sum(sums.values()) if sums and sum(sums.values()) > 0 else 0.0
