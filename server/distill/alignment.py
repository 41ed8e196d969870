"""Tokens of two vocabularies side by side, as FuseLLM aligns them: by edit distance, over a whole sequence.

- Over the sequence: the two readings of a text are warped onto each other (dynamic time warping), so that the edit
  distances of the tokens that stand together, blanks aside, sum to the least.
- Over the vocabulary: a token of the source stands for itself where the target has it, else, with `mined`, for the
  target's token at the least edit distance (the first of equal ones); with `em` (exact match) for none.

A target token that stands with one source token alone, and is what that one stands for, takes over what the source
expected there, token by token through the map; all others are taught as they came. Where several tokens of the source
stand for one their probabilities are summed; the authors' code keeps the first.

Wan et al., "Knowledge fusion of large language models", ICLR 2024, https://arxiv.org/abs/2401.10491. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist, extractOne


def warped(source: Sequence[bytes], target: Sequence[bytes]) -> list[list[int]]:
    """For each token of `target`, the places of those of `source` that stand with it; at least one, in order.

    [b"a", b"bc"] onto [b"ab", b"c"] -> [[0], [1]]
    """
    costs = cdist(
        [_bare(token) for token in source], [_bare(token) for token in target], scorer=Levenshtein.distance
    ).astype(np.int64)
    total = costs.tolist()
    num_source, num_target = costs.shape
    for i in range(num_source):
        for j in range(num_target):
            if i or j:
                total[i][j] += min(total[a][b] for a, b in _before(i, j))
    places: list[list[int]] = [[] for _ in target]
    i, j = num_source - 1, num_target - 1
    while i >= 0 and j >= 0:
        places[j].append(i)
        i, j = min(_before(i, j), key=lambda step: total[step[0]][step[1]], default=(-1, -1))
    return [found[::-1] for found in places]


def _before(i: int, j: int) -> list[tuple[int, int]]:
    """Where a warp can come from; of equal ones both tokens go on."""
    steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
    return [(a, b) for a, b in steps if a >= 0 and b >= 0]


def _bare(token: bytes) -> str:
    return _text(token).replace(" ", "")


def _text(token: bytes) -> str:
    return token.decode(errors="replace")


class TokenMap:
    """`ids`: of the target's tokens, by their bytes. `is_near`: whether a token that it lacks stands for the nearest
    one (MinED), or for none (EM)."""

    def __init__(self, ids: Mapping[bytes, int], *, is_near: bool) -> None:
        self._ids = ids
        self._is_near = is_near
        order = sorted(ids, key=ids.__getitem__)
        self._targets = [ids[token] for token in order]
        self._choices = [_text(token) for token in order]
        self._nearest: dict[bytes, int] = {}

    def __call__(self, token: bytes) -> int | None:
        """The target's token that stands for `token`; found when first asked for, and kept."""
        if token in self._ids or not self._is_near:
            return self._ids.get(token)
        if token not in self._nearest:
            _, _, place = extractOne(_text(token), self._choices, scorer=Levenshtein.distance)
            self._nearest[token] = self._targets[place]
        return self._nearest[token]

    def mapped(self, entries: Iterable[tuple[bytes, float]]) -> tuple[np.ndarray, np.ndarray]:
        """What a source expects, in tokens of the target -> ids, and the probabilities of what stands for each."""
        found: dict[int, float] = {}
        for token, probability in entries:
            image = self(token)
            if image is not None:
                found[image] = found.get(image, 0.0) + probability
        return np.fromiter(found, np.int64, len(found)), np.fromiter(found.values(), np.float64, len(found))
