"""Weights of systems in a plurality of their answers, fitted to rows whose right answer is known.

    accuracy of a system  a = (right + 1) / (answered + 2)
    its log-odds weight   w = max(0, ln(a / (1 - a)) + ln(s))        s: how many ways there are to be wrong

The log-odds are the best weights for systems that err independently (Nitzan & Paroush, 1982), with s = 1 for two
answers; for more, s is the effective number of different wrong answers that a row gets (inverse Simpson index, mean
over rows). Systems of one family do not err independently, so these weights are one of few that are tried: all alike,
the log-odds, and only the best k systems, alike. The one that is right most often on the rows is taken, of equals the
first.

What it gains is measured on rows that it was not fitted to (`cross_validated`).

Reference: Nitzan & Paroush, "Optimal decision rules in uncertain dichotomous choice situations", International Economic
Review 23(2), 1982, https://doi.org/10.2307/2526438
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.voting.majority import plurality


@dataclass(frozen=True)
class AnsweredRow:
    """What systems answered (None: nothing), in the order in which ties are broken, and what is right."""

    answers: Sequence[tuple[str, str | None]]  # system, answer; a system may answer more than once
    right: str
    weights: Sequence[float] = ()  # of the votes themselves, which those of systems multiply; none: all alike

    def is_won(self, weights: Mapping[str, float]) -> bool:
        """Whether the plurality under these weights of systems is right."""
        own = self.weights or [1.0] * len(self.answers)
        votes = [answer if weights[system] > 0 else None for system, answer in self.answers]
        return (
            plurality(votes, [weights[s] * vote for (s, _), vote in zip(self.answers, own, strict=True)]) == self.right
        )


@dataclass(frozen=True)
class CrossValidated:
    """Shares of rows that are right, each row under weights that were fitted to the rows of other folds.

    `alike`: all systems alike. `best`: the system that was best on the other folds, by itself. `fold_weights`: the
    fitted weights of each row's fold, in the rows' order.
    """

    fitted: float
    alike: float
    best: float
    fold_weights: tuple[Mapping[str, float], ...]


def accuracies(rows: Sequence[AnsweredRow]) -> dict[str, float]:
    """Each system's share of right answers, drawn towards 1/2 as by one right and one wrong answer more."""
    right, asked = Counter[str](), Counter[str]()
    for row in rows:
        for system, answer in row.answers:
            asked[system] += 1
            right[system] += answer == row.right
    return {system: (right[system] + 1) / (number + 2) for system, number in asked.items()}


def fitted_weights(rows: Sequence[AnsweredRow]) -> dict[str, float]:
    """Weights of all systems of `rows`, at least one of them above zero."""
    shares = accuracies(rows)
    by_merit = sorted(shares, key=lambda system: -shares[system])
    spread = math.log(_ways_to_be_wrong(rows))
    tried = [
        dict.fromkeys(shares, 1.0),
        {system: max(0.0, math.log(share / (1 - share)) + spread) for system, share in shares.items()},
        *({system: float(system in by_merit[:k]) for system in shares} for k in range(len(by_merit) - 1, 0, -1)),
    ]
    usable = [weights for weights in tried if any(weights.values())]
    return max(usable, key=lambda weights: sum(row.is_won(weights) for row in rows))


def cross_validated(rows: Sequence[AnsweredRow], *, num_folds: int = 5, seed: int = 0) -> CrossValidated:
    """What fitted weights are worth. Raises `ValueError` if there are fewer rows than folds."""
    if len(rows) < num_folds:
        raise ValueError(f"{num_folds} folds need at least {num_folds} rows whose answer is known, got {len(rows)}")
    systems = list(dict.fromkeys(system for row in rows for system, _ in row.answers))
    fold = np.random.default_rng(seed).permutation(np.arange(len(rows)) % num_folds)
    weights: list[dict[str, float]] = []
    best: list[str] = []
    for number in range(num_folds):
        others = [row for row, own in zip(rows, fold, strict=True) if own != number]
        weights.append(dict.fromkeys(systems, 0.0) | fitted_weights(others))
        shares = accuracies(others)
        best.append(max(shares, key=shares.__getitem__))
    alike = dict.fromkeys(systems, 1.0)
    alone = [{system: float(system == name) for system in systems} for name in best]
    return CrossValidated(
        fitted=_share(row.is_won(weights[own]) for row, own in zip(rows, fold, strict=True)),
        alike=_share(row.is_won(alike) for row in rows),
        best=_share(row.is_won(alone[own]) for row, own in zip(rows, fold, strict=True)),
        fold_weights=tuple(weights[own] for own in fold),
    )


def _share(are_won: Iterable[bool]) -> float:
    return float(np.mean([*are_won]))


def _ways_to_be_wrong(rows: Sequence[AnsweredRow]) -> float:
    """The effective number of different wrong answers in a row, at least 1: two that are given alike often make 2."""
    numbers = []
    for row in rows:
        wrong = Counter(answer for _, answer in row.answers if answer is not None and answer != row.right)
        if total := sum(wrong.values()):
            numbers.append(total**2 / sum(count**2 for count in wrong.values()))
    return float(np.mean(numbers)) if numbers else 1.0
