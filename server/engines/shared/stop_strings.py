"""Where a stream of text meets its first stop string, in time that does not grow with the strings' length.

Each string is followed by Knuth, Morris and Pratt's automaton: how much of it the text ends with says, after every
character, what has to be held back. https://en.wikipedia.org/wiki/Knuth-Morris-Pratt_algorithm
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

from ensemble_server.ensembles.errors import RequestError

MAX_STOP_CHARS = 1000  # of one string: what is held back of a stream, and what each choice keeps per string


def check_stops(stops: Sequence[str]) -> None:
    """Raises `RequestError` for a string that is longer than `MAX_STOP_CHARS`."""
    for stop in stops:
        if len(stop) > MAX_STOP_CHARS:
            raise RequestError(
                f"stop: a string has at most {MAX_STOP_CHARS} characters, got {len(stop)}; its beginning is enough",
                param="stop",
            )


class StopStrings:
    """Cuts a stream of text at the first stop string, also across the borders of pieces.

    Text that could be the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._seekers = [_Seeker(stop) for stop in stops]
        self._include = include
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """-> (text that may be shown, the stop string that was met or None). After a stop there is nothing more."""
        if not self._seekers:
            return piece, None
        text = self._held + piece
        found = [
            (len(self._held) + end, len(self._held) + end - len(seeker.stop), seeker.stop)
            for seeker in self._seekers
            if (end := seeker.feed(piece)) is not None
        ]
        if found:  # the one that is complete first: which one that is does not depend on where pieces end
            end, start, stop = min(found)
            self._held = ""
            return text[: end if self._include else start], stop
        hold = max(seeker.num_matched for seeker in self._seekers)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


class _Seeker:
    """`num_matched`: the length of the longest end of the text so far that is a beginning of `stop`."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._shorter = _shorter_matches(stop)

    def feed(self, piece: str) -> int | None:
        """The place in `piece` where `stop` is complete for the first time; None if it is not."""
        stop, shorter, matched, place = self.stop, self._shorter, self.num_matched, 0
        while place < len(piece):
            if not matched:
                place = piece.find(stop[0], place)
                if place < 0:
                    break
            while matched and stop[matched] != piece[place]:
                matched = shorter[matched - 1]
            matched += stop[matched] == piece[place]
            place += 1
            if matched == len(stop):
                return place
        self.num_matched = matched
        return None


@lru_cache(maxsize=256)
def _shorter_matches(stop: str) -> array[int]:
    """For each beginning of `stop`, the longest other beginning of it that it ends with: "abab" -> 0, 0, 1, 2"""
    lengths, matched = array("i", [0] * len(stop)), 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = lengths[matched - 1]
        matched += stop[matched] == stop[place]
        lengths[place] = matched
    return lengths
