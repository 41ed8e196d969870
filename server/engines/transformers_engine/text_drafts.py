"""Drafts from the text itself: the tokens that came after the last few when they came before.

    ... the quick brown fox ... the quick brown -> fox

Free of any forward, and right where an answer quotes, repeats or corrects what is there already. How often they are
right depends on the text and on how much of it matched, so that is watched, token by token, whether a draft is read or
not. Source: Saxena, "Prompt lookup decoding", 2023.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence

NGRAMS = (3, 2)  # tokens that must match; the longest first
LONGEST_MATCH = 16  # matches are not told apart beyond
MATCHES = (2, 3, 4, 6, 9, 16)  # at least so many tokens: the classes that chances are kept for
FIRST_CHANCES = (0.3, 0.4, 0.5, 0.7, 0.85, 0.95)  # before anything was seen, as much as `FIRST_TRIALS` of it
FIRST_TRIALS = 2.0
MEMORY = 0.9  # what a trial weighs after another of its class


class TextDrafts:
    """The text of one choice: `token_ids` of its prompt, and what is added to it."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # an n-gram -> the place behind where it came last
        self._known: Sequence[Mapping[tuple[int, ...], int]] = ()  # the same of earlier text, the latest first
        self._place: int | None = None  # of the token that is expected next
        self._num_matched = 0
        self._trials = [FIRST_TRIALS] * len(MATCHES)
        self._successes = [FIRST_TRIALS * chance for chance in FIRST_CHANCES]
        for token_id in token_ids:
            self._append(token_id)
        self._find()

    def fork(self) -> TextDrafts:
        """The same text, to which other tokens are added. Nothing may be added to this one any more."""
        other = copy.copy(self)
        other._tokens, other._ends, other._known = self._tokens.copy(), {}, (self._ends, *self._known)
        other._trials, other._successes = self._trials.copy(), self._successes.copy()
        return other

    def add(self, token_id: int) -> None:
        """The next token of the text."""
        if self._place is not None:
            is_right = self._tokens[self._place] == token_id
            self._learn(is_right)
            self._place = self._place + 1 if is_right else None
            self._num_matched += is_right
        known = self._place
        self._append(token_id)
        if known is None:
            self._find()

    def draft(self, max_tokens: int) -> list[int]:
        """What may come next. A text that goes round in a circle is drafted further than it reaches."""
        if self._place is None:
            return []
        period = len(self._tokens) - self._place
        return [self._tokens[self._place + i % period] for i in range(max_tokens)]

    def chances(self, num_tokens: int) -> list[float]:
        """How likely the first, the first two, ... tokens of the draft are all right."""
        chances, chance = [], 1.0
        for i in range(num_tokens):
            match = self._class(self._num_matched + i)
            chance *= self._successes[match] / self._trials[match]
            chances.append(chance)
        return chances

    def _append(self, token_id: int) -> None:
        """Also enters the n-grams that end before it: those that end with it would be found as their own past."""
        end = len(self._tokens)
        for n in NGRAMS:
            if end >= n:
                self._ends[tuple(self._tokens[end - n :])] = end
        self._tokens.append(token_id)

    def _find(self) -> None:
        end = len(self._tokens)
        for n in NGRAMS:
            if (place := self._end_of(tuple(self._tokens[end - n :]))) is not None:
                self._place, self._num_matched = place, self._match_before(place, n)
                return
        self._place = None

    def _end_of(self, ngram: tuple[int, ...]) -> int | None:
        return next((ends[ngram] for ends in (self._ends, *self._known) if ngram in ends), None)

    def _match_before(self, place: int, num_known: int) -> int:
        """How many tokens before `place` are those at the end."""
        end, length = len(self._tokens), num_known
        while length < min(place, LONGEST_MATCH) and self._tokens[place - 1 - length] == self._tokens[end - 1 - length]:
            length += 1
        return length

    def _learn(self, is_right: bool) -> None:
        match = self._class(self._num_matched)
        self._trials[match] = MEMORY * self._trials[match] + 1
        self._successes[match] = MEMORY * self._successes[match] + is_right

    @staticmethod
    def _class(num_matched: int) -> int:
        return bisect_right(MATCHES, num_matched) - 1
